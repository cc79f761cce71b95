"""Tile shapes and warps of each kernel: tuned ones from JSON files, and a default for the rest.

A file holds what `sr-kernels tune` measured on one device::

    {"device": "NVIDIA ...", "vendor": "nvidia", "capability": [9, 0], "shared_memory": 232448,
     "triton": "3.6.0",
     "entries": [{"kernel": "conv", "dtype": "float16", "sizes": {"c_in": 60, "c_out": 60},
                  "config": {"BLOCK_P": 64, ..., "num_warps": 4, "num_stages": 2}}, ...]}

Looked for in ``SR_KERNELS_TRITON_CONFIGS``, in the user's cache folder and in the package. Keys
hold channel counts and windows, never the size of the image: an operator must not be tuned, or
change its rounding, with every new picture. Without an entry for exactly these sizes, the nearest
entry of the same kernel and dtype is taken; without a file for this device, that of the nearest
device of the same vendor that has no more shared memory, with one warning; without any, `DEFAULTS`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sr_kernels._files import whole_or_nothing

_VARIABLE = "SR_KERNELS_TRITON_CONFIGS"

Config = dict[str, int]
Key = tuple[str, str, tuple[tuple[str, int], ...]]  # kernel, dtype, sizes

_POINTWISE = {"BLOCK_P": 64, "BLOCK_O": 64, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2}
_BLOCK = {
    "BLOCK_P": 64, "BLOCK_O": 64, "BLOCK_R": 32, "BLOCK_I": 64, "num_warps": 8, "num_stages": 2,
}  # fmt: skip
# BLOCK_Q and BLOCK_K are the most tokens of a tile; a smaller window has a smaller tile.
_ATTENTION = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
_MAP = {"BLOCK_P": 128, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}

DEFAULTS: dict[str, Config] = {
    "conv": _POINTWISE,
    "conv3x3": _POINTWISE,
    "input_gradient": {**_POINTWISE, "BLOCK_O": 32, "BLOCK_I": 64},
    "weight_gradient": {**_POINTWISE, "BLOCK_O": 64, "BLOCK_I": 64},
    "block": _BLOCK,
    "block_hidden": {**_BLOCK, "BLOCK_O": 32, "BLOCK_I": 32},
    "attention": _ATTENTION,
    "attention_statistics": _ATTENTION,
    "attention_gradient": {**_ATTENTION, "BLOCK_Q": 32, "BLOCK_K": 32},
    "attention_bias": {**_ATTENTION, "BLOCK_Q": 32, "BLOCK_K": 32},
    "spatial_statistics": _MAP,
    "spatial_apply": _MAP,
    "spatial_sensitivity": _MAP,
    "spatial_gradient": _MAP,
    "channel_statistics": {"BLOCK_P": 256, "BLOCK_C": 4, "num_warps": 4, "num_stages": 2},
    "channel_apply": _MAP,
}


class TuningWarning(UserWarning):
    """A file of tile shapes is missing, wrong, or of another device."""


@dataclass(frozen=True)
class Device:
    """What decides which configurations suit: name, compute capability, shared memory a block, and
    the vendor, nvidia or amd: the capabilities of one say nothing about the other's."""

    name: str
    capability: tuple[int, int]
    shared_memory: int
    vendor: str = "nvidia"

    @staticmethod
    @functools.cache
    def of(index: int) -> Device:
        properties = torch.cuda.get_device_properties(index)
        shared = getattr(properties, "shared_memory_per_block_optin", 0)
        vendor = "nvidia" if torch.version.hip is None else "amd"
        return Device(properties.name, (properties.major, properties.minor), int(shared), vendor)


@dataclass
class TunedFile:
    """The contents of one file, checked."""

    device: Device
    entries: dict[Key, Config] = field(default_factory=dict)
    triton: str = ""

    @staticmethod
    def read(path: Path) -> TunedFile:
        """Raises ValueError that names the file and what is wrong in it."""
        try:
            data = json.loads(path.read_text())
            device = Device(
                str(data["device"]),
                (int(data["capability"][0]), int(data["capability"][1])),
                int(data["shared_memory"]),
                str(data["vendor"]),
            )
            tuned = TunedFile(device, triton=str(data["triton"]))
            for entry in data["entries"]:
                sizes = entry["sizes"]
                if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
                    raise ValueError(f"sizes are {sizes}: they must be positive integers")
                key = make_key(entry["kernel"], entry["dtype"], sizes)
                tuned.entries[key] = checked(entry["kernel"], entry["config"])
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not a file of tuned configurations: {error!r}") from error
        return tuned

    def write(self, path: Path) -> None:
        """The file appears whole or not at all."""
        entries = [
            {"kernel": kernel, "dtype": dtype, "sizes": dict(sizes), "config": config}
            for (kernel, dtype, sizes), config in sorted(self.entries.items())
        ]
        data = {
            "device": self.device.name,
            "vendor": self.device.vendor,
            "capability": list(self.device.capability),
            "shared_memory": self.device.shared_memory,
            "triton": self.triton,
            "entries": entries,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_nothing(path) as file:
            file.write((json.dumps(data, indent=1) + "\n").encode())


def make_key(kernel: str, dtype: str, sizes: Mapping[str, int]) -> Key:
    return kernel, dtype, tuple(sorted(sizes.items()))


def checked(kernel: str, config: Mapping[str, Any]) -> Config:
    """The configuration, if it has exactly the entries of the kernel's default."""
    if kernel not in DEFAULTS:
        raise ValueError(f"kernel is {kernel!r}; there are {', '.join(DEFAULTS)}")
    wanted = DEFAULTS[kernel]
    if config.keys() != wanted.keys():
        raise ValueError(f"config of {kernel} has {sorted(config)}, must have {sorted(wanted)}")
    for name, value in config.items():
        power = isinstance(value, int) and value > 0 and value & (value - 1) == 0
        smallest = 1 if name in ("BLOCK_C", "num_warps") else 16  # the others are of products
        if name != "num_stages" and not (power and value >= smallest):
            raise ValueError(
                f"{name} of {kernel} is {value!r}: it must be a power of two from {smallest} on"
            )
        if name == "num_stages" and not (isinstance(value, int) and 1 <= value <= 8):
            raise ValueError(f"num_stages of {kernel} is {value!r}: it must be from 1 to 8")
    return dict(config)


def folders() -> list[Path]:
    """Where files are looked for, first wins."""
    named = os.environ.get(_VARIABLE)
    return [
        *([Path(named)] if named else []),
        cache_folder(),
        Path(__file__).with_name("tuned"),
    ]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "sr_kernels" / "triton"


def file_name(device_name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in device_name) + ".json"


@functools.cache
def tuned_for(device: Device) -> TunedFile | None:
    """The file for this device, or the nearest device's with a warning, or None."""
    named = os.environ.get(_VARIABLE)
    if named and not Path(named).is_dir():
        message = f"{_VARIABLE} is {named!r}: there is no such folder"
        warnings.warn(message, TuningWarning, stacklevel=2)
    found: dict[str, TunedFile] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.json")):
            try:
                tuned = TunedFile.read(path)
            except (OSError, ValueError) as error:
                # An older version's, perhaps of another device: no reason to run nothing.
                warnings.warn(f"{error}; it is not used", TuningWarning, stacklevel=2)
                continue
            found.setdefault(tuned.device.name, tuned)
    if device.name in found:
        return found[device.name]
    # A tile that needs more shared memory than there is would not start.
    fitting = [
        tuned
        for tuned in found.values()
        if tuned.device.vendor == device.vendor
        and tuned.device.shared_memory <= device.shared_memory
    ]
    if not fitting:
        return None

    def distance(tuned: TunedFile) -> tuple[int, str]:
        (major, minor), (other_major, other_minor) = device.capability, tuned.device.capability
        return abs(10 * (major - other_major) + minor - other_minor), tuned.device.name

    nearest = min(fitting, key=distance)
    warnings.warn(
        f"no tuned configurations for {device.name}: the Triton kernels use those of "
        f"{nearest.device.name}. Run `sr-kernels tune` once on this machine.",
        TuningWarning,
        stacklevel=2,
    )
    return nearest


def nearest_entry(tuned: TunedFile, key: Key) -> Config | None:
    """The entry of this kernel and dtype whose sizes are nearest, by the ratio of each."""
    kernel, dtype, sizes = key
    wanted = dict(sizes)

    def distance(other: Key) -> tuple[float, Key]:
        ratios = (abs(math.log2(size / wanted[name])) for name, size in other[2])
        return sum(ratios), other

    same = [
        k for k in tuned.entries if k[:2] == (kernel, dtype) and dict(k[2]).keys() == wanted.keys()
    ]
    return tuned.entries[min(same, key=distance)] if same else None


# What `sr-kernels tune` tries at the moment, and the keys that were asked for meanwhile.
_forced: dict[Key, Config] = {}
_asked: list[Key] | None = None


@contextmanager
def forced(configs: Mapping[Key, Config]) -> Iterator[None]:
    """Within the block these configurations are used for these keys."""
    previous = dict(_forced)
    _forced.update(configs)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(previous)


@contextmanager
def recorded() -> Iterator[list[Key]]:
    """Collects the keys that kernels ask for within the block, each once."""
    global _asked
    previous, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = previous


@functools.cache
def _lookup(device: Device | None, key: Key) -> Config:
    tuned = tuned_for(device) if device is not None else None
    config = nearest_entry(tuned, key) if tuned is not None else None
    return DEFAULTS[key[0]] if config is None else config


def configuration(kernel: str, x: torch.Tensor, **sizes: int) -> Config:
    """Tile shapes and warps of ``kernel`` for tensors like x and these sizes (no image sizes)."""
    key = make_key(kernel, str(x.dtype).removeprefix("torch."), sizes)
    if _asked is not None and key not in _asked:
        _asked.append(key)
    if key in _forced:
        return _forced[key]
    index = x.get_device()
    return _lookup(Device.of(index) if index >= 0 else None, key)
