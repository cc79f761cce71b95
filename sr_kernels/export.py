"""ONNX files of networks that use our operators."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sr_kernels import backends
from sr_kernels._files import temporary_name

__all__ = ["export_onnx"]

OPSET = 18
# Largest difference that is accepted, relative to the largest output.
VERIFY_TOLERANCE = 1e-4


def export_onnx(
    model: nn.Module,
    sample: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = False,
    verify: bool = True,
) -> Path:
    """Write the network as an ONNX file of standard operators, and try it in ONNX Runtime.

    Our operators are written as their definitions in plain PyTorch (the reference backend), so the
    file needs nothing of this package. By tracing: for these networks that takes seconds where
    torch's other exporter takes minutes.

    Args:
        model: a network of one image: one of ours, a plan of one, or a patched one. Exported as it
            is in eval mode; not changed.
        sample: an input, (N, C, H, W). Its values matter only for ``verify``: take a picture.
        path: the file to write; it appears whole or not at all.
        dynamic: whether the file takes images of other heights and widths as well; otherwise of
            the sample's alone, which runtimes can optimise better.
        verify: run the file in ONNX Runtime and compare with ``model`` on the sample (with
            ``dynamic`` also on two by two of it): the largest difference must be at
            most 1e-4 of the largest output.

    Returns:
        ``path``.

    Raises:
        ImportError: onnx, or for ``verify`` onnxruntime, is not installed.
        TypeError: ``model`` is no module, ``sample`` no tensor, or the output is no single one.
        ValueError: ``sample`` has not four dimensions.
        RuntimeError: torch cannot export the network, or the file computes something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a tensor, got {type(sample).__name__}")
    if sample.dim() != 4:
        raise ValueError(f"sample must be (N, C, H, W), got shape {tuple(sample.shape)}")
    _require("onnx")
    if verify:
        _require("onnxruntime")
    path = Path(path)
    partial = temporary_name(path)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in twin.modules():
        if getattr(layer, "backend", None) in backends.BACKENDS:
            layer.backend = None  # type: ignore[assignment]
    sizes = {2: "height", 3: "width"}
    try:
        with _silent(), torch.no_grad(), backends.use_backend("reference"):
            try:
                torch.onnx.export(
                    twin,
                    (sample,),
                    str(partial),
                    dynamo=False,
                    opset_version=OPSET,
                    input_names=["input"],
                    output_names=["output"],
                    dynamic_axes={"input": sizes, "output": sizes} if dynamic else None,
                )
            except Exception as error:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                name = type(model).__name__
                raise RuntimeError(f"torch cannot export {name} to ONNX: {reason}") from error
        if verify:
            _compare(twin, sample, partial)
            if dynamic:
                _compare(twin, sample.repeat(1, 1, 2, 2), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _require(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs {package} ({error}): pip install 'sr_kernels[onnx]'", name=package
        ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter talks much; what matters comes as an exception."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@torch.no_grad()
def _compare(model: nn.Module, x: Tensor, file: Path) -> None:
    import onnxruntime

    expected = model(x)
    if not isinstance(expected, Tensor):
        raise TypeError(f"model returns a {type(expected).__name__}; expected one tensor")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"input": x.cpu().numpy()})[0])
    expected = expected.cpu()
    if found.shape != expected.shape:
        raise RuntimeError(
            f"the ONNX file gives shape {tuple(found.shape)} for input {tuple(x.shape)}; the model "
            f"gives {tuple(expected.shape)}"
        )
    difference = float((found.double() - expected.double()).abs().max())
    allowed = VERIFY_TOLERANCE * float(expected.double().abs().max())
    if not difference <= allowed:
        raise RuntimeError(
            f"the ONNX file differs from the model by {difference:.3g} on an input of shape "
            f"{tuple(x.shape)}; accepted is {allowed:.3g}"
        )
