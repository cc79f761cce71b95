"""Work with `spandrel <https://pypi.org/project/spandrel/>`_, which recognises a super-resolution
network from its weights: our networks for its programs, its networks for our kernels.

``install()`` adds ELAN and MAFDN to spandrel's registry, so that whatever loads models through
spandrel loads their checkpoints, in every spelling that :mod:`sr_kernels.models` understands.
``load(file)`` lets spandrel build the network that a file is for, and patches it.

Needs the extra ``sr_kernels[spandrel]``; without it importing this module raises ImportError.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import sr_kernels
from sr_kernels.models import CheckpointError, UnknownNetworkError, checkpoints

if TYPE_CHECKING:
    from sr_kernels import PatchReport

try:
    import spandrel
except (ImportError, RuntimeError, AttributeError) as error:
    # RuntimeError: a torchvision that was built for another torch ends like this.
    raise ImportError(
        f"sr_kernels.spandrel needs spandrel and the torchvision that belongs to torch "
        f"{torch.__version__}: pip install 'sr_kernels[spandrel]' ({error})",
        name="spandrel",
    ) from error

__all__ = ["ELANArch", "MAFDNArch", "Network", "install", "load"]


class _Arch(spandrel.Architecture[nn.Module]):
    """One of this package's networks, told by the names of its weights."""

    def __init__(self, name: Literal["ELAN", "MAFDN"]) -> None:
        def detect(state: Mapping[Any, Any]) -> bool:
            names = {name: None for name in state if isinstance(name, str)}
            return checkpoints.recognise(checkpoints.without_prefixes(names)) == name

        super().__init__(id=name, detect=detect)

    def load(self, state_dict: dict[str, Any]) -> spandrel.ImageModelDescriptor[nn.Module]:
        """The network that the weights are for, on sr_kernels' operators; raises CheckpointError
        where they fit none."""
        model = checkpoints.from_content(state_dict, f"these weights of {self.name}")
        white, colors = model.rgb_range, next(model.head.parameters()).shape[1]
        return spandrel.ImageModelDescriptor(
            model,
            model.state_dict(),
            architecture=self,
            purpose="SR",
            tags=_tags(model),
            supports_half=True,
            supports_bfloat16=True,
            scale=model.scale,
            input_channels=colors,
            output_channels=colors,
            # Any size is accepted, but this is what is computed; and tiles that begin at multiples
            # of it have the whole picture's windows.
            size_requirements=spandrel.SizeRequirements(multiple_of=model.tile_multiple),
            # MAFDN's channel attention looks at a whole tile, which changes the picture slightly.
            tiling=spandrel.ModelTiling.SUPPORTED,
            # spandrel's pictures are in 0..1; the weights of ELAN want 0..255.
            call_fn=None if white == 1 else lambda model, image: model(image * white) / white,
        )


class ELANArch(_Arch):
    """ELAN and ELAN-light, any size and scale, with windows of 4, 8 and 16 pixels."""

    def __init__(self) -> None:
        super().__init__("ELAN")


class MAFDNArch(_Arch):
    """This package's MAFDN."""

    def __init__(self) -> None:
        super().__init__("MAFDN")


def _tags(model: nn.Module) -> list[str]:
    if isinstance(model, sr_kernels.models.ELAN):
        pairs = len(model.body[0].modules_lfe)
        sizes = f"{model.head[0].out_channels}nf", f"{pairs * len(model.body)}m"
        return [*(["light"] if sizes == ("60nf", "24m") else []), *sizes]
    assert isinstance(model, sr_kernels.models.MAFDN)
    return [f"{model.head.out_channels}nf", f"{len(model.blocks)}nb"]


def install(registry: spandrel.ArchRegistry | None = None) -> None:
    """Let spandrel load ELAN and MAFDN. A second call does nothing.

    Args:
        registry: where they are added; None is ``spandrel.MAIN_REGISTRY``, which every program uses
            that does not bring a registry of its own. An architecture of the same id that is there
            already stays.
    """
    registry = spandrel.MAIN_REGISTRY if registry is None else registry
    registry.add(
        spandrel.ArchSupport.from_architecture(ELANArch()),
        spandrel.ArchSupport.from_architecture(MAFDNArch()),
        ignore_duplicates=True,
    )


def load(
    path: str | PathLike[str], *, device: str | torch.device = "cpu", **patching: Any
) -> tuple[spandrel.ModelDescriptor, PatchReport]:
    """The network that the weights are for, as spandrel's descriptor, patched; and the report.

    Everything that spandrel knows, what other packages have added to its registry, ELAN and MAFDN.
    The file is not read by spandrel but as :func:`sr_kernels.models.load_checkpoint` reads it, by
    content and without ever running code: a TorchScript archive is refused.

    Args:
        path: the file of weights.
        device: where the network goes; it is patched there.
        patching: arguments of :func:`sr_kernels.patch`, such as ``exclude``.

    Returns:
        The descriptor, its network in eval mode, and the report of :func:`sr_kernels.patch`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, or its weights do not fit the network that they
            seem to be of, or are not finite; :class:`~sr_kernels.models.UnknownNetworkError` where
            neither spandrel nor this package knows the network.
    """
    path = Path(path)
    content = checkpoints.read(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a state dict")
    try:
        state = spandrel.canonicalize_state_dict(dict(content))
    except AttributeError as error:  # it takes for granted that names are strings
        raise CheckpointError(f"{path}: holds no named weights; expected a state dict") from error
    _check_values(state, path)
    registry = spandrel.MAIN_REGISTRY.copy()
    install(registry)
    try:
        descriptor = spandrel.ModelLoader(device, registry).load_from_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except spandrel.UnsupportedModelError as error:
        names = ", ".join(str(name) for name in list(state)[:3])
        raise UnknownNetworkError(
            f"{path}: holds the weights of a network ({names}, ...) that neither sr_kernels nor "
            f"spandrel {spandrel.__version__} knows"
        ) from error
    except Exception as error:
        # Each architecture trusts the names that it recognised: what a wrong shape or a missing
        # weight makes it raise is arbitrary.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        raise CheckpointError(
            f"{path}: spandrel cannot build the network of these weights: {reason}"
        ) from error
    report = sr_kernels.patch(descriptor.eval().model, **patching)
    return descriptor, report


def _check_values(state: Mapping[Any, Any], path: Path) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor):
            checkpoints.check_stored(value, name, path)
            checkpoints.check_finite(value, name, path)


class Network(nn.Module):
    """A spandrel descriptor as :mod:`sr_kernels.inference` and the command line want a network:
    RGB in 0..1, with the attributes that say how it may be cut into tiles.

    Networks of one colour channel get red, green and blue one after the other.

    Attributes:
        report: of the patching.
        patched: whether any layer was replaced.
        tile_multiple: tiles begin at multiples of this; windows then lie as in the whole picture.
        whole_preferred: spandrel advises against tiles.

    Raises:
        ValueError: the network is no picture-to-picture network of 1 or 3 channels.
    """

    rgb_range = 1.0
    tile_overlap = 32

    def __init__(self, descriptor: spandrel.ModelDescriptor, report: PatchReport) -> None:
        super().__init__()
        name = descriptor.architecture.name
        channels = descriptor.input_channels, descriptor.output_channels
        if not isinstance(descriptor, spandrel.ImageModelDescriptor) or channels not in (
            (3, 3),
            (1, 1),
        ):
            raise ValueError(
                f"{name} makes {channels[1]} channels of {channels[0]} ({descriptor.purpose}); "
                "expected a network that makes a picture of a picture, with 3 or 1 channels"
            )
        self.name = name
        self.descriptor, self.report = descriptor, report
        self.patched = any(entry.replaced_by for entry in report.entries)
        self.model = descriptor.model
        self.scale: int = descriptor.scale
        self.backend: str | None = None
        wanted = descriptor.size_requirements.multiple_of
        # A tile of a network that wants very large multiples is padded by the descriptor instead:
        # rounding its overlap to them would leave none.
        self.tile_multiple: int = wanted if wanted <= self.tile_overlap else 1
        self.whole_preferred = descriptor.tiling is not spandrel.ModelTiling.SUPPORTED

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether the network may be run in this dtype, by spandrel's knowledge."""
        allowed = {
            torch.float16: self.descriptor.supports_half,
            torch.bfloat16: self.descriptor.supports_bfloat16,
        }
        return allowed.get(dtype, True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, sH, sW), both in 0..1; padded as the network requires."""
        count = x.shape[0] * x.shape[1] // self.descriptor.input_channels
        # One picture at a time: that is what the descriptor promises.
        parts = x.reshape(count, 1, self.descriptor.input_channels, *x.shape[2:])
        with sr_kernels.use_backend(self.backend or sr_kernels.backends.current_backend()):
            y = torch.cat([self.descriptor(part) for part in parts])
        return y.reshape(x.shape[0], x.shape[1], *y.shape[2:])
