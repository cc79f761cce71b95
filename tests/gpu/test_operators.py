"""Every operator's CUDA kernels on a GPU: against the definition, and what only a GPU has: streams,
graphs, devices, sizes. The Triton kernels have the same cases (tests/triton_operators)."""

import dataclasses

import operator_cases
import pytest
import torch
from choices import DTYPES, LAYOUTS
from streams import on_a_side_stream, replay_equals_run

import sr_kernels
from sr_kernels import reference
from sr_kernels.testing import bitwise_equal

pytestmark = pytest.mark.gpu
ALL = pytest.mark.parametrize("name", operator_cases.CASES)
ANY_SIZE = [name for name, case in operator_cases.CASES.items() if not case.windows]
TRAINED = [name for name, case in operator_cases.CASES.items() if not case.inference]


@pytest.fixture
def cases(device, backend):
    return {name: case.on(device, backend) for name, case in operator_cases.CASES.items()}


def larger(case):
    """An image of several blocks, no multiple of a tile; the windows are of 2 x 5 and 4 x 4."""
    return (2, 44, 60) if case.windows else (2, 43, 61)


# ------------------------------------------------------------------------------ numbers


@pytest.mark.unpoisoned  # initcheck is to see what is not written
@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "contiguous"), (torch.float16, "channels_last")]
)
@ALL
def test_tiny(cases, name, dtype, layout):
    """What compute-sanitizer runs: every operator, on a few pixels, and nothing of stock's."""
    case = cases[name]
    inputs = case.inputs(*case.size, dtype, layout)
    leaves = [tensor.requires_grad_(not case.inference) for tensor in inputs.values()]
    out = case.run(inputs)
    gradients = [] if case.inference else torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@ALL
def test_forward_and_backward(cases, name, dtype, layout):
    cases[name].check(*larger(cases[name]), dtype, layout)


@pytest.mark.parametrize("size", [(1, 1, 9), (2, 6, 1), (1, 1, 1), (0, 4, 4)], ids=str)
@pytest.mark.parametrize("name", ANY_SIZE)
def test_odd_images(cases, name, size):
    if size[0] == 0 and name.startswith("gate_"):
        pytest.skip("stock cannot differentiate the convolution of an empty batch's mean")
    cases[name].check(*size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [1, 3, 31, 48, 52, 60, 64, 180])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_channels(cases, name, channels, dtype):
    cases[name].check(1, 13, 21, dtype, "channels_last", channels)


@pytest.mark.parametrize("name", TRAINED)
def test_every_single_gradient(cases, name):
    case = cases[name]
    case.check(*case.size, gradients=[(one,) for one in case.inputs(*case.size)])


@ALL
def test_without_optional_tensors(cases, name):
    inputs = cases[name].inputs(*cases[name].size)
    for key in inputs:
        if key in ("b0", "b1", "b_down", "b_up", "residual", "skip") or key.endswith("bias"):
            inputs[key] = None
    cases[name].check_inputs(inputs, gradient_atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ALL
def test_autocast(cases, name, dtype):
    cases[name].check(*larger(cases[name]), autocast=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [name for name in ANY_SIZE if name != "conv3x3"])
def test_nan_and_inf_pass_as_in_the_reference(cases, name, value):
    case = cases[name]
    inputs = case.inputs(2, 5, 7)
    inputs["x"][0, 3, 2, 4] = value
    ours, stock = case.run(inputs), case.function(reference)(**inputs, **case.options)
    assert torch.equal(ours.isnan(), stock.isnan())
    assert torch.equal(ours.isinf(), stock.isinf())


@pytest.mark.parametrize("name", ["attention", "grouped", "conv3x3"])
def test_a_nan_stays_where_it_can_reach(cases, name):
    """A window's other pixels, a pixel's neighbours: no further."""
    case = cases[name]
    inputs = case.inputs(*larger(case))
    clean = case.run(inputs)
    next(iter(inputs.values()))[0, 1, 9, 8] = float("nan")
    changed = case.run(inputs) != clean
    assert changed[0, :, 9, 8].any()
    assert not changed[1].any()
    assert not changed[0, :, 24:].any()


@pytest.mark.parametrize("norm", [877.0, 47000.0])
def test_extreme_scores(cases, norm):
    """|q|^2 = 877 is in trained weights, 47,000 in untrained ones."""
    case = cases["grouped"]
    inputs = case.inputs(1, 16, 16)
    q = inputs["qv"].unflatten(1, (2, 2, 3))[:, :, 0]  # q0 v0 q1 v1
    q *= (norm / q.square().sum(2).mean()).sqrt()
    case.check_inputs(inputs, gradients=None, options={"windows": (4, 16)})


@pytest.mark.parametrize("depth", [1, 3])
def test_reuses_accumulate_gradients(cases, depth):
    options = {"depth": depth, "windows": (4, 8)}
    cases["grouped"].check(1, 16, 24, options=options, gradient_atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@ALL
def test_a_hundred_repeats_are_bit_equal(cases, name, dtype):
    case = cases[name]
    inputs = case.inputs(*larger(case), dtype)
    leaves = [t.requires_grad_(not case.inference) for t in inputs.values()]

    def results():
        out = case.run(inputs)
        if case.inference:
            return [out]
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    first = results()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@ALL
def test_float32_is_float32_whatever_the_switch_says(cases, name):
    inputs = cases[name].inputs(*larger(cases[name]))
    exact = cases[name].run(inputs)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert bitwise_equal(cases[name].run(inputs), exact)


def test_float64_is_refused_with_the_reason(cases):
    for case in cases.values():
        with pytest.raises(RuntimeError, match="float64 is not supported"):
            case.run(case.inputs(*case.size, torch.float64))


# ------------------------------------------------------------------------------ training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TRAINED)
def test_training_steps_under_amp(cases, device, name, dtype):
    """Adam's steps do not depend on the size of the gradients, of which float16 has few."""
    trained = cases[name].inputs(*larger(cases[name]))
    optimizer = torch.optim.Adam([t.requires_grad_() for t in trained.values()], lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            out = cases[name].run(trained)
        loss = (out.float() - 1).square().sum() / out.shape[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------ streams, graphs


@pytest.mark.unpoisoned  # poisoning fills memory in the middle of a capture
@pytest.mark.parametrize("name", TRAINED)
def test_graph_capture_and_replay_with_the_backward(cases, name):
    case = cases[name]
    inputs = case.inputs(*larger(case), torch.float16)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def run():
        out = case.run(inputs)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    replay_equals_run(run, leaves[0])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["attention_block", "conv3x3"])
def test_graph_capture_and_replay(cases, name):
    inputs = cases[name].inputs(*larger(cases[name]), torch.float16)
    replay_equals_run(lambda: [cases[name].run(inputs)], next(iter(inputs.values())))


@pytest.mark.unpoisoned
@ALL
def test_kernels_run_in_the_current_stream(cases, name):
    case = cases[name]
    inputs = case.inputs(*larger(case))
    expected = case.results(inputs)

    def run(tensors):
        return case.results({key: tensors[key] for key in inputs}, tensors["of the output"])

    found = on_a_side_stream(run, {**inputs, "of the output": case.gradient_of(expected[0])})
    assert all(map(bitwise_equal, expected, found))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["channel_mean", "channel_contrast"])
def test_launches_whose_blocks_wait_for_each_other_share_the_gpu(cases, name):
    inputs = cases[name].inputs(2, 96, 128, torch.float16)
    expected = cases[name].run(inputs)
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(3)] * 20:
        with torch.cuda.stream(stream):
            results.append(cases[name].run(inputs))
    torch.cuda.synchronize()
    assert all(bitwise_equal(expected, out) for out in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@ALL
def test_the_device_is_the_tensors_own(cases, name):
    results = []
    for device in ("cuda:0", "cuda:1"):
        case = cases[name].on(device, cases[name].backend)
        with torch.cuda.device("cuda:0"):
            results.append(case.results(case.inputs(*larger(case))))
    assert {tensor.device for tensor in results[1]} == {torch.device("cuda:1")}
    assert all(map(bitwise_equal, *results))


# ------------------------------------------------------------------------------ sizes


HEIGHT, WIDTH, CHANNELS = 8400, 8200, 32  # more than 2^31 elements
# What sums over the whole image has no part that is like it.
LOCAL = [n for n in operator_cases.CASES if not n.startswith(("gate_", "channel_"))]


def need_memory(device, channels):
    """Skips where there is none for so many channels of HEIGHT x WIDTH in 16 bits."""
    needed = 2 * channels * HEIGHT * WIDTH
    if device != "cuda":
        return
    torch.cuda.empty_cache()  # what earlier tests have freed
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")


def large_inputs(case, device, copies):
    """Inputs of HEIGHT x WIDTH in float16, the same of their last 40 rows, and the names of those
    that are maps. copies: of the maps, which there must be memory for, besides outputs."""
    inputs = case.inputs(1, 20, 20, torch.float16, "channels_last", CHANNELS)
    maps = [key for key, t in inputs.items() if t.dim() == 4 and t.shape[2:] == (20, 20)]
    need_memory(device, copies * sum(inputs[key].shape[1] for key in maps) + 6 * CHANNELS)
    for key in maps:
        count = inputs[key].shape[1]
        inputs[key] = inputs[key].new_empty((1, HEIGHT, WIDTH, count)).normal_().permute(0, 3, 1, 2)
    return inputs, {**inputs, **{key: inputs[key][:, :, -40:] for key in maps}}, maps


def unshifted(case):
    """A roll would bring the first rows to the last."""
    still = {"shift": (0, 0), "shifted": False}
    changed = {key: value for key, value in still.items() if key in case.options}
    return dataclasses.replace(case, options={**case.options, **changed})


@pytest.mark.large
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", LOCAL)
def test_more_than_two_to_the_31_elements(cases, device, name):
    """The last rows of an image, against the same rows of its last part alone."""
    case = unshifted(cases[name])
    inputs, last, _ = large_inputs(case, device, copies=1)
    out = case.run(inputs)[:, :, -20:].clone()
    assert bitwise_equal(out, case.run(last)[:, :, -20:])


@pytest.mark.large
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", [name for name in LOCAL if name in TRAINED])
def test_gradients_of_more_than_two_to_the_31_elements(cases, device, name):
    """The output's is zero but for its last rows: so are the maps' then, and they are the same as
    those of the last part alone; those of the weights are, up to the order of their sums."""
    case = unshifted(cases[name])
    # A map has a gradient; one whose scores are used twice, two.
    inputs, last, maps = large_inputs(case, device, copies=3)
    rows = case.gradient_of(case.run(last)[:, :, -20:])
    grad = rows.new_zeros((1, HEIGHT, WIDTH, rows.shape[1])).permute(0, 3, 1, 2)
    grad[:, :, -20:] = rows
    gradients = case.results(inputs, grad)[1:]
    expected = case.results(last, grad[:, :, -40:])[1:]
    for key, far, near in zip(inputs, gradients, expected, strict=True):
        assert near.any(), key
        if key in maps:
            assert bitwise_equal(far[:, :, -20:], near[:, :, -20:]), key
            assert not far[:, :, :-40].any(), key
        else:
            atol = 2e-3 * float(near.abs().max())
            torch.testing.assert_close(far, near, rtol=2e-3, atol=atol, msg=key)


@pytest.mark.large
@pytest.mark.unpoisoned
def test_statistics_of_more_than_two_to_the_31_elements(cases, device):
    """A constant map's mean is the constant, whatever the size; and its gradient the same."""
    need_memory(device, 5 * CHANNELS)
    inputs = cases["gate_mean"].inputs(1, 4, 4, torch.float16, "channels_last", CHANNELS)
    gate = cases["gate_mean"].run({**inputs, "x": torch.full_like(inputs["x"], 0.5)})
    x = inputs["x"][:, :, :1, :1].expand(1, CHANNELS, HEIGHT, WIDTH)
    big = torch.empty_like(x, memory_format=torch.channels_last).fill_(0.5)
    torch.testing.assert_close(cases["gate_mean"].run({**inputs, "x": big}), gate)
    scaled = cases["channel_mean"].run({**inputs, "x": big})
    torch.testing.assert_close(scaled[:, :, -1:, -1:], gate * 0.5)
    del scaled

    def gradient(x):
        leaf = x.detach().requires_grad_()
        out = cases["channel_mean"].run({**inputs, "x": leaf})
        (dx,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        return dx[:, :, -1:, -1:]

    expected = gradient(torch.full_like(inputs["x"], 0.5))
    torch.testing.assert_close(gradient(big), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.unpoisoned
@ALL
def test_a_batch_beyond_a_grid_dimension(cases, name):
    case = cases[name]
    n = 65536
    size = (n, 2, 5) if name == "attention" else (n, 4, 4) if case.windows else (n, 1, 2)
    inputs = case.inputs(*size, channels=2 * case.windows + 2)
    out = case.run(inputs)
    last = {k: t[-2:] if t.shape[0] == n else t for k, t in inputs.items()}
    if name.startswith("channel_"):  # fewer images stay on chip: their sums have another order
        torch.testing.assert_close(out[-2:], case.run(last))
    else:
        assert bitwise_equal(out[-2:], case.run(last))


def test_out_is_written_in_place(device, backend):
    case = operator_cases.CASES["block"].on(device, backend)
    inputs = case.inputs(*case.size)
    out = torch.full_like(inputs["x"], float("nan"))
    assert case.run(inputs, out=out) is out
    assert bitwise_equal(out, case.run(inputs))
    blocks = operator_cases.CASES["attention_block"].on(device, backend)
    x, w_in, b_in, w_out, b_out, w_v, b_v = blocks.inputs(*blocks.size).values()
    y, q = torch.full_like(x, float("nan")), x.new_empty(x.shape)
    options = {**blocks.options, "backend": backend, "return_scores": True}
    _, scores = sr_kernels.grouped_attention_block(
        x, w_in, b_in, w_out, b_out, **options, out=(y, q)
    )
    expected, _ = sr_kernels.grouped_attention_block(x, w_in, b_in, w_out, b_out, **options)
    assert bitwise_equal(y, expected)
    given = torch.full_like(x, float("nan"))
    arguments = (scores, x, w_v, b_v, w_out, b_out)
    sr_kernels.apply_grouped_attention_block(*arguments, out=given, backend=backend)
    alone = sr_kernels.apply_grouped_attention_block(*arguments, backend=backend)
    assert bitwise_equal(given, alone)
