"""Read a file of weights, recognise which network and which naming it is, build that network.

Understood, each with or without the ``module.`` of DataParallel:

========================= ========================================================================
ELAN, official            bare state dict, or a training checkpoint ``{epoch, model_state_dict}``;
                          either form of the shift convolution (one-hot kernel, masked 3x3)
ELAN, FriedRiceLab        ``{'params': ...}`` with ``modules_lfe.0.lfe.0.{weight,bias,mask}``
ELAN, traiNNer-redux      as official without ``sub_mean`` and ``add_mean``; input in 0..1
MAFDN                     this package's, with the DO-Convs folded or not, or a training checkpoint
                          of :mod:`sr_kernels.models.training` (its averaged weights are taken)
========================= ========================================================================

Files are those of ``torch.save`` and safetensors, told apart by content. Nothing in a file is
ever executed: ``torch.load(weights_only=True)`` refuses pickles that would run code.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .elan import ELAN
from .mafdn import MAFDN, Attention

__all__ = ["CheckpointError", "UnknownNetworkError", "load_checkpoint"]

State = dict[str, Tensor]
Source = Path | str  # what error messages begin with

# A training checkpoint keeps the weights under one of these; averaged ones are the better ones.
_CONTAINERS = ("params_ema", "ema", "params", "model_state_dict", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A file of weights that cannot be used; the message says why, and what would be accepted."""


class UnknownNetworkError(CheckpointError):
    """The weights are of a network that this package does not have."""


def load_checkpoint(
    path: str | PathLike[str],
    backend: str | None = None,
    *,
    map_location: str | torch.device = "cpu",
    window_sizes: Sequence[int] | None = None,
) -> ELAN | MAFDN:
    """Build the network that the weights are for and load them, strictly.

    Architecture, scale and sizes are recognised from names and shapes; half-precision weights
    are widened to float32.

    Args:
        path: file of weights, see the head of this module for what is understood.
        backend: see :mod:`sr_kernels.backends`.
        map_location: device of the result.
        window_sizes: ELAN's windows. None: those that the file records (this package's training
            checkpoints and exported weights do, no others), else the paper's (4, 8, 16).

    Returns:
        The network in eval mode, MAFDN with its DO-Convs folded. ``scale`` and ``rgb_range`` say
        what it takes and gives.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, is of another network (then it is an
            :class:`UnknownNetworkError`), does not fit, or holds values that are not finite.
    """
    path = Path(path)
    model = from_content(read(path), path, window_sizes=window_sizes)
    model.backend = backend
    return model.to(map_location)


def from_content(
    content: Any, source: Source, *, window_sizes: Sequence[int] | None = None
) -> ELAN | MAFDN:
    """The network for what :func:`read` gives, in eval mode: the second half of loading.

    Args:
        content: a state dict, or a training checkpoint with one.
        source: what error messages begin with.
        window_sizes: as in :func:`load_checkpoint`.

    Raises:
        CheckpointError: as :func:`load_checkpoint`.
    """
    if window_sizes is None:
        window_sizes = _recorded_windows(content, source) or (4, 8, 16)
    try:
        state = _plain_names(checked_state(content, source), source)
        if _asks_for_much(state):
            with torch.device("meta"):  # costs no memory, but seconds of imports inside PyTorch
                _check_fit(_build(state, source, window_sizes), state, source)
        model = _build(state, source, window_sizes)
        load_strictly(model, state, source)
        if isinstance(model, MAFDN):
            model.fold()
    except CheckpointError:
        raise
    except (ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{source}: the weights' shapes fit no network: {reason}") from error
    return model.eval()


def _recorded_windows(content: Any, source: Source) -> list[int] | None:
    """What the configuration in a training checkpoint says of ELAN's windows."""
    for key in ("config", "options", "window_sizes"):
        content = content.get(key) if isinstance(content, Mapping) else None
    if content is None:
        return None
    sizes = list(content) if isinstance(content, (list, tuple)) else []
    if not sizes or not all(type(size) is int and 1 <= size <= 256 for size in sizes):
        raise CheckpointError(
            f"{source}: its window_sizes are {content!r}; expected a list of whole numbers 1..256"
        )
    return sizes


# ------------------------------------------------------------------------------------- reading


def read(path: Path) -> Any:
    """The content of the file: tensors in dicts, nothing that needs code to be unpacked.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or only by running code that it holds.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file; expected a file of weights")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _read_torch(path)
    if len(start) > 8 and start[8:9] == b"{":
        return _read_safetensors(path)
    raise CheckpointError(
        f"{path}: is neither a PyTorch checkpoint (torch.save) nor a safetensors file"
    )


def _read_torch(path: Path) -> Any:
    if _is_torchscript(path):
        raise CheckpointError(
            f"{path}: refused, since a TorchScript archive is a program; expected a file of plain "
            "tensors (its state_dict, saved with torch.save)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is not None:
            raise CheckpointError(
                f"{path}: refused, since unpacking it would run code ({name.group(1)}); expected a "
                "file of plain tensors"
            ) from error
        raise CheckpointError(f"{path}: is damaged, or not a PyTorch checkpoint") from error
    except Exception as error:
        # What a damaged stream makes the unpickler stumble over is arbitrary.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: is truncated or damaged ({reason})") from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:
        return False  # no archive, or a damaged one: torch.load will say so


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            windows = (file.metadata() or {}).get("window_sizes")
        tensors = load_file(path)
        if windows is None:
            return tensors
        return {"state_dict": tensors, "config": {"options": {"window_sizes": json.loads(windows)}}}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error})") from error


def _unwrap(content: Any, source: Source) -> dict[str, Any]:
    """The state dict inside a training checkpoint, without prefixes."""
    if isinstance(content, Mapping):
        for container in _CONTAINERS:
            if isinstance(content.get(container), Mapping):
                content = content[container]
                break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{source}: holds a {type(content).__name__} and no named weights; expected a state "
            f"dict, or a training checkpoint with one under {', '.join(map(repr, _CONTAINERS))}"
        )
    for name in content:
        if not isinstance(name, str):
            raise CheckpointError(
                f"{source}: {name!r} is a {type(name).__name__}; expected names of weights"
            )
    return without_prefixes(content)


def without_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same weights without what DataParallel and torch.compile put before every name."""
    state = dict(state)
    while state and any(all(name.startswith(p) for name in state) for p in _PREFIXES):
        state = {name.partition(".")[2]: value for name, value in state.items()}
    return state


def checked_state(content: Any, source: Source) -> State:
    """The state dict of a network that is known here, in float32, all finite.

    Raises:
        CheckpointError: it is of another network, or not such a state dict.
    """
    state = _unwrap(content, source)
    known = recognise(state) is not None
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise (CheckpointError if known else UnknownNetworkError)(
                f"{source}: {name!r} is a {type(value).__name__}; expected names and tensors only"
            )
    if not known:
        names = ", ".join(list(state)[:3])
        raise UnknownNetworkError(
            f"{source}: holds the weights of another network ({names}, ...); accepted are ELAN "
            "(names of its authors, FriedRiceLab or traiNNer-redux) and this package's MAFDN"
        )
    return {name: _checked(value.detach(), name, source) for name, value in state.items()}


# What networks count or look up with, the only integers among their tensors.
_INTEGERS = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index\w*)$")


def _checked(value: Tensor, name: str, source: Source) -> Tensor:
    """A weight as plain, finite float32; an integer that a network keeps, as it is."""
    if value.is_complex() or value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(
            f"{source}: {name} is {value.dtype}, {value.layout}; expected plain real tensors"
        )
    if value.numel() == 0:
        raise CheckpointError(f"{source}: {name} is empty, of shape {tuple(value.shape)}")
    check_stored(value, name, source)
    if not value.is_floating_point():
        if _INTEGERS.search(name):
            return value
        raise CheckpointError(f"{source}: {name} is {value.dtype}; expected floating-point weights")
    value = value.float()
    check_finite(value, name, source)
    return value


def check_stored(value: Tensor, name: str, source: Source) -> None:
    """Raises CheckpointError where the file does not hold every element of the tensor."""
    if value.device.type != "cpu" or value.layout != torch.strided:
        raise CheckpointError(
            f"{source}: {name} is a {value.device.type} tensor, {value.layout}; expected one with "
            "stored values"
        )
    # Strides of 0 let a small file hold a tensor that fills the memory once it is computed with.
    size, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if size > stored:
        raise CheckpointError(
            f"{source}: {name} has shape {tuple(value.shape)}, {size} bytes, of which {stored} are "
            "stored; expected a tensor stored in full"
        )


def check_finite(value: Tensor, name: str, source: Source) -> None:
    """Raises CheckpointError where a value is NaN or infinite."""
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{source}: {name} contains NaN or infinite values")


# --------------------------------------------------------------------------------------- names

_RENAMES = (
    (re.compile(r"^(head|tail)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"\.modules_(lfe|gmsa)\.(\d+)\."), r".modules_\1.\1_\2."),
    (re.compile(r"\.lfe\.0\.(weight|bias)$"), r".conv0.shift_conv.conv1x1.\1"),
    (re.compile(r"\.lfe\.2\.(weight|bias)$"), r".conv1.shift_conv.conv1x1.\1"),
    (re.compile(r"\.lfe\.0\.mask$"), r".conv0.shift_conv.weight"),
    (re.compile(r"\.lfe\.2\.mask$"), r".conv1.shift_conv.weight"),
)


_ELAN_MARK = "body.0.modules_lfe.lfe_0.conv0.shift_conv."
_MAFDN_MARK = "blocks.0.distill.0.weight"


def recognise(names: Iterable[str]) -> Literal["ELAN", "MAFDN"] | None:
    """Whose weights have these names (of any spelling, without prefixes)."""
    for name in names:
        if name == _MAFDN_MARK:
            return "MAFDN"
        if name.startswith("body.0.modules_lfe.") and _plain_name(name).startswith(_ELAN_MARK):
            return "ELAN"
    return None


def _plain_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _plain_names(state: State, source: Source) -> State:
    """ELAN under other names -> under the official ones; other state dicts as they are."""
    if recognise(state) != "ELAN":
        return state
    renamed = {_plain_name(name): value for name, value in state.items()}
    for name in [name for name in renamed if name.endswith(".shift_conv.m")]:
        _split_masked(renamed, name.removesuffix("m"), source)
    return renamed


def _split_masked(state: State, prefix: str, source: Source) -> None:
    """The official dense form, a masked 3x3 convolution, as one-hot kernel and 1x1 convolution."""
    mask = state.pop(prefix + "m")
    weight, bias = state.pop(prefix + "w", None), state.pop(prefix + "b", None)
    if weight is None or bias is None or weight.ndim != 4 or weight.shape != mask.shape:
        raise CheckpointError(f"{source}: {prefix}w, b and m do not form a masked 3x3 convolution")
    if not torch.equal(mask, mask[:1].expand_as(mask)):
        raise CheckpointError(f"{source}: {prefix}m differs between output channels; no shift does")
    state[prefix + "weight"] = mask[0].unsqueeze(1)
    state[prefix + "conv1x1.weight"] = (weight * mask).sum((2, 3), keepdim=True)
    state[prefix + "conv1x1.bias"] = bias


# ------------------------------------------------------------------------------------ building


def _build(state: State, source: Source, window_sizes: Sequence[int]) -> ELAN | MAFDN:
    if recognise(state) == "ELAN":
        return _build_elan(state, source, window_sizes)
    return _build_mafdn(state, source)


def _shape(state: State, name: str, source: Source, rank: int = 4) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"{source}: {name} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{source}: {name} has shape {shape}; expected {rank} dimensions")
    return shape


def _count(state: State, prefix: str, source: Source) -> int:
    """How many numbers follow ``prefix`` in the names: they must be 0, 1 ... without a gap."""
    matches = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in state)
    found = {int(match.group(1)) for match in matches if match}
    missing = next(i for i in range(len(found) + 1) if i not in found)
    if missing < len(found):
        raise CheckpointError(
            f"{source}: {prefix}{missing} is missing, though there is a {prefix}{max(found)}"
        )
    return len(found)


def _asks_for_much(state: State) -> bool:
    """Whether the network could be far larger than the file: a few small tensors can ask for one
    that fits no machine. In a file that fits, channels**2 per tensor is about 3 times its values.
    """
    head = state.get("head.0.weight", state.get("head.weight"))
    channels = 0 if head is None else head.shape[0] if head.ndim else 0
    return channels**2 * len(state) > 16 * sum(value.numel() for value in state.values())


def _require(state: State, names: Iterable[str], source: Source) -> None:
    """What two counts multiply to must be in the file before a network of that size is built."""
    for name in names:
        if name not in state:
            raise CheckpointError(f"{source}: {name} is missing")


def _scale(state: State, name: str, colors: int, source: Source) -> int:
    outputs = _shape(state, name, source)[0]
    scale = round((outputs / colors) ** 0.5)
    if scale < 1 or colors * scale * scale != outputs:
        raise CheckpointError(
            f"{source}: {name} has {outputs} output channels; expected {colors} * scale**2"
        )
    return scale


def _build_elan(state: State, source: Source, window_sizes: Sequence[int]) -> ELAN:
    channels, colors = _shape(state, "head.0.weight", source)[:2]
    first = _ELAN_MARK + "conv1x1.weight"
    blocks = _count(state, "body.", source)
    pairs = _count(state, "body.0.modules_lfe.lfe_", source)
    _count(state, "body.0.modules_gmsa.gmsa_", source)
    inside = first.removeprefix("body.0.modules_lfe.lfe_0.")
    _require(
        state,
        (f"body.{i}.modules_lfe.lfe_{j}.{inside}" for i in range(blocks) for j in range(pairs)),
        source,
    )
    norm = any(name.startswith(("sub_mean.", "add_mean.")) for name in state)
    rgb_range = 1.0
    if norm:  # the shift in the file says what white is: 255 unless someone trained in 0..1
        shift = state.get("add_mean.bias", state.get("sub_mean.bias"))
        rgb_range = 255.0 if shift is None or float(shift.abs().max()) > 1 else 1.0
    return ELAN(
        _scale(state, "tail.0.weight", colors, source),
        m_elan=blocks * pairs,
        c_elan=channels,
        n_share=pairs - 1,
        r_expand=_shape(state, first, source)[0] // channels,
        window_sizes=window_sizes,
        colors=colors,
        rgb_range=rgb_range,
        norm=norm,
    )


def _build_mafdn(state: State, source: Source) -> MAFDN:
    channels, colors = _shape(state, "head.weight", source)[:2]
    blocks = _count(state, "blocks.", source)
    branches = _count(state, "blocks.0.distill.", source)
    _require(
        state,
        (f"blocks.{i}.distill.{j}.weight" for i in range(blocks) for j in range(branches)),
        source,
    )
    attention: Attention = "branch"
    hidden = "blocks.0.channel.conv_du.0.weight"
    if "blocks.0.channel.0.conv_du.0.weight" in state:
        attention, hidden = "branch_channel", "blocks.0.channel.0.conv_du.0.weight"
    elif _shape(state, "blocks.0.pixel.0.conv.weight", source)[0] == channels:
        attention = "block"
    narrow, wide = _shape(state, hidden, source)[:2]
    model = MAFDN(
        _scale(state, "tail.weight", colors, source),
        channels=channels,
        num_blocks=blocks,
        branches=branches,
        attention=attention,
        reduction=_reduction(wide, narrow),
        colors=colors,
    )
    if not any(name.endswith(".D_diag") for name in state):
        model.fold()
    return model


def _reduction(wide: int, narrow: int) -> int:
    """A reduction r with ``max(wide // r, 1) == narrow``: 16 or 4 where they fit."""
    for r in (16, 4, *range(1, wide + 1)):
        if max(wide // r, 1) == narrow:
            return r
    raise ValueError(f"a channel attention of {wide} channels cannot have {narrow} hidden ones")


def _check_fit(model: nn.Module, state: State, source: Source) -> None:
    """Names and shapes of the file are exactly those of the network."""
    expected = model.state_dict()
    problems: list[tuple[str, Literal["missing", "unexpected", "of another shape"]]] = []
    problems += [(name, "missing") for name in expected if name not in state]
    problems += [(name, "unexpected") for name in state if name not in expected]
    problems += [
        (name, "of another shape")
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if problems:
        shown = ", ".join(f"{name} is {what}" for name, what in problems[:3])
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source}: does not fit {_kind(model)}: {shown}{more}")


def _kind(model: nn.Module) -> str:
    return f"{type(model).__name__} x{model.scale}"


def load_strictly(model: nn.Module, state: State, source: Source) -> None:
    """``state`` into ``model``; raises CheckpointError where names, shapes or values do not fit."""
    _check_fit(model, state, source)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{source}: does not fit {_kind(model)}: {reason}") from error
