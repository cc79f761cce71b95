"""Which implementation of an operator runs, and why the others did not.

Backends, in the order in which ``auto`` tries them:

========== =====================================================================
cuda       hand-written CUDA kernels (``_C_cuda``), for CUDA tensors
triton     Triton kernels, for GPU tensors; by name also for CPU tensors under
           Triton's interpreter (``TRITON_INTERPRET=1``)
cpu        SIMD C++ kernels (``_C``), for CPU tensors
reference  plain PyTorch, anywhere: the definition of every operator
========== =====================================================================

``auto`` takes the first that can run the call and warns, once per reason, when it has to fall back
to ``reference``. A backend that is asked for by name, as an argument, with :func:`use_backend` or
through the environment variable ``SR_KERNELS_BACKEND`` (read once, at import; a wrong value is
refused where it is first needed), raises instead of falling back.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from sr_kernels import _library

BACKENDS = ("cuda", "triton", "cpu", "reference")

_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}

# What the tiles of a backend's attention kernels have room for (csrc/window_attention/launch.cu).
_MOST_HEAD_CHANNELS = {"cuda": 128}

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_in_graphs(function: _F) -> _F:
    """A decorator: traced code takes what ``function`` answers as a constant.

    It does what torch.compiler.assume_constant_result does, without importing torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# What the CPU alone has: a block whose parts patched networks on a GPU run, and two parts of
# training that no layer calls on a GPU.
_ONLY_ON_CPU = frozenset(
    {
        "linear_attention_block",
        "channel_moments_joint_backward",
        "grouped_window_attention_joint_backward",
    }
)
# What the compiled libraries alone have. No layer calls channel_moments on a GPU, where BatchNorm
# in training is torch's.
_NOT_IN_TRITON = _ONLY_ON_CPU | {"channel_moments"}


class FallbackWarning(UserWarning):
    """``auto`` had to take the reference implementation; the message says why."""


def _checked(name: str | None, source: str) -> str:
    if name is None:
        return "auto"
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


# Checked in current_backend, not here: `sr-kernels env` must be able to say that it is wrong.
_preference = os.environ.get("SR_KERNELS_BACKEND") or "auto"
_warned: set[str] = set()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, operators that were not given a backend use this one.

    The choice belongs to the process, not to the thread. The backward pass uses the backend of
    its forward.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"reference"``, or ``"auto"`` (None: auto).

    Raises:
        ValueError: another name, or another one in ``SR_KERNELS_BACKEND``.
    """
    global _preference
    previous = current_backend()
    _preference = _checked(name, "name")
    try:
        yield
    finally:
        _preference = previous


def current_backend() -> str:
    """The backend that calls without an argument of their own ask for.

    Raises:
        ValueError: ``SR_KERNELS_BACKEND`` is not the name of one.
    """
    # What use_backend sets is right: only the environment can have brought a wrong name.
    return _checked(_preference, "SR_KERNELS_BACKEND")


def can_run(
    backend: str, op: str, tensors: Sequence[torch.Tensor], *, head_channels: int = 0
) -> tuple[bool, str]:
    """Whether ``backend`` can run operator ``op`` on these tensors, and if not, why.

    One predicate serves the choice, the error message and whoever wants to ask beforehand.

    Args:
        backend: one of :data:`BACKENDS`.
        op: the operator's name, such as ``"shift_conv2d"``.
        tensors: the call's feature maps (weights need not be listed: they must match anyway).
        head_channels: of attention, the most channels that a head has in q or v; 0: not known.

    Returns:
        ``(True, "")`` or ``(False, reason)``.
    """
    if backend == "reference":
        return True, ""
    if backend == "triton" and op in _NOT_IN_TRITON:
        return False, f"{op} has no Triton kernel"
    if backend == "cuda" and op in _ONLY_ON_CPU:
        return False, f"{op} has no CUDA kernel"
    device = tensors[0].device.type
    if backend == "triton":
        reason = _why_no_triton(device)
    else:
        library = _library.CPU_LIBRARY if backend == "cpu" else _library.CUDA_LIBRARY
        if not library.loaded:
            reason = str(library.error)
        elif device != backend:
            reason = f"the tensors are on {device}, backend {backend!r} needs {backend} tensors"
        else:
            reason = _why_no_cuda(tensors[0].device.index) if backend == "cuda" else ""
    if reason:
        return False, reason
    for tensor in tensors:
        if tensor.dtype not in _DTYPES[backend]:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[backend])
            return False, f"dtype {tensor.dtype} is not supported ({backend} has {accepted})"
        if tensor.device.type != device:
            return False, f"tensors on different devices: {device} and {tensor.device.type}"
    most = _MOST_HEAD_CHANNELS.get(backend, head_channels)
    if head_channels > most:
        return False, f"{backend} has attention heads of up to {most} channels, not {head_channels}"
    return True, ""


@constant_in_graphs  # an import cannot be traced
def _why_no_cuda(index: int | None) -> str:
    """Why the CUDA kernels cannot run on this GPU, or nothing."""
    return _library.why_no_image(index)


@constant_in_graphs
def _why_no_triton(device: str) -> str:
    """Why Triton's kernels cannot run on tensors of this device, or nothing."""
    if device not in ("cuda", "cpu"):
        return f"the tensors are on {device}, backend 'triton' needs GPU tensors"
    triton = _library.triton()
    if not triton.loaded:
        return str(triton.error)
    if device == "cpu" and not triton.interpreted:
        return (
            "the tensors are on cpu, and Triton's kernels run there only in Triton's interpreter: "
            "start Python with TRITON_INTERPRET=1"
        )
    return "" if device == "cpu" else _library.why_no_launch()


# On a GPU `auto` takes torch's own convolution for these: a library tuned for each GPU, which no
# kernel of this package has been measured against. By name they run.
_TORCHS_OWN_ON_GPU = frozenset({"conv3x3"})


def choose(
    op: str,
    tensors: Sequence[torch.Tensor],
    backend: str | None = None,
    *,
    head_channels: int = 0,
) -> str:
    """The backend that runs this call.

    Args:
        op: the operator's name.
        tensors: the call's feature maps.
        backend: the call's own wish; None takes :func:`current_backend`.
        head_channels: as in :func:`can_run`.

    Raises:
        ValueError: an unknown backend name, here or in ``SR_KERNELS_BACKEND``.
        RuntimeError: a backend asked for by name that cannot run this call; says why.
    """
    wanted = current_backend() if backend is None else _checked(backend, "backend")
    if wanted != "auto":
        ok, reason = can_run(wanted, op, tensors, head_channels=head_channels)
        if not ok:
            raise RuntimeError(f"backend {wanted!r} cannot run {op}: {reason}")
        return wanted
    if tensors[0].is_cuda and op in _TORCHS_OWN_ON_GPU:
        return "reference"
    reasons = []
    for native in ("cuda", "triton") if tensors[0].is_cuda else ("cpu",):
        ok, reason = can_run(native, op, tensors, head_channels=head_channels)
        if ok:
            return native
        reasons.append(reason)
    if not torch.compiler.is_compiling():
        warn_once(f"{op} runs on the reference implementation: {'; '.join(reasons)}")
    return "reference"


def operators(backend: str) -> Any:
    """Where the operators of a backend that `choose` returned live: ``torch.ops.<namespace>``."""
    return torch.ops.sr_kernels_triton if backend == "triton" else torch.ops.sr_kernels


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=4)


def cpu_capability() -> str:
    """``portable``, ``avx2`` or ``avx512``: the copy of the CPU kernels in use; ``none`` without.

    Raises:
        RuntimeError: ``SR_KERNELS_CPU_ISA`` asks for one that cannot run here.
    """
    return _library.cpu_isa() or "none"


def _triton_report() -> tuple[bool, str]:
    triton = _library.triton()
    if not triton.loaded:
        return False, str(triton.error)
    if triton.interpreted:
        return True, f"Triton {triton.version}, interpreted (TRITON_INTERPRET): by name, and slow"
    if torch.cuda.is_available():
        reason = _library.why_no_launch()
        return not reason, f"Triton {triton.version}" + (f": {reason}" if reason else "")
    return False, (
        f"Triton {triton.version} is installed, but torch sees no GPU (TRITON_INTERPRET=1 runs the "
        "kernels in Triton's interpreter)"
    )


def report() -> list[tuple[str, bool, str]]:
    """``(backend, available, detail)`` for each backend: what ``sr-kernels env`` prints."""
    rows: list[tuple[str, bool, str]] = []
    if not _library.CUDA_LIBRARY.loaded:
        rows.append(("cuda", False, str(_library.CUDA_LIBRARY.error)))
    elif not torch.cuda.is_available():
        rows.append(("cuda", False, "_C_cuda is loaded, but torch sees no CUDA device"))
    else:
        reason = _library.why_no_image(None)
        rows.append(("cuda", not reason, reason or "compiled kernels"))
    rows.append(("triton", *_triton_report()))
    if _library.CPU_LIBRARY.loaded:
        try:
            rows.append(("cpu", True, f"{cpu_capability()} kernels"))
        except RuntimeError as error:
            rows.append(("cpu", False, str(error)))
    else:
        rows.append(("cpu", False, str(_library.CPU_LIBRARY.error)))
    rows.append(("reference", True, "plain PyTorch"))
    return rows
