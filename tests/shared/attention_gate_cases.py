"""Inputs and checks of the attention gates: for the operators and the emulated CUDA kernels."""

from functools import partial

import torch

import sr_kernels
from sr_kernels import reference, testing
from sr_kernels.testing import check_operator

# (N, C, H, W): the networks' channel counts, odd sizes, single rows and columns, batch 0.
SIZES = [
    (1, 52, 12, 40),
    (2, 1, 5, 7),
    (1, 3, 1, 9),
    (2, 31, 6, 1),
    (1, 48, 3, 97),
    (1, 64, 7, 5),
    (1, 180, 2, 3),
    (1, 60, 1, 1),
    (0, 10, 4, 4),
]
# name: (operator, settings)
CASES = {
    "pixel": ("pixel_attention", {}),
    "spatial": ("spatial_attention", {}),
    "pixel_spatial": ("pixel_spatial_attention", {}),
    "gate_mean": ("channel_gate", {"statistic": "mean"}),
    "gate_contrast": ("channel_gate", {"statistic": "contrast"}),
    "channel_mean": ("channel_attention", {"statistic": "mean"}),
    "channel_contrast": ("channel_attention", {"statistic": "contrast"}),
    "gated_conv": ("gated_conv1x1", {}),
}


def make_inputs(
    case, size, dtype=torch.float32, layout="contiguous", *, kernel=7, hidden=6, device="cpu"
):
    make_tensor = partial(testing.make_tensor, device=device)
    n, c, h, w = size

    def weight(c_out, c_in, seed, k=1):
        # Scaled so that a gate's argument has unit size: sigmoid is neither linear nor flat.
        scale = (c_in * k * k) ** -0.5
        return make_tensor((c_out, c_in, k, k), dtype, seed=seed, scale=scale)

    def bias(count, seed):
        return make_tensor((count,), dtype, seed=seed)

    x = make_tensor(size, dtype, layout=layout, seed=0)
    match CASES[case][0]:
        case "pixel_attention":
            return {"x": x, "weight": weight(c, c, 1), "bias": bias(c, 2)}
        case "spatial_attention":
            return {"x": x, "weight": weight(1, 2, 1, kernel), "bias": bias(1, 2)}
        case "pixel_spatial_attention":
            return {
                "x": x,
                "pixel_weight": weight(c, c, 1),
                "pixel_bias": bias(c, 2),
                "spatial_weight": weight(1, 2, 3, kernel),
                "spatial_bias": bias(1, 4),
            }
        case "gated_conv1x1":
            c_out = c // 2 + 1
            return {
                "x": x,
                "gate": make_tensor((n, c, 1, 1), dtype, seed=5).sigmoid(),
                "weight": weight(c_out, c, 1),
                "bias": bias(c_out, 2),
                "residual": make_tensor((n, c_out, h, w), dtype, layout=layout, seed=6),
            }
        case _:
            return {
                "x": x,
                "w_down": weight(hidden, c, 1),
                "b_down": bias(hidden, 2),
                "w_up": weight(c, hidden, 3),
                "b_up": bias(c, 4),
            }


def functions(case):
    name, settings = CASES[case]
    return getattr(sr_kernels, name), getattr(reference, name), settings


def check(case, inputs, **options):
    name, settings = CASES[case]
    # Stock's order of summation, and with it its error, differs between one thread and two; on the
    # few numbers of a small gradient (the spatial gate's bias has one) it is a matter of luck, 0
    # included. These are a few units in the last place of such numbers, which are 1 to 30.
    dtype = inputs["x"].dtype
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        options.setdefault("atol", 1e-14)
        options.setdefault("gradient_atol", 1e-13)
    elif dtype == torch.float32:
        options.setdefault("atol", 4 * eps)
        options.setdefault("gradient_atol", (80 if "spatial" in case else 16) * eps)
    else:
        options.setdefault("gradient_atol", eps / 2)
    ours, stock, settings = functions(case)
    return check_operator(name, ours, stock, inputs, kwargs=settings, **options)
