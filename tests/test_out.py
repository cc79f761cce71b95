"""The inference operators' `out`: the same result in the memory given, and nothing beside it."""

import pytest
import torch

import sr_kernels
from sr_kernels.testing import bitwise_equal, guarded, make_tensor

C, SHAPE = 6, (2, 6, 16, 32)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def weight(rows, columns, seed):
    return make_tensor((rows, columns, 1, 1), seed=seed, scale=0.4)


X = make_tensor(SHAPE)
BLOCK = (weight(12, C, 1), make_tensor((12,), seed=2), weight(C, 12, 3), None)
ATTENTION = (weight(2 * C, C, 4), make_tensor((2 * C,), seed=5), weight(C, C, 6), None)
REUSE = (weight(C, C, 7), None, weight(C, C, 8), make_tensor((C,), seed=9))
WINDOWS = {"windows": (4, 8), "shifted": True}


def shift_conv_block(x, **options):
    return sr_kernels.shift_conv_block(x, *BLOCK, groups=5, **options)


def attention(x, **options):
    return sr_kernels.grouped_attention_block(x, *ATTENTION, **WINDOWS, **options)


def reuse(x, **options):
    backend = options.get("backend", "cpu")
    _, scores = attention(x, return_scores=True, backend=backend)
    return sr_kernels.apply_grouped_attention_block(scores, x, *REUSE, **options)


OPERATORS = [shift_conv_block, attention, reuse]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("given_layout", FORMATS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_result_is_in_out(operator, layout, given_layout, backend):
    x = X.contiguous(memory_format=FORMATS[layout])
    expected = operator(x, backend=backend)
    given = torch.full(SHAPE, torch.nan).contiguous(memory_format=FORMATS[given_layout])
    returned = operator(x, backend=backend, out=given)
    assert returned is given
    if given_layout == layout:
        assert bitwise_equal(given, expected)
    else:  # stored another way, tiles may be rounded another way
        torch.testing.assert_close(given, expected)


def test_nothing_beside_out_is_written():
    with guarded(torch.empty_like(X)) as (given,):
        shift_conv_block(X, out=given)
    with guarded(torch.empty_like(X), torch.empty_like(X)) as (given, queries):
        attention(X, return_scores=True, out=(given, queries))
    with guarded(torch.empty_like(X)) as (given,):
        reuse(X, out=given)


@pytest.mark.parametrize("layout", FORMATS)
def test_scores_keep_what_they_need_in_the_second(layout):
    x = X.contiguous(memory_format=FORMATS[layout])
    expected, wanted = attention(x, return_scores=True)
    given, queries = torch.empty_like(x), x.new_empty(SHAPE)
    y, scores = attention(x, return_scores=True, out=(given, queries))
    assert y is given
    assert scores.q is queries
    assert bitwise_equal(y, expected)
    later, earlier = (
        sr_kernels.apply_grouped_attention_block(s, x, *REUSE) for s in (scores, wanted)
    )
    assert bitwise_equal(later, earlier)


def test_opcheck():
    out, q = torch.empty_like(X), torch.empty_like(X)
    ops = torch.ops.sr_kernels
    torch.library.opcheck(ops.shift_conv_block_out.default, (X, *BLOCK, 1, 0.05, True, 0, 5, out))
    arguments = (X, *ATTENTION, [4, 8], True)
    torch.library.opcheck(ops.grouped_attention_block_out.default, (*arguments, out, q))
    torch.library.opcheck(ops.grouped_attention_block_out.default, (*arguments, out, None))
    _, scores = attention(X, return_scores=True)
    torch.library.opcheck(
        ops.apply_grouped_attention_block_out.default,
        (X, scores.q, *REUSE, [4, 8], True, out),
    )


def test_compiles_as_one_graph():
    given = torch.empty_like(X)
    compiled = torch.compile(shift_conv_block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(X, out=given)
    assert bitwise_equal(given, shift_conv_block(X))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (1.0, TypeError, "out must be a torch.Tensor"),
        (torch.empty(2, 6, 16, 16), ValueError, "out must have shape"),
        (torch.empty(SHAPE, dtype=torch.float64), TypeError, "out must have the dtype of x"),
        (
            torch.empty(2, 6, 32, 16).transpose(2, 3),
            ValueError,
            "out must be contiguous or channels_last",
        ),
        (X, ValueError, "out must not share its memory with x"),
    ],
)
def test_bad_out_is_named(operator, out, error, message):
    with pytest.raises(error, match=message):
        operator(X, out=out)


def test_a_pair_goes_with_scores():
    one = torch.empty_like(X)
    with pytest.raises(ValueError, match="return_scores=True, out must be a pair"):
        attention(X, return_scores=True, out=one)
    with pytest.raises(ValueError, match="return_scores=False, out must be one tensor"):
        attention(X, out=(one, one))
    with pytest.raises(ValueError, match=r"out\[1\] must have shape"):
        attention(X, return_scores=True, out=(one, one[:1]))


def test_gradients_are_refused():
    w0, b0, w1, b1 = BLOCK
    with pytest.raises(RuntimeError, match="shift_conv_block with out= is for inference"):
        sr_kernels.shift_conv_block(
            X, w0.clone().requires_grad_(), b0, w1, b1, out=torch.empty_like(X)
        )


def test_operators_check_what_they_are_given_directly():
    ops = torch.ops.sr_kernels
    with pytest.raises(RuntimeError, match="out must have shape"):
        ops.shift_conv_block_out(X, *BLOCK, 1, 0.05, True, 0, 5, torch.empty(2, 6, 16, 16))
    with pytest.raises(RuntimeError, match="q must be contiguous"):
        ops.grouped_attention_block_out(
            X,
            *ATTENTION,
            [4, 8],
            True,
            torch.empty_like(X),
            torch.empty(SHAPE).contiguous(memory_format=torch.channels_last),
        )
