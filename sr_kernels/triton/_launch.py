"""The way from an operator's tensors to a started kernel, and what the kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from sr_kernels.ops._registration import DECLARED

Tensor = torch.Tensor


@triton.jit
def _probe() -> None:
    pass


# Whether this process runs kernels in Triton's interpreter: decided when a kernel is decorated.
INTERPRET = not isinstance(_probe, JITFunction)
if INTERPRET and isinstance(tl.max, JITFunction):
    raise ImportError(
        "TRITON_INTERPRET was set after triton had been imported: set it before Python starts"
    )
_INTERPRET = tl.constexpr(INTERPRET)


def _repair_interpreter() -> None:
    """Loops over a range with bounds in tensors: the interpreter takes them for integers in a way
    that NumPy 2.4 refuses (int of an array of one element)."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, *rest: Any) -> None:
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair


if INTERPRET:
    _repair_interpreter()

# Tiles of matrix products are at least this in every dimension.
SMALLEST_TILE = 16
# Along the second and third axis of a grid: CUDA's limit.
MOST_PROGRAMS = 65535


def allocate(name: str, *arguments: Any) -> Any:
    """The outputs of operator ``name``, uninitialised: what its fake kernel makes."""
    return DECLARED[name].fake(*arguments)


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are needed, None for the others."""
    return [g if needed else None for g, needed in zip(gradients, needs, strict=True)]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Starts ``kernel`` on the device of the first tensor; does nothing on an empty grid."""
    if 0 in grid:
        return
    if max(grid[1:], default=0) > MOST_PROGRAMS:
        raise RuntimeError(
            f"the Triton kernels take at most {MOST_PROGRAMS} images or heads at once, and these "
            f"are {max(grid[1:])}: split the batch"
        )
    first = next(a for a in arguments if isinstance(a, torch.Tensor))
    with _surroundings(first):
        kernel[grid](*arguments, **compile_options(num_warps, num_stages), **constants)


def compile_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Products and sums are fused whatever the default of the installed Triton: 3.10 changes it."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def _surroundings(tensor: Tensor) -> AbstractContextManager[Any]:
    """The tensor's device; for the interpreter, quiet about log(0) in elements that masks drop."""
    if INTERPRET:
        return np.errstate(all="ignore")
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """A feature map's four strides, in elements; zeros where there is none."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def index_type(*tensors: Tensor | None) -> Any:
    """The integer type that offsets inside one image of each of these tensors need. Pixels are
    counted in 32 bits: RuntimeError for an image of more."""
    found = tl.int32
    for tensor in tensors:
        if tensor is None:
            continue
        if pixels(tensor) >= 2**31:
            raise RuntimeError(
                "the Triton kernels take images of fewer than 2^31 pixels, and this one has "
                f"{tensor.shape[2]} x {tensor.shape[3]}"
            )
        spans = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
        if sum((size - 1) * stride for size, stride in spans) >= 2**31 - 2**16:
            found = tl.int64
    return found


def precision() -> str:
    """How float32 products are formed: exactly, unless torch's own switch allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()


def tile(size: int, largest: int) -> int:
    """The side of a tile over ``size`` elements: a power of two, no larger than needed."""
    return min(max(SMALLEST_TILE, power_of_two(size)), largest)


def pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


# Device functions.


@triton.jit
def load(pointers, mask):
    """Elements in the dtype that products take, 0 where masked.

    The interpreter's product of bfloat16 tiles is wrong: there they become float32 here.
    """
    values = tl.load(pointers, mask=mask, other=0.0)
    if _INTERPRET and values.dtype == tl.bfloat16:
        values = values.to(tl.float32)
    return values


@triton.jit
def load_map(x, h, w, c, dy, dx, valid, H, W, s_c, s_h, s_w):
    """x[c, h + dy, w + dx], 0 outside the image and where not valid."""
    row = h + dy
    column = w + dx
    inside = valid & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return load(x + c * s_c + row * s_h + column * s_w, inside)


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """0 none, 1 relu, 2 leaky_relu, 3 gelu (erf), 4 silu; written so that NaN passes."""
    if ACTIVATION == 1:
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == 2:
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == 3:
        z = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 4:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def activation_derivative(z, slope, ACTIVATION: tl.constexpr):
    """d activate / dz; at z = 0 relu has 0 and leaky_relu has slope, as in torch."""
    if ACTIVATION == 1:
        d = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == 2:
        d = tl.where(z > 0, 1.0, slope)
    elif ACTIVATION == 3:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        d = cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == 4:
        s = tl.sigmoid(z)
        d = s * (1.0 + z * (1.0 - s))
    else:
        d = tl.full(z.shape, 1.0, tl.float32)
    return d


@triton.jit
def sum_kernel(
    partials,
    out,
    count,
    size,
    BLOCK: tl.constexpr,
):
    """out[i] = sum over k < count of partials[k, i], in the order of k: the second stage of a
    deterministic sum."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(count):
        total += tl.load(partials + tl.cast(k, tl.int64) * size + i, mask=i < size, other=0.0)
    tl.store(out + i, total, mask=i < size)


def sum_partials(partials: Tensor, out: Tensor) -> None:
    """out = partials.sum(0), in a fixed order."""
    size, block = out.numel(), 128
    grid = (triton.cdiv(size, block),)
    launch(sum_kernel, grid, partials, out, partials.shape[0], size, BLOCK=block)
