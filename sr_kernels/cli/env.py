"""`sr-kernels env`: what runs here, and why the rest does not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from sr_kernels.cli import console

NAME = "env"
SUMMARY = "say what runs here: build, backends, CPU, GPU, versions"
DESCRIPTION = """\
Say what runs here: versions, how the package was built, which backends can be used and why another
cannot, the CPU's and GPU's abilities, and the environment variables that are understood. Put its
output into a bug report.
"""
EPILOG = ""

# The CPU flags that decide which copy of the kernels runs, or that a reader may look for.
_CPU_FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c"),
    *("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "asimd", "asimdhp", "sve"),
)
_VARIABLES = (
    ("SR_KERNELS_BACKEND", "backend of calls that name none: auto, cuda, triton, cpu, reference"),
    ("SR_KERNELS_TRITON_CONFIGS", "folder with tuned tiles of the Triton kernels"),
    ("TRITON_INTERPRET", "1: the Triton kernels run in Triton's interpreter, on CPU tensors too"),
    ("SR_KERNELS_CPU_ISA", "copy of the CPU kernels: portable, avx2, avx512"),
    ("OMP_NUM_THREADS", "threads of the CPU kernels (torch's pool)"),
    ("VIPS_CONCURRENCY", "threads for compressing pictures"),
    ("CUDA_VISIBLE_DEVICES", "GPUs that torch may see"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""


def run(arguments: argparse.Namespace) -> int:
    for title, rows in (
        ("versions", _versions()),
        ("build", _build()),
        ("backends", _backends()),
        ("weights that come with the package", _weights()),
        ("CPU", _cpu()),
        ("GPU", _gpu()),
        ("environment variables", _environment()),
    ):
        console.say(title)
        listed = list(rows)
        width = max(len(name) for name, _ in listed)
        for name, value in listed:
            console.say(f"  {name:<{width}}  {value}")
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    from sr_kernels._version import __version__

    yield "sr_kernels", f"{__version__} ({Path(__file__).resolve().parents[1]})"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})"
    for package in ("triton", "numpy", "pillow", "pyvips", "safetensors"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    try:
        from sr_kernels.cli import images

        vips = images.vips()
        yield "libvips", ".".join(str(vips.version(part)) for part in range(3))
    except images.ImageError as error:
        yield "libvips", str(error)


def _build() -> Iterator[tuple[str, str]]:
    file = Path(__file__).resolve().parents[1] / "_build.json"
    try:
        build = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        from sr_kernels import _library

        if not _library.CPU_LIBRARY.loaded and not file.exists():
            yield "compiled libraries", "none: a pure Python installation (SR_KERNELS_BUILD=0)"
        else:
            yield "compiled libraries", f"no record of a build ({file.name}: {error})"
        return
    yield "built with", f"torch {build.get('torch')}, {build.get('compiler')}"
    yield "CPU kernels for", ", ".join(build.get("isas", ())) or "none"
    if build.get("sanitizers"):
        yield "sanitizers", build["sanitizers"]
    cuda = build.get("cuda", {})
    if cuda.get("built"):
        yield "CUDA kernels", f"built with {cuda.get('toolkit')} for {cuda.get('archs')}"
    else:
        yield "CUDA kernels", f"not built: {cuda.get('reason', 'no reason recorded')}"


def _backends() -> Iterator[tuple[str, str]]:
    from sr_kernels import backends

    for name, available, reason in backends.report():
        yield name, ("yes" if available else "no") + (f": {reason}" if reason else "")
    try:
        default = backends.current_backend()
    except ValueError as error:
        default = f"none: {error}"
    yield "taken by default", default


def _weights() -> Iterator[tuple[str, str]]:
    import sr_kernels.models as models

    if not models.PRETRAINED:
        yield "none", ""
    for name, file in sorted(models.PRETRAINED.items()):
        yield name, f"{file}{'' if Path(file).is_file() else ' (missing)'}"


def cpu_info() -> dict[str, str]:
    """What the system says of the first processor; empty where it says nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    info: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    return info


def cpu_name(info: dict[str, str]) -> str:
    """ "AMD EPYC", or the kind of machine where there is no name."""
    return info.get("model name") or platform.processor() or platform.machine()


def _cpu() -> Iterator[tuple[str, str]]:
    from sr_kernels import backends, inference

    info = cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    yield "name", cpu_name(info)
    yield "cores", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads"
    yield "features", " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "unknown"
    try:
        chosen = backends.cpu_capability()
    except RuntimeError as error:
        chosen = str(error)
    yield "kernels chosen", chosen
    yield "free memory", f"{inference.available_memory() / 1e9:.1f} GB"


def _gpu() -> Iterator[tuple[str, str]]:
    if torch.version.cuda is None:
        yield "none", "this torch is a build without CUDA"
        return
    if not torch.cuda.is_available():
        yield "none", "torch finds no CUDA GPU (driver missing, or CUDA_VISIBLE_DEVICES hides it)"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 1e9:.0f} GB",
        )


def _environment() -> Iterator[tuple[str, str]]:
    for name, meaning in _VARIABLES:
        value = os.environ.get(name)
        yield name, f"{'not set' if value is None else repr(value)}  ({meaning})"
