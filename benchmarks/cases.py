"""The list of cases: ``cases.yaml``, read and filtered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODES = ("forward", "backward", "both")
AUTOCAST = "_autocast"  # behind a dtype
_FILE = Path(__file__).with_name("cases.yaml")
# Other people's networks: a checkout has them.
THIRD_PARTY = Path(__file__).resolve().parents[1] / "tests" / "patch" / "third_party.py"


class MissingExtra(Exception):
    """A package that benchmarks need is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"the benchmarks need {package}: pip install --no-build-isolation '.[bench]' in a "
            "checkout, or pip install 'sr_kernels[bench]'"
        )


@dataclass(frozen=True)
class Case:
    """One row of the table, but for its providers.

    op: name of the operator or network.  channels: C of the feature maps (0: a network).
    batch, height, width: of the feature maps, or of the network's input, in pixels.
    mode: "forward" without gradients; "backward" alone; "both", as in a training step.
    dtype: "float32", "float16", "bfloat16"; "float16_autocast" and "bfloat16_autocast", of
    networks, are float32 weights and pictures under `torch.autocast`.  device: "cpu" or "cuda".
    """

    op: str
    batch: int
    channels: int
    height: int
    width: int
    mode: str = "forward"
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def shape(self) -> str:
        """ "1x60x180x320"; a network's input has 3 channels."""
        return f"{self.batch}x{self.channels or 3}x{self.height}x{self.width}"

    @property
    def autocast(self) -> bool:
        return self.dtype.endswith(AUTOCAST)

    @property
    def storage(self) -> str:
        """The dtype of weights and inputs."""
        return "float32" if self.autocast else self.dtype

    @property
    def arithmetic(self) -> str:
        """The dtype of products."""
        return self.dtype.removesuffix(AUTOCAST)

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    @property
    def is_network(self) -> bool:
        return self.channels == 0

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.mode}"


def parse_size(text: str) -> tuple[int, int, int]:
    """ "180x320" or "4x64x64" -> (batch, height, width)."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(_is_size(part) for part in parts):
        raise ValueError(f"size is {text!r}; expected HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH")
    numbers = [int(part) for part in parts]
    batch, height, width = numbers if len(numbers) == 3 else [1, *numbers]
    return batch, height, width


def _is_size(text: str) -> bool:
    # Superscripts are digits to str.isdigit, and nothing to int.
    return text.isascii() and text.isdigit() and int(text) > 0


def read(path: Path = _FILE) -> dict[str, Any]:
    """The YAML file as it stands."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra("PyYAML") from error
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def all_names() -> list[str]:
    """Every operator and network, in the file's order."""
    content = read()
    return [*content["operators"], *content["networks"]]


def select(
    *,
    ops: Sequence[str] = (),
    sizes: Sequence[str] = (),
    channels: Sequence[int] = (),
    modes: Sequence[str] = (),
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    quick: bool = False,
) -> list[Case]:
    """The cases to measure, in the file's order, each once.

    Empty filters take what the file lists: an operator's first number of channels at every size,
    and every number of channels at its first size. A size, number of channels or mode that is asked
    for by name is measured also where the file does not list it, and sizes and channels asked for
    together in every combination. Networks have no channels to choose.

    Networks of other people's code are in a checkout only: elsewhere they are left out. Autocast
    is measured with networks only.

    Raises:
        ValueError: no such operator or network; or one asked for by name has nothing of what is
            asked for. It says what there is.
    """
    content = read()
    training = set(content["training_sizes"])
    known = [*content["operators"], *content["networks"]]
    for name in ops:
        if name not in known:
            raise ValueError(f"op is {name!r}; available are {', '.join(known)}")
        entry = {**content["operators"], **content["networks"]}[name]
        if entry.get("inference") and modes and "forward" not in modes:
            raise ValueError(f"op is {name!r}, whose only mode is forward")
        if name in content["operators"] and all(dtype.endswith(AUTOCAST) for dtype in dtypes):
            raise ValueError(f"op is {name!r}, but autocast is measured with networks only")
        if quick and not sizes and not entry.get("quick", entry)["sizes"]:
            raise ValueError(f"op is {name!r}, which has no case in the quick set")
        if entry.get("checkout") and not THIRD_PARTY.is_file():
            raise ValueError(f"op is {name!r}, which only a checkout has: {THIRD_PARTY} is absent")
    cases: list[Case] = []
    for name in known:
        if ops and name not in ops:
            continue
        network = name in content["networks"]
        entry = content["networks" if network else "operators"][name]
        if entry.get("checkout") and not THIRD_PARTY.is_file():
            continue
        for count, size in _shapes(entry, sizes, channels, quick):
            batch, height, width = parse_size(size)
            wanted = modes or (MODES if size in training else ("forward",))
            if (network or quick) and not modes and size in training:
                wanted = ("both",)  # a training step; inference is measured at other sizes
            if entry.get("inference"):
                wanted = tuple(mode for mode in wanted if mode == "forward")
            cases.extend(
                Case(name, batch, count, height, width, mode, dtype, device)
                for dtype in dtypes
                if network or not dtype.endswith(AUTOCAST)
                for mode in wanted
            )
    return list(dict.fromkeys(cases))


def _shapes(
    entry: dict[str, Any], sizes: Sequence[str], channels: Sequence[int], quick: bool
) -> Iterator[tuple[int, str]]:
    source = {**entry, **entry["quick"]} if quick else entry
    listed_channels = (channels or source["channels"]) if "channels" in entry else [0]
    listed_sizes = sizes or source["sizes"]
    everything = bool(sizes and channels)
    for index, size in enumerate(listed_sizes):
        for position, count in enumerate(listed_channels):
            if everything or index == 0 or position == 0:
                yield count, size
