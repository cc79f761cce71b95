"""The test helpers catch what they are for: each is shown a fault and must find it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sr_kernels import testing as T
from sr_kernels.ops._registration import is_channels_last


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.conv2d(x, weight, bias)


def inputs_of(dtype: torch.dtype = torch.float32, **kwargs: Any) -> dict[str, torch.Tensor | None]:
    return {
        "x": T.make_tensor((2, 6, 5, 7), dtype, **kwargs),
        "weight": T.make_tensor((4, 6, 1, 1), dtype, seed=1),
        "bias": T.make_tensor((4,), dtype, seed=2),
    }


def as_operator(function: Any) -> Any:
    def operator(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        assert backend == "cpu"
        return function(*args, **kwargs)

    return operator


# ---------------------------------------------------------------------------------- error metrics


def test_error_metrics_of_a_known_difference() -> None:
    oracle = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    actual = torch.tensor([[3.0, 4.0], [0.0, -0.5]])
    metrics = T.error_metrics(actual, oracle)
    assert metrics.max_abs == 0.5
    assert metrics.worst == (1, 1)
    assert metrics.rms == pytest.approx(0.25)
    assert metrics.relative_l2 == pytest.approx(0.1)
    assert metrics.cosine == pytest.approx(25 / (5 * math.sqrt(25.25)))


def test_error_metrics_of_tiny_values_do_not_underflow() -> None:
    oracle = torch.full((10,), 1e-200, dtype=torch.float64)
    metrics = T.error_metrics(2 * oracle, oracle)
    assert metrics.relative_l2 == pytest.approx(1.0)
    assert metrics.cosine == pytest.approx(1.0)


def test_error_metrics_of_zero_and_empty() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert T.error_metrics(zero, zero).cosine == 1.0
    assert T.error_metrics(zero + 1, zero).relative_l2 == math.inf
    assert T.error_metrics(torch.empty(0, 3), torch.empty(0, 3)).worst is None


def test_error_metrics_reject_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(3, 1\)"):
        T.error_metrics(torch.zeros(3), torch.zeros(3, 1))


def test_bitwise_equal() -> None:
    nan = torch.tensor([math.nan, 0.0])
    assert T.bitwise_equal(nan, nan.clone())
    assert not T.bitwise_equal(nan, torch.tensor([math.nan, -0.0]))
    assert not T.bitwise_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not T.bitwise_equal(torch.zeros(2), torch.zeros(1, 2))


# ------------------------------------------------------------------------------ the tolerance rule


def three_results(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Stock's result and the oracle of a product with 64 terms."""
    a = T.make_tensor((32, 64), dtype, seed=1)
    b = T.make_tensor((64, 32), dtype, seed=2)
    return a @ b, a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rule_accepts_stock_and_the_rounded_oracle(dtype: torch.dtype) -> None:
    stock, oracle = three_results(dtype)
    T.assert_within_tolerance(stock, stock, oracle)
    T.assert_within_tolerance(oracle.to(dtype), stock, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rule_rejects_one_wrong_element(dtype: torch.dtype) -> None:
    stock, oracle = three_results(dtype)
    wrong = stock.clone()
    wrong[3, 5] += 0.5
    with pytest.raises(AssertionError, match=r"error too large(.|\n)*\(3, 5\)"):
        T.assert_within_tolerance(wrong, stock, oracle)


def test_rule_rejects_the_precision_of_a_narrower_dtype() -> None:
    stock, oracle = three_results(torch.float32)
    with pytest.raises(AssertionError, match="error too large"):
        T.assert_within_tolerance(stock.to(torch.bfloat16).float(), stock, oracle)


def test_rule_rejects_many_small_errors() -> None:
    """Each element alone would pass the bound on the largest error; together they are a bias."""
    stock, oracle = three_results(torch.float32)
    metrics = T.error_metrics(stock, oracle)
    bound = 2 * metrics.max_abs
    assert metrics.rms < 0.3 * metrics.max_abs
    with pytest.raises(AssertionError, match="root mean square"):
        T.assert_within_tolerance((oracle + bound).float(), stock, oracle)


def test_rule_demands_exactness_where_stock_is_exact() -> None:
    oracle = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    stock = oracle.float()
    T.assert_within_tolerance(stock.clone(), stock, oracle)
    near = stock + torch.tensor([1e-9, 0.0, 0.0])
    with pytest.raises(AssertionError, match="stock is exact"):
        T.assert_within_tolerance(near, stock, oracle)
    T.assert_within_tolerance(near, stock, oracle, atol=1e-8)


def test_rule_compares_non_finite_values_by_class() -> None:
    stock, oracle = three_results(torch.float32)
    for value in (math.nan, math.inf, -math.inf):
        oracle[1, 2] = value
        stock[1, 2] = value
        T.assert_within_tolerance(stock.clone(), stock, oracle)
        for other in (math.nan, math.inf, -math.inf, 1.0):
            if other == value or (math.isnan(other) and math.isnan(value)):
                continue
            wrong = stock.clone()
            wrong[1, 2] = other
            with pytest.raises(AssertionError, match=r"first at \(1, 2\)"):
                T.assert_within_tolerance(wrong, stock, oracle)


def test_rule_knows_overflow_of_the_tested_dtype() -> None:
    oracle = torch.tensor([1e6, 1.1], dtype=torch.float64)
    stock = oracle.half()
    assert torch.isinf(stock[0])
    T.assert_within_tolerance(stock.clone(), stock, oracle)


def test_rule_rejects_other_shape_or_dtype() -> None:
    stock, oracle = three_results(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        T.assert_within_tolerance(stock[:, :1], stock, oracle)
    with pytest.raises(AssertionError, match="dtype"):
        T.assert_within_tolerance(stock.double(), stock, oracle)


def test_dead_gradient_is_found_in_every_dimension() -> None:
    expected = T.make_tensor((2, 5, 3, 4))
    T.assert_gradients_alive(expected, expected)
    for dim, size in enumerate(expected.shape):
        wrong = expected.clone()
        wrong.select(dim, size - 1).zero_()
        with pytest.raises(AssertionError, match=f"index {size - 1} of dimension {dim}"):
            T.assert_gradients_alive(wrong, expected)


def test_dead_gradient_of_a_small_channel_is_found() -> None:
    """The fault that a bound on the largest error lets pass."""
    oracle = T.make_tensor((1, 3, 8, 8), torch.float64)
    oracle[:, 1] *= 1e-5
    stock = oracle.bfloat16()
    wrong = stock.clone()
    wrong[:, 1] = 0
    T.assert_within_tolerance(wrong, stock, oracle)
    with pytest.raises(AssertionError, match="index 1 of dimension 1"):
        T.assert_gradients_alive(wrong, stock)


def test_zero_up_to_rounding_may_be_zero() -> None:
    expected = torch.tensor([1.0, 1e-9])
    T.assert_gradients_alive(torch.tensor([1.0, 0.0]), expected)
    with pytest.raises(AssertionError, match="index 0"):
        T.assert_gradients_alive(torch.tensor([0.0, 1e-9]), expected)


# --------------------------------------------------------------------------------- test inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_layouts_hold_the_same_values(dtype: torch.dtype) -> None:
    plain = T.make_tensor((2, 3, 4, 5), dtype, seed=3, scale=2.0)
    for layout in T.LAYOUTS:
        tensor = T.make_tensor((2, 3, 4, 5), dtype, layout=layout, seed=3, scale=2.0)
        assert torch.equal(tensor, plain), layout
        assert tensor.dtype == dtype
        assert tensor.is_leaf


def test_a_map_of_one_channel_is_in_either_format_and_not_channels_last() -> None:
    assert is_channels_last(T.make_tensor((2, 3, 4, 5), layout="channels_last"))
    for shape in ((2, 3, 4, 5), (2, 1, 4, 5), (3, 4)):
        assert not is_channels_last(torch.ones(shape))


def test_layouts_are_what_they_say() -> None:
    shape = (2, 3, 4, 5)
    assert T.make_tensor(shape).is_contiguous()
    last = T.make_tensor(shape, layout="channels_last")
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    sliced = T.make_tensor(shape, layout="sliced")
    assert sliced.stride(-1) == 2
    assert not sliced.is_contiguous()
    # What lies beside the elements is NaN.
    between = torch.as_strided(sliced, (2,), (1,), sliced.storage_offset())
    assert torch.isnan(between[1])
    misaligned = T.make_tensor(shape, layout="misaligned")
    assert misaligned.is_contiguous()
    assert misaligned.data_ptr() % 16 == misaligned.element_size()


def test_make_tensor_seeds_and_rejects() -> None:
    assert not torch.equal(T.make_tensor((9,), seed=1), T.make_tensor((9,), seed=2))
    assert T.make_tensor((2, 2), requires_grad=True, layout="sliced").requires_grad
    assert T.make_tensor((0, 3, 4, 4), layout="sliced").shape == (0, 3, 4, 4)
    with pytest.raises(ValueError, match="layout is 'diagonal'"):
        T.make_tensor((3,), layout="diagonal")
    with pytest.raises(ValueError, match="4 dimensions"):
        T.make_tensor((3, 4), layout="channels_last")


@pytest.mark.unpoisoned
def test_poisoned_empty_fills_and_restores() -> None:
    with T.poisoned_empty():
        assert torch.isnan(torch.empty(1000)).all()
        assert torch.isnan(torch.empty_like(torch.zeros(30, dtype=torch.float16))).all()
        assert torch.isnan(torch.zeros(3).new_empty((4, 5))).all()
        assert (torch.empty(10, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), T.poisoned_empty():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_guard_bands_catch_a_write_on_either_side() -> None:
    original = T.make_tensor((3, 5))
    with T.guarded(original, torch.zeros(7, dtype=torch.uint8)) as (out, other):
        assert torch.equal(out, original)
        assert out.data_ptr() % 64 == 0
        out.fill_(1)
        other.fill_(2)
    with (
        pytest.raises(AssertionError, match=r"tensor 0: memory after .* offset 60"),
        T.guarded(original) as (out,),
    ):
        torch.as_strided(out, (16,), (1,))[15] = 1.0
    with (
        pytest.raises(AssertionError, match=r"tensor 1: memory before .* offset -1"),
        T.guarded(original, original) as (_, out),
    ):
        torch.as_strided(out, (1,), (1,), out.storage_offset() - 1)[0] = 1.0


# ------------------------------------------------------------------------------- whole operators


@pytest.mark.parametrize("layout", T.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_check_operator_accepts_the_reference_itself(dtype: torch.dtype, layout: str) -> None:
    results = T.check_operator(
        "linear",
        as_operator(linear),
        linear,
        inputs_of(dtype, layout=layout),
        gradients="subsets",
        repeats=1,
    )
    # One forward alone, and for each of 7 subsets an output and its gradients (12 in all).
    assert len(results) == 1 + 7 + 12


def test_check_operator_accepts_another_order_of_summation() -> None:
    def permuted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        order = torch.arange(x.shape[1] - 1, -1, -1)
        return linear(x[:, order].contiguous(), weight[:, order].contiguous(), bias)

    for dtype in (torch.float32, torch.float64):
        T.check_operator("permuted", as_operator(permuted), linear, inputs_of(dtype))


def test_check_operator_leaves_out_what_is_none_and_keeps_aliases() -> None:
    values = inputs_of()
    values["bias"] = None
    T.check_operator("linear", as_operator(linear), linear, values, gradients="subsets")

    def product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        assert q is k
        return q * k

    x = T.make_tensor((4, 5))
    T.check_operator("product", as_operator(product), product, {"q": x, "k": x})


class Faulty(torch.autograd.Function):
    """A convolution whose backward forgets one output channel's share."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x, weight), grad = ctx.saved_tensors, grads[0]
        gx = torch.nn.functional.conv_transpose2d(grad, weight)
        gw = torch.einsum("nohw,nihw->oi", grad, x)[..., None, None].clone()
        gw[:, 2] = 0
        return gx, gw, grad.sum((0, 2, 3))


def write_into_input(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    result = linear(x, **kwargs)
    with torch.no_grad():
        x += 1
    return result


def leave_a_hole(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    result = torch.empty(x.shape[0], kwargs["weight"].shape[0], *x.shape[2:])
    result[:, :, 1:] = linear(x, **kwargs)[:, :, 1:]
    return result


def change_last_bit_sometimes(calls: list[int] = [], **kwargs: Any) -> torch.Tensor:  # noqa: B006
    calls.append(1)
    result = linear(**kwargs)
    return result if len(calls) % 3 else torch.nextafter(result, torch.tensor(math.inf))


FAULTS = {
    "wrong value": (lambda **k: linear(**k) * 1.001, "error too large"),
    "wrong gradient": (lambda x, weight, bias: Faulty.apply(x, weight, bias), "gradient weight"),
    "wrong dtype": (lambda **k: linear(**k).double(), "dtype"),
    "wrong shape": (lambda **k: linear(**k)[:, :, 1:], "shape"),
    "modified input": (write_into_input, "the input x was modified"),
    "unwritten output": (leave_a_hole, "NaN"),
    "wrong memory format": (
        lambda **k: linear(**k).contiguous(memory_format=torch.channels_last),
        "must be",
    ),
    "unstable": (change_last_bit_sometimes, "differs from run"),
    "other outputs": (lambda **k: (linear(**k), linear(**k)), "lacks"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_operator_finds(fault: str) -> None:
    function, message = FAULTS[fault]
    values = inputs_of()
    with pytest.raises(AssertionError, match=message):
        T.check_operator(
            "faulty",
            as_operator(function),
            linear,
            values,
            gradients=None if fault == "unstable" else "together",
            repeats=8,
        )


def test_check_operator_runs_autocast() -> None:
    T.check_operator(
        "linear", as_operator(linear), linear, inputs_of(), autocast=torch.bfloat16, gradients=None
    )
    with pytest.raises(AssertionError, match="error too large"):
        T.check_operator(
            "wrong",
            as_operator(lambda **k: linear(**k) * 1.1),
            linear,
            inputs_of(),
            autocast=torch.bfloat16,
        )


def test_check_operator_rejects_bad_requests() -> None:
    with pytest.raises(ValueError, match="gradients is 'all'"):
        T.check_operator("x", as_operator(linear), linear, inputs_of(), gradients="all")
    with pytest.raises(ValueError, match="choose among"):
        T.check_operator("x", as_operator(linear), linear, inputs_of(), gradients=[("y",)])
    with pytest.raises(ValueError, match="no tensor"):
        T.check_operator("x", as_operator(linear), linear, {"x": None})


def test_rounding_is_never_nothing_by_luck() -> None:
    """0.25 + 0.3 - 0.3 is exactly 0.25 in float32; a sum that ends at 0.25 has been rounded."""
    lucky = torch.tensor([0.25], dtype=torch.float64)
    assert (lucky.float() + 0.3) - 0.3 == lucky.float()
    assert T.rounding_error(lucky, torch.float32) == pytest.approx(0.25 * 2**-25)
    many = torch.randn(1000, dtype=torch.float64)
    assert T.rounding_error(many, torch.float32) > float(many.abs().max()) * 2**-26
    assert T.rounding_error(torch.tensor([torch.inf]), torch.float32) == 0
