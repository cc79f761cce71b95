"""spandrel loads our networks, we load and patch spandrel's: `make test-abi` runs this.

spandrel needs torchvision, of which the package index has no build for torch's CPU build.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sr_kernels.models import (
    CheckpointError,
    UnknownNetworkError,
    elan,
    elan_light,
    load_pretrained,
    mafdn,
)
from sr_kernels.models.evaluate import Pair, psnr_y, to_tensor
from torch import Tensor, nn

import sr_kernels
from sr_kernels import cli, inference

try:
    import spandrel

    import sr_kernels.spandrel as ours
except ImportError as error:
    pytest.skip(f"{error}; `make test-abi` has spandrel and torchvision", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")

State = dict[str, Tensor]


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        return path

    return write


@pytest.fixture(scope="module")
def registry() -> spandrel.ArchRegistry:
    registry = spandrel.MAIN_REGISTRY.copy()
    ours.install(registry)
    return registry


def friedricelab(state: State) -> State:
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^head\.0\.", "head.", name)
        name = re.sub(r"modules_(lfe|gmsa)\.(?:lfe|gmsa)_(\d+)\.", r"modules_\1.\2.", name)
        for number, place in (("0", "0"), ("1", "2")):
            name = name.replace(f"conv{number}.shift_conv.conv1x1.", f"lfe.{place}.")
            name = name.replace(f"conv{number}.shift_conv.weight", f"lfe.{place}.mask")
        renamed[name] = value
    return renamed


def masked_3x3(state: State) -> State:
    dense = {}
    for name, value in state.items():
        prefix = name.partition("conv1x1.")[0]
        if name.endswith("shift_conv.conv1x1.weight"):
            mask = state[prefix + "weight"].squeeze(1).expand(value.shape[0], -1, 3, 3)
            dense |= {prefix + "w": value * mask, prefix + "m": mask.clone()}
        elif name.endswith("shift_conv.conv1x1.bias"):
            dense[prefix + "b"] = value
        elif not name.endswith("shift_conv.weight"):
            dense[name] = value
    return dense


# -------------------------------------------------------------------- our networks in spandrel


def test_install_is_what_every_program_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = spandrel.MAIN_REGISTRY.copy()
    for name in ("_architectures", "_ordered", "_by_id"):
        monkeypatch.setattr(spandrel.MAIN_REGISTRY, name, getattr(fresh, name))
    state = small("elan").state_dict()
    with pytest.raises(spandrel.UnsupportedModelError):
        spandrel.ModelLoader().load_from_state_dict(state)
    ours.install()
    ours.install()
    assert spandrel.ModelLoader().load_from_state_dict(state).architecture.id == "ELAN"
    assert len(spandrel.MAIN_REGISTRY) == len(fresh) + 2


def test_install_leaves_an_architecture_of_that_name() -> None:
    registry = spandrel.ArchRegistry()
    theirs = spandrel.ArchSupport.from_architecture(ours.ELANArch())
    registry.add(theirs)
    ours.install(registry)
    assert registry["ELAN"] is theirs
    assert "MAFDN" in registry


def small(name: str, scale: int = 2) -> Any:
    if name == "mafdn":
        return mafdn(scale, channels=8, num_blocks=1).eval()
    options: dict[str, Any] = {"m_elan": 2, "c_elan": 15, "n_share": 1}
    if name == "elan, 0..1":
        options |= {"norm": False, "rgb_range": 1.0}
    return elan(scale, **options).eval()


def in_0_to_1(model: Any, x: Tensor) -> Tensor:
    """The model's output as spandrel gives it."""
    with torch.no_grad():
        return (model(x * model.rgb_range) / model.rgb_range).clamp(0, 1)


FORMS: dict[str, tuple[str, Callable[[State], Any]]] = {
    "official": ("elan", lambda s: s),
    "official training": (
        "elan",
        lambda s: {"epoch": 7, "model_state_dict": {"module." + n: v for n, v in s.items()}},
    ),
    "compiled": ("elan", lambda s: {"module._orig_mod." + n: v for n, v in s.items()}),
    "masked 3x3": ("elan", masked_3x3),
    "friedricelab": ("elan", lambda s: {"params": friedricelab(s)}),
    "trainner-redux": ("elan, 0..1", lambda s: {"params_ema": s}),
    "mafdn": ("mafdn", lambda s: s),
}


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_spelling(
    form: str, scale: int, registry: spandrel.ArchRegistry, save: Callable[[Any], Path]
) -> None:
    name, change = FORMS[form]
    model = small(name, scale)
    path = save(change(model.state_dict()))
    descriptor = spandrel.ModelLoader(registry=registry).load_from_file(path)
    assert isinstance(descriptor, spandrel.ImageModelDescriptor)
    assert descriptor.architecture.id == name.partition(",")[0].upper()
    assert (descriptor.scale, descriptor.purpose) == (scale, "SR")
    assert (descriptor.input_channels, descriptor.output_channels) == (3, 3)
    assert descriptor.size_requirements.minimum == 0
    assert descriptor.size_requirements.multiple_of == (1 if name == "mafdn" else 16)
    assert descriptor.tiling is spandrel.ModelTiling.SUPPORTED
    x = torch.rand(1, 3, 16, 17)
    torch.testing.assert_close(descriptor(x), in_0_to_1(model, x))


def test_sizes_and_tags(registry: spandrel.ArchRegistry) -> None:
    light = registry.load(elan_light(4).state_dict())
    assert light.tags == ["light", "60nf", "24m"]
    assert light(torch.rand(1, 3, 5, 3)).shape == (1, 3, 20, 12)
    classic = registry.load(elan(2, m_elan=1).state_dict())
    assert classic.tags == ["180nf", "1m"]
    assert registry.load(mafdn(3, num_blocks=2).state_dict()).tags == ["52nf", "2nb"]


def test_no_other_architecture_is_taken_or_takes_ours(
    registry: spandrel.ArchRegistry, data: Path
) -> None:
    def detected(state: Any) -> list[str]:
        state = spandrel.canonicalize_state_dict(state)
        return [support.architecture.id for support in registry if support.detect(state)]

    assert detected(elan(2, m_elan=2, c_elan=15).state_dict()) == ["ELAN"]
    assert detected(mafdn(2, channels=8, num_blocks=1).state_dict()) == ["MAFDN"]
    for file in ("dctlsa_x4.pt", "imdn_x4.pth", "pan_x4.pth"):
        state = torch.load(data / "weights" / file, map_location="cpu", weights_only=True)
        assert not {"ELAN", "MAFDN"} & set(detected(state)), file
    assert detected({"a": torch.zeros(1), 3: None}) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_as_promised(dtype: torch.dtype, registry: spandrel.ArchRegistry) -> None:
    descriptor = registry.load(load_pretrained("mafdn_x4").state_dict())
    x = torch.rand(1, 3, 12, 12)
    expected = descriptor(x)
    y = descriptor.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() < (0.01 if dtype == torch.float16 else 0.05)


def test_narrow_elan_on_a_picture(
    registry: spandrel.ArchRegistry, data: Path, set5: dict[str, Pair]
) -> None:
    loader = spandrel.ModelLoader(registry=registry)
    descriptor = loader.load_from_file(data / "weights" / "elan_light_x4_official_keys.pth")
    x = to_tensor([set5["butterfly"][0][:32, :32]])
    expected = descriptor(x)
    for dtype, allowed in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
        assert (descriptor.to(dtype)(x.to(dtype)).float() - expected).abs().max() < allowed


def test_weights_that_do_not_fit(registry: spandrel.ArchRegistry) -> None:
    state = small("elan").state_dict()
    del state["body.0.modules_gmsa.gmsa_1.project_out.bias"]
    with pytest.raises(CheckpointError, match=r"weights of ELAN: .*project_out.bias is missing"):
        registry.load(state)


# ---------------------------------------------------------------- their networks, on our kernels


def rcan(**changes: Tensor) -> State:
    """A small RCAN with weights, from spandrel's own class."""
    from spandrel.architectures.RCAN import RCAN

    network = RCAN(scale=2, n_resgroups=1, n_resblocks=2, n_feats=16, norm=False)
    return {**network.state_dict(), **changes}


def test_load_patches(save: Callable[[Any], Path]) -> None:
    path = save({"params": rcan()})
    before = spandrel.ModelLoader().load_from_file(path)
    descriptor, report = ours.load(path)
    assert descriptor.architecture.id == "RCAN"
    assert not descriptor.model.training
    replaced = [entry for entry in report.entries if entry.replaced_by]
    assert {entry.class_name for entry in replaced} == {"CALayer", "Conv2d"}
    x = torch.rand(1, 3, 9, 14)
    torch.testing.assert_close(descriptor(x), before(x))
    report.restore()
    assert torch.equal(descriptor(x), before(x))


def transformer(kind: str) -> nn.Module:
    """A small network from spandrel's own class."""
    if kind == "SwinIR":
        from spandrel.architectures.SwinIR import SwinIR as network
    elif kind == "HAT":
        from spandrel.architectures.HAT import HAT as network
    else:
        from spandrel.architectures.Swin2SR import Swin2SR as network
    return network(
        img_size=16,
        window_size=8,
        depths=[2],
        num_heads=[6],
        embed_dim=60,
        mlp_ratio=2,
        upscale=2,
        upsampler="pixelshuffle",
    )


@pytest.mark.parametrize(
    ("kind", "replaced", "left"),
    [
        ("SwinIR", {"SwinTransformerBlock"}, set()),
        ("HAT", {"HAB"}, {"OCAB"}),
        ("Swin2SR", set(), {"WindowAttention"}),
    ],
)
def test_their_transformers(kind: str, replaced: set[str], left: set[str]) -> None:
    torch.manual_seed(0)
    model = transformer(kind).eval()
    x = torch.rand(1, 3, 24, 32)
    with torch.no_grad():
        before = model(x)
        report = sr_kernels.patch(model)
        after = model(x)
        blocks = {e.class_name for e in report.replaced} - {"Conv2d", "ChannelAttention"}
        assert blocks == replaced, str(report)
        assert left <= {e.class_name for e in report.skipped if e.resembles}, str(report)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        report.restore()
        assert torch.equal(model(x), before)


def test_arguments_of_patch_are_handed_on(save: Callable[[Any], Path]) -> None:
    _, report = ours.load(save(rcan()), exclude=["CALayer", "Conv2d"])
    assert not any(entry.replaced_by for entry in report.entries)


@pytest.mark.parametrize("name", ["elan", "mafdn"])
def test_load_takes_ours_too(name: str, save: Callable[[Any], Path]) -> None:
    model = small(name)
    descriptor, _ = ours.load(save(model.state_dict()))
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(descriptor(x), in_0_to_1(model, x))


def test_dctlsa_on_set5(data: Path, set5: dict[str, Pair]) -> None:
    path = data / "weights" / "dctlsa_x4.pt"
    stock = spandrel.ModelLoader().load_from_file(path)
    patched, report = ours.load(path)
    assert any(entry.replaced_by for entry in report.entries)
    scores = []
    for low, high in set5.values():
        x = to_tensor([low])
        both = [descriptor(x) for descriptor in (stock, patched)]
        assert (both[0] - both[1]).abs().max() < 1e-3
        pixels = [(y[0] * 255).round().permute(1, 2, 0).to(torch.uint8).numpy() for y in both]
        scores.append([psnr_y(picture, high, 4) for picture in pixels])
    means = np.mean(scores, 0)
    print("Set5 x4, DCTLSA: stock", means[0], "patched", means[1])
    assert means[0] > 32
    assert abs(means[0] - means[1]) < 1e-3


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def nothing(path: Path) -> None:
    pass


NAN = torch.full((16,), float("nan"))
BAD: list[tuple[Callable[[], Any], Callable[[Path], None], type[Exception], str]] = [
    (rcan, lambda path: path.unlink(), FileNotFoundError, "no such file"),
    (rcan, damaged, CheckpointError, "truncated or damaged"),
    (rcan, lambda path: path.write_text("no weights"), CheckpointError, "neither"),
    (lambda: [1, 2], nothing, CheckpointError, "holds a list"),
    (lambda: {"a.weight": torch.zeros(1)}, nothing, UnknownNetworkError, r"a\.weight.*spandrel"),
    (lambda: {}, nothing, UnknownNetworkError, "neither"),
    (lambda: {"a": 1, 2: 3}, nothing, UnknownNetworkError, "neither"),
    (lambda: {"params": {2: torch.zeros(1)}}, nothing, CheckpointError, "no named weights"),
    (lambda: rcan(**{"head.0.bias": NAN}), nothing, CheckpointError, "head.0.bias contains NaN"),
    (lambda: rcan(**{"head.0.bias": torch.zeros(3)}), nothing, CheckpointError, "head.0.bias"),
    (
        lambda: rcan(**{"head.0.bias": torch.zeros(1).expand(1 << 22)}),
        nothing,
        CheckpointError,
        "head.0.bias .* stored in full",
    ),
    (
        lambda: {**small("elan").state_dict(), "head.0.bias": torch.zeros(3)},
        nothing,
        CheckpointError,
        r"weights\.pth: .*head.0.bias is of another shape",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_file(number: int, save: Callable[[Any], Path]) -> None:
    content, change, error, message = BAD[number]
    path = save(content())
    change(path)
    with pytest.raises(error, match=message):
        ours.load(path)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".ckpt"])
def test_code_in_a_pickle_is_not_run(ending: str, tmp_path: Path) -> None:
    path, marker = tmp_path / ("weights" + ending), tmp_path / "was_here"
    torch.save({**rcan(), "code": RunsCode(marker)}, path)
    with pytest.raises(CheckpointError, match=r"run code .*system"):
        ours.load(path)
    assert not marker.exists()


@pytest.mark.parametrize("ending", [".pth", ".pt"])
def test_torchscript_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / ("weights" + ending)
    torch.jit.script(nn.Conv2d(3, 3, 1)).save(str(path))
    with pytest.raises(CheckpointError, match="TorchScript archive is a program"):
        ours.load(path)


# -------------------------------------------------------------------------------- in the inference


class Nearest(nn.Module):
    """Keeps a list of the sizes that it was given."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale, self.seen = scale, list[tuple[int, ...]]()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return nn.functional.interpolate(x, scale_factor=self.scale, mode="nearest")


def described(channels: int = 3, **options: Any) -> tuple[Nearest, ours.Network]:
    model = Nearest(2)
    descriptor = spandrel.ImageModelDescriptor(
        model,
        model.state_dict(),
        architecture=ours.ELANArch(),
        purpose="SR",
        tags=[],
        supports_half=False,
        supports_bfloat16=True,
        scale=2,
        input_channels=channels,
        output_channels=channels,
        **options,
    )
    return model, ours.Network(descriptor, sr_kernels.patch(model))


def test_size_requirements_and_tiles() -> None:
    requirements = spandrel.SizeRequirements(minimum=24, multiple_of=8)
    model, network = described(size_requirements=requirements)
    picture = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    result = inference.upscale_array(network, picture, tile=48)
    np.testing.assert_array_equal(result, picture.repeat(2, 0).repeat(2, 1))
    assert len(model.seen) > 2
    assert all(h % 8 == w % 8 == 0 and min(h, w) >= 24 for _, _, h, w in model.seen)
    assert all(max(shape[2:]) <= 48 for shape in model.seen)


def test_very_large_multiples_leave_room_for_the_overlap() -> None:
    requirements = spandrel.SizeRequirements(multiple_of=128, square=True)
    model, network = described(size_requirements=requirements)
    picture = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    result = inference.upscale_array(network, picture, tile=128)
    np.testing.assert_array_equal(result, picture.repeat(2, 0).repeat(2, 1))
    assert set(model.seen) == {(1, 3, 128, 128)}
    assert len(model.seen) > 4  # that many would do without an overlap


@pytest.mark.parametrize("tiling", list(spandrel.ModelTiling))
def test_tiling_advice(tiling: spandrel.ModelTiling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "CPU_TILE_BYTES", 1 << 20)
    model, network = described(tiling=tiling)
    picture = np.zeros((200, 150, 3), np.uint8)
    inference.upscale_array(network, picture)
    assert (len(model.seen) == 1) == (tiling is not spandrel.ModelTiling.SUPPORTED)
    model.seen.clear()
    inference.upscale_array(network, picture, tile=64)
    assert len(model.seen) > 1
    model.seen.clear()
    monkeypatch.setattr(inference, "available_memory", lambda device="cpu": 1 << 22)
    inference.upscale_array(network, picture)
    assert len(model.seen) > 1


def test_one_channel_networks_get_the_colours_one_by_one() -> None:
    model, network = described(channels=1)
    x = torch.rand(2, 3, 5, 4)
    torch.testing.assert_close(network(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert model.seen == [(1, 1, 5, 4)] * 6


def test_networks_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="makes 4 channels of 4"):
        described(channels=4)


def test_backend_of_the_wrapped_network() -> None:
    model, network = described()
    names = []
    model.register_forward_hook(lambda *_: names.append(sr_kernels.backends.current_backend()))
    network.backend = "reference"
    network(torch.rand(1, 3, 4, 4))
    network.backend = None
    with sr_kernels.use_backend("cpu"):
        network(torch.rand(1, 3, 4, 4))
    assert names == ["reference", "cpu"]


# ------------------------------------------------------------------------------ the command line


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    y, x = np.mgrid[:20, :30]
    pixels = np.stack([x * 8, y * 12, (x + y) * 5], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_upscale_with_their_network(
    photo: Path, save: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(rcan())
    assert cli.main(["upscale", str(photo), "--weights", str(path), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "RCAN x2, by spandrel; replaced by our kernels: " in captured.err
    assert "2 CALayer" in captured.err
    assert "with RCAN x2, backend cpu" in captured.out
    descriptor, _ = ours.load(path)
    x = to_tensor([np.asarray(Image.open(photo))])
    expected = (descriptor(x)[0] * 255).round().permute(1, 2, 0).to(torch.uint8).numpy()
    found = np.asarray(Image.open(photo.with_name("photo_x2.png")))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--dtype", "float16"], 2, "RCAN x2 does not work in it, says spandrel"),
        (["--scale", "4"], 2, "are for x2, but --scale says 4"),
        (["--model", "elan"], 2, "are rcan, but --model says elan"),
        (["--model", "rcan", "--scale", "2", "--backend", "cpu", "--tile", "16"], 0, "by spandrel"),
        (["--backend", "reference"], 0, "by spandrel"),
    ],
)
def test_options(
    options: list[str],
    status: int,
    message: str,
    photo: Path,
    save: Callable[[Any], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["upscale", str(photo), "--device", "cpu", "--weights", str(save(rcan()))]
    assert cli.main([*arguments, *options]) == status
    assert message in capsys.readouterr().err


def test_nothing_to_replace(
    photo: Path, save: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from spandrel.architectures.Compact import Compact

    state = Compact(num_feat=8, num_conv=1, upscale=2).state_dict()
    arguments = ["upscale", str(photo), "--device", "cpu", "--weights", str(save(state))]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert "replaced by our kernels: no layer" in captured.err
    assert "backend stock PyTorch" in captured.out
    assert cli.main([*arguments, "--backend", "cpu", "--overwrite"]) == 1
    assert "has no layer that sr_kernels has kernels for" in capsys.readouterr().err


def test_unknown_network(
    photo: Path, save: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save({"a.weight": torch.zeros(1)})
    assert cli.main(["upscale", str(photo), "--weights", str(path)]) == 1
    assert "neither sr_kernels nor spandrel" in capsys.readouterr().err


def test_our_networks_are_still_ours(
    photo: Path, save: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(small("mafdn").state_dict())
    assert cli.main(["upscale", str(photo), "--weights", str(path)]) == 0
    captured = capsys.readouterr()
    assert "spandrel" not in captured.err
    assert "with MAFDN x2" in captured.out
