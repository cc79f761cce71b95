"""Inputs and checks of the channel moments: for the operators and the emulated CUDA kernels."""

import torch

from sr_kernels.testing import make_tensor

FORWARD = torch.ops.sr_kernels.channel_moments
# One pixel, one row, one column, less than a vector, more than a tile or several tiles, and more
# channels than one.
SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 1, 5),
    (2, 31, 7, 1),
    (3, 13, 17, 19),
    (2, 70, 5, 9),
    (1, 130, 3, 11),
]


def definition(x):
    rows = x.double().transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    return mean, centred @ centred.T / rows.shape[1]


def check(x):
    # What is summed in the compute type, and what the sums are.
    tolerance = 1e-14 if x.dtype == torch.float64 else 1e-6
    for actual, expected in zip(FORWARD(x), definition(x), strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_large_means(layout, device="cpu"):
    """Variances of 1 under means of 1000: E[x x] - E[x] E[x] in float32 would leave one digit."""
    x = make_tensor((2, 20, 40, 40), layout=layout, device=device)
    x += torch.linspace(-1000, 1000, 20, device=device)[:, None, None]
    mean, covariance = FORWARD(x)
    expected_mean, expected = definition(x)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=2e-6)


def check_gradient(x):
    c = x.shape[1]
    weights = [
        make_tensor(shape, torch.float64, seed=seed, device=x.device.type) * (x.numel() / c)
        for seed, shape in ((1, (c,)), (2, (c, c)))
    ]
    gradients = []
    for function, leaf in ((FORWARD, x.detach()), (definition, x.detach().double())):
        outputs = function(leaf.requires_grad_())
        loss = sum((w * y).sum() for w, y in zip(weights, outputs, strict=True))
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    ours, exact = gradients
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}.get(x.dtype, torch.finfo(x.dtype).eps)
    assert ours.dtype == x.dtype
    torch.testing.assert_close(
        ours.double(), exact, rtol=0, atol=tolerance * max(1.0, exact.abs().max().item())
    )
    return ours
