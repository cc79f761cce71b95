"""The network that a command runs: which weights, on which device, with which backend."""

from __future__ import annotations

import argparse
import os
import warnings
from collections import Counter
from typing import Any

import torch

from sr_kernels.cli import console
from sr_kernels.cli.errors import Failure, UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
DEFAULT_MODEL = "mafdn"
DEFAULT_SCALE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (a CUDA GPU if there is one), cpu, cuda, cuda:1, ...",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="type of the activations; the narrow ones save memory, but on a CPU they are slower "
        "(default: float32)",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="which kernels; one named here is used or the run ends with the reason why it cannot "
        "be (default: auto, the fastest that is there; see `sr-kernels env`)",
    )


def load(
    *,
    model: str | None,
    scale: int | None,
    weights: str | None,
    device: str,
    dtype: str,
    backend: str,
) -> Any:
    """The network, in eval mode on its device; on the CPU its plan, which gives the same picture in
    less time, unless the reference is asked for. Raises UsageError and Failure."""
    import sr_kernels.models as models
    from sr_kernels import backends

    place, chosen = where(device, backend)
    network = (
        load_shipped(model, scale, chosen)
        if weights is None
        else load_file(weights, model, scale, chosen)
    )
    supports = getattr(network, "supports", None)
    if supports is not None and not supports(DTYPES[dtype]):
        raise UsageError(f"--dtype {dtype}: {name_of(network)} does not work in it, says spandrel")
    network = network.to(place, DTYPES[dtype]).eval()
    if chosen is not None:
        network.backend = chosen
    wanted = chosen or backends.current_backend()
    plannable = isinstance(network, (models.ELAN, models.MAFDN))
    if plannable and place.type == "cpu" and wanted != "reference":
        network = models.plan(network)
    return network


def where(device: str, backend: str) -> tuple[torch.device, str | None]:
    """(device, backend or None for auto) that the two options ask for; UsageError and Failure where
    this machine does not have them."""
    place = _device(device, backend)
    chosen = None if backend == "auto" else backend
    _check_environment(place, chosen)
    if chosen is not None:
        _check_backend(chosen)
    return place, chosen


def describe(network: Any) -> str:
    """The backend that the network's operators run on, for the user: "cpu (avx512)"."""
    from sr_kernels import backends

    if not getattr(network, "patched", True):
        return "stock PyTorch"
    parameter = next(network.parameters(), torch.empty(0))
    probe = torch.empty(1, 3, 1, 1, device=parameter.device, dtype=parameter.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is announced by the run itself
        names = {
            backends.choose(op, [probe], getattr(network, "backend", None))
            for op in ("shift_conv2d", "grouped_window_attention", "pixel_attention")
        }
    if names == {"cpu"}:
        return f"cpu ({backends.cpu_capability()})"
    return " and ".join(sorted(names))


def name_of(network: Any) -> str:
    """ "MAFDN x4" """
    return f"{getattr(network, 'name', type(network).__name__)} x{network.scale}"


def _device(name: str, backend: str) -> torch.device:
    if name == "auto":
        use_gpu = torch.cuda.is_available() and backend != "cpu"
        return torch.device("cuda" if use_gpu else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda":
        if backend == "cpu":
            raise UsageError("--backend cpu runs on the CPU, but --device says cuda")
        if not torch.cuda.is_available():
            why = (
                "this torch is a build without CUDA"
                if torch.version.cuda is None
                else "torch finds no CUDA GPU (driver missing, or CUDA_VISIBLE_DEVICES hides it)"
            )
            raise Failure(f"--device {name}: {why}; `sr-kernels env` tells more")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise Failure(
                f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0"
            )
    elif backend == "cuda":
        raise UsageError("--backend cuda runs on a CUDA GPU, but --device says cpu")
    return device


def _check_environment(place: torch.device, chosen: str | None) -> None:
    """Wrong environment variables are told here, once, and not picture by picture."""
    from sr_kernels import backends

    try:
        wanted = chosen or backends.current_backend()
    except ValueError as error:
        raise Failure(str(error)) from error
    if place.type == "cpu" and wanted != "reference":
        try:
            backends.cpu_capability()
        except RuntimeError as error:
            value = os.environ.get("SR_KERNELS_CPU_ISA")
            raise Failure(f"{error}; got {value!r}") from error
    if chosen is None and wanted != "auto":
        _check_backend(wanted, " (SR_KERNELS_BACKEND asks for it)")


def _check_backend(name: str, origin: str = "") -> None:
    from sr_kernels import backends

    for row, available, reason in backends.report():
        if row == name and not available:
            raise Failure(f"the backend {name}{origin} is not available: {reason}")


def load_shipped(model: str | None, scale: int | None, backend: str | None) -> Any:
    import sr_kernels.models as models

    wanted = model or DEFAULT_MODEL
    shipped = models.PRETRAINED
    names = ", ".join(sorted(shipped)) or "none"
    if wanted in shipped:
        key = wanted
    else:
        key = f"{wanted}_x{scale or DEFAULT_SCALE}"
        if key not in shipped:
            raise UsageError(
                f"no weights come with the package for {key} (--model {wanted} --scale "
                f"{scale or DEFAULT_SCALE}); they do for: {names}. Others are given with --weights"
            )
    try:
        network = models.load_pretrained(key, backend=backend)
    except (OSError, models.CheckpointError) as error:
        raise Failure(f"the weights {key} cannot be loaded: {error}") from error
    if scale is not None and network.scale != scale:
        raise UsageError(f"--model {wanted} is for x{network.scale}, but --scale says {scale}")
    return network


def load_file(path: str, model: str | None, scale: int | None, backend: str | None) -> Any:
    import sr_kernels.models as models

    try:
        try:
            network: Any = models.load_checkpoint(path, backend=backend)
        except models.UnknownNetworkError as error:
            network = _load_with_spandrel(path, error, backend)
    except FileNotFoundError as error:
        raise Failure(f"the weights {path} do not exist") from error
    except OSError as error:
        raise Failure(f"the weights {path} cannot be read: {error.strerror or error}") from error
    except models.CheckpointError as error:
        raise Failure(f"the weights {path} cannot be used: {error}") from error
    if scale is not None and network.scale != scale:
        raise UsageError(f"the weights {path} are for x{network.scale}, but --scale says {scale}")
    if model is not None:
        kind = _family(getattr(network, "name", type(network).__name__))
        if not (_family(model).startswith(kind) or kind.startswith(_family(model))):
            raise UsageError(f"the weights {path} are {kind}, but --model says {model}")
    return network


def _load_with_spandrel(path: str, unknown: Exception, backend: str | None) -> Any:
    """A network that is none of ours, patched; says what was replaced."""
    from sr_kernels import FallbackWarning

    try:
        import sr_kernels.spandrel as ours
    except ImportError as error:
        raise Failure(
            f"the weights {path} cannot be used: {unknown}. spandrel knows many more, but {error}"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the networks' own code is told by torch
        warnings.simplefilter("default", FallbackWarning)
        descriptor, report = ours.load(path)
    try:
        network = ours.Network(descriptor, report)
    except ValueError as error:
        raise Failure(f"the weights {path} cannot be used: {error}") from error
    replaced = Counter(entry.class_name for entry in report.entries if entry.replaced_by)
    if backend not in (None, "reference") and not replaced:
        raise Failure(
            f"--backend {backend}: {network.name} has no layer that sr_kernels has kernels for"
        )
    layers = ", ".join(f"{count} {name}" for name, count in replaced.most_common()) or "no layer"
    console.note(f"{path} is {name_of(network)}, by spandrel; replaced by our kernels: {layers}")
    return network


def _family(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
