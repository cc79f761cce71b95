"""Every naming that loads, and every file that must be refused with a sentence to act on."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sr_kernels.models import (
    ELAN,
    MAFDN,
    PRETRAINED,
    CheckpointError,
    UnknownNetworkError,
    elan,
    elan_light,
    load_checkpoint,
    load_pretrained,
    mafdn,
)
from torch import Tensor, nn

State = dict[str, Tensor]


def small_elan(**options: Any) -> ELAN:
    return elan(2, **{"m_elan": 4, "c_elan": 15, "n_share": 1, **options}).eval()


def small_mafdn(**options: Any) -> MAFDN:
    return mafdn(3, **{"channels": 8, "num_blocks": 2, **options}).eval()


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        return path

    return write


def output(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    x = torch.rand(1, 3, 16, 16) * model.rgb_range
    with torch.no_grad():
        return model(x)


# ---------------------------------------------------------------------------- forms that load


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
        if name.endswith("shift_conv.conv1x1.weight"):
            prefix = name.removesuffix("conv1x1.weight")
            mask = state[prefix + "weight"].squeeze(1).expand(value.shape[0], -1, 3, 3)
            dense[prefix + "w"] = torch.where(mask > 0, value, torch.randn(mask.shape))
            dense[prefix + "m"] = mask.clone()
        elif name.endswith("shift_conv.conv1x1.bias"):
            dense[name.removesuffix("conv1x1.bias") + "b"] = value
        elif not name.endswith("shift_conv.weight"):
            dense[name] = value
    return dense


ELAN_FORMS: dict[str, Callable[[State], Any]] = {
    "official": lambda s: s,
    "official training": lambda s: {
        "epoch": 7,
        "model_state_dict": {"module." + name: value for name, value in s.items()},
    },
    "official, masked 3x3": masked_3x3,
    "friedricelab": lambda s: {"params": friedricelab(s)},
    "basicsr with ema": lambda s: {
        "params": {name: torch.zeros_like(value) for name, value in s.items()},
        "params_ema": s,
    },
    "compiled and parallel": lambda s: {"module._orig_mod." + name: v for name, v in s.items()},
}


@pytest.mark.parametrize("form", ELAN_FORMS)
def test_elan_forms(form: str, save: Callable[[Any], Path]) -> None:
    model = small_elan()
    loaded = load_checkpoint(save(ELAN_FORMS[form](model.state_dict())))
    assert isinstance(loaded, ELAN)
    assert not loaded.training
    assert (loaded.scale, loaded.rgb_range) == (2, 255.0)
    torch.testing.assert_close(output(loaded), output(model))


def test_elan_without_mean_shift_takes_0_to_1(save: Callable[[Any], Path]) -> None:
    model = small_elan(norm=False, rgb_range=1.0)
    state = model.state_dict()
    assert not any("mean." in name and "running" not in name for name in state)
    loaded = load_checkpoint(save({"params": state}))
    assert loaded.rgb_range == 1.0
    torch.testing.assert_close(output(loaded), output(model))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_elan_light_is_recognised(scale: int, save: Callable[[Any], Path]) -> None:
    loaded = load_checkpoint(save(elan_light(scale).state_dict()))
    assert loaded.scale == scale
    assert len(loaded.body) == 12
    assert len(loaded.body[0].modules_lfe) == 2


def test_windows_can_be_given(save: Callable[[Any], Path]) -> None:
    path = save(small_elan(window_sizes=(2, 4, 8)).state_dict())
    assert load_checkpoint(path, window_sizes=(2, 4, 8)).tile_multiple == 8


def test_cross_pattern_is_read_from_the_mask(save: Callable[[Any], Path]) -> None:
    state = friedricelab(small_elan().state_dict())
    for name, value in state.items():
        if name.endswith("mask"):
            g = value.shape[0] // 5
            value.zero_()
            for group, (y, x) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
                value[group * g : (group + 1) * g, 0, y, x] = 1
            value[4 * g :, 0, 1, 1] = 1
    loaded = load_checkpoint(save({"params": state}))
    lfe = loaded.body[0].modules_lfe["lfe_0"]
    assert lfe.conv0["shift_conv"].pattern == "cross"
    x = torch.randn(1, 15, 6, 6)
    kernel = state["body.0.modules_lfe.0.lfe.0.mask"]
    moved = nn.functional.conv2d(x, kernel, padding=1, groups=15)
    convolution = lfe.conv0["shift_conv"].conv1x1
    torch.testing.assert_close(lfe.conv0["shift_conv"](x), convolution(moved))


@pytest.mark.parametrize("attention", ["branch", "branch_channel", "block"])
@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("folded", [False, True])
def test_mafdn_forms(
    attention: Any, branches: int, folded: bool, save: Callable[[Any], Path]
) -> None:
    model = small_mafdn(attention=attention, branches=branches)
    expected = output(model)
    if folded:
        model.fold()
    loaded = load_checkpoint(save(model.state_dict()))
    assert isinstance(loaded, MAFDN)
    assert loaded.folded
    assert (loaded.scale, loaded.rgb_range) == (3, 1.0)
    torch.testing.assert_close(output(loaded), expected)


def test_training_checkpoint_gives_the_averaged_weights(save: Callable[[Any], Path]) -> None:
    model, average = small_mafdn(), small_mafdn()
    content = {"model": model.state_dict(), "ema": average.state_dict(), "step": 3, "seconds": 1.0}
    torch.testing.assert_close(output(load_checkpoint(save(content))), output(average))


@pytest.mark.parametrize("build", [small_elan, small_mafdn])
def test_half_precision_safetensors(build: Any, tmp_path: Path) -> None:
    model = build()
    if isinstance(model, MAFDN):
        model.fold()
    path = tmp_path / "weights.safetensors"
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path
    )
    loaded = load_checkpoint(str(path), backend="reference")
    assert loaded.backend == "reference"
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert (output(loaded) - output(model)).abs().max() < 0.02 * model.rgb_range


def test_pretrained_names() -> None:
    assert "mafdn_x4" in PRETRAINED
    with pytest.raises(ValueError, match="mafdn_x4"):
        load_pretrained("mafdn_x7")


def test_backend_may_be_given_by_position(save: Callable[[Any], Path]) -> None:
    assert load_checkpoint(save(small_mafdn().state_dict()), "reference").backend == "reference"
    assert load_pretrained("mafdn_x4", "reference").backend == "reference"


def test_pretrained_files_are_there_and_described() -> None:
    readme = Path(__file__).resolve().parents[2] / "models" / "weights" / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, path in PRETRAINED.items():
        assert path.is_file(), f"{name}: {path} is absent"
        assert f"`{path.name}`" in text
    assert re.findall(r"@[A-Z]+@", text) == []


# ------------------------------------------------------------------------- files to be refused


class RunsCode:
    """Unpickling this without a guard creates ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message
    assert "\n" not in message


def test_absent_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_checkpoint(tmp_path / "none.pth")
    refused(tmp_path, "not a file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"these are no weights, this is a text", ["neither"]),
        (b"PK\x03\x04 but no archive", ["damaged"]),
        (b"\x80\x02 but no pickle", ["damaged"]),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json", ["damaged"]),
        (b"\x00" * 64, ["neither"]),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 32, ["neither"]),
    ],
)
def test_no_checkpoint_at_all(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    refused(path, *words)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_would_run_code(legacy: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "was_here", tmp_path / "weights.pth"
    code = RunsCode(marker)
    torch.save({"head.weight": code}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, "run code", "system")
    path.write_bytes(pickle.dumps(code))
    refused(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the file is one that must not be unpickled


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_torchscript_is_a_program(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.jit.trace(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 2, 2)).save(str(path))
    refused(path, "TorchScript", "program", "state_dict")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated(form: str, keep: float, tmp_path: Path) -> None:
    path, state = tmp_path / "weights", small_mafdn().state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    refused(path, "damaged")


CHANGES: list[tuple[Callable[[State], Any], list[str]]] = [
    (lambda s: s["blocks.1.distill.2.weight"].view(-1)[3:4].fill_(float("nan")),
     ["blocks.1.distill.2.weight", "NaN"]),
    (lambda s: s.update({"tail.bias": torch.full_like(s["tail.bias"], float("inf"))}),
     ["tail.bias", "NaN or infinite"]),
    (lambda s: s.pop("fuse.bias"), ["fuse.bias is missing"]),
    (lambda s: s.update(extra=torch.zeros(1)), ["extra is unexpected"]),
    (lambda s: s.update({"fuse.bias": torch.zeros(3)}), ["fuse.bias is of another shape"]),
    (lambda s: s.update({"tail.weight": torch.zeros(13, 8, 3, 3)}), ["13 output channels"]),
    (lambda s: s.update({"head.weight": torch.zeros(8)}), ["head.weight has shape (8,)"]),
    (lambda s: s.update({"head.weight": torch.zeros(9, 3, 3, 3)}), ["channels is 9"]),
    (lambda s: s.update({"head.weight": torch.zeros(0, 3, 3, 3)}), ["head.weight is empty"]),
    (lambda s: s.update({"head.bias": "text"}), ["'head.bias' is a str"]),
    (lambda s: s.update({"head.bias": s["head.bias"].to(torch.complex64)}), ["complex64"]),
    (lambda s: s.update({"head.bias": s["head.bias"].to_sparse()}), ["sparse"]),
    (lambda s: s.update({"head.bias": torch.zeros(8, dtype=torch.bool)}), ["head.bias", "bool"]),
    (lambda s: s.update({"head.bias": torch.zeros(8, dtype=torch.int32)}), ["head.bias", "int32"]),
    (lambda s: s.update({"head.bias": torch.zeros(8, device="meta")}), ["head.bias", "meta"]),
    (lambda s: s.update({"head.bias": torch.zeros(0)}), ["head.bias", "empty"]),
    (lambda s: s.update({"head.bias": torch.zeros(1).expand(1 << 22)}), ["head.bias", "stored"]),
    (lambda s: s.update({"blocks.999999999.x": torch.zeros(1)}),
     ["blocks.2 is missing", "blocks.999999999"]),
    (lambda s: s.update({"blocks.0.distill.99999999.x": torch.zeros(1)}),
     ["blocks.0.distill.4 is missing"]),
    (lambda s: s.update({f"blocks.{'9' * 5000}.x": torch.zeros(1)}), ["digits"]),
    # Many blocks by name times many branches by name: neither number alone says what is there.
    (lambda s: s.update({f"blocks.{i}.x": torch.zeros(1) for i in range(400)}
                        | {f"blocks.0.distill.{i}.x": torch.zeros(1) for i in range(400)}),
     ["blocks.0.distill.4.weight is missing"]),
    # 1.7 MB that would make a network of 100 GB.
    (lambda s: s.update({"head.weight": torch.zeros(1 << 14, 3, 3, 3)}), ["of another shape"]),
    (lambda s: {"params": {}}, ["no named weights"]),
    (lambda s: {"conv1.weight": torch.zeros(3), "conv2.weight": torch.zeros(3)},
     ["another network", "conv1.weight"]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_contents_that_do_not_fit(number: int, save: Callable[[Any], Path]) -> None:
    change, words = CHANGES[number]
    state = small_mafdn().state_dict()
    result = change(state)
    refused(save(result if isinstance(result, dict) else state), *words)


@pytest.mark.parametrize("content", [[], {}, 3, torch.zeros(3), "text", {"params": 3}])
def test_no_state_dict(content: Any, save: Callable[[Any], Path]) -> None:
    refused(save(content))


ELAN_CHANGES: list[tuple[Callable[[State], Any], list[str]]] = [
    (lambda s: s.pop("head.0.weight"), ["head.0.weight is missing"]),
    (lambda s: s.pop("body.1.modules_gmsa.gmsa_1.project_out.bias"),
     ["project_out.bias is missing"]),
    (lambda s: s["body.0.modules_lfe.lfe_0.conv0.shift_conv.weight"].mul_(0.5),
     ["one-hot", "body.0.modules_lfe.lfe_0.conv0.shift_conv.weight"]),
    (lambda s: s.update({"tail.0.weight": s["tail.0.weight"][:7]}), ["7 output channels"]),
    (lambda s: s.update({"head.0.weight": torch.zeros(16, 3, 3, 3)}), ["fit no network"]),
    (lambda s: s["body.0.modules_gmsa.gmsa_0.project_inp.1.running_var"].fill_(float("nan")),
     ["running_var", "NaN"]),
    (lambda s: s.update({"add_mean.bias": torch.zeros(0)}), ["add_mean.bias", "empty"]),
    (lambda s: s.update({"add_mean.bias": torch.zeros(3, dtype=torch.bool)}),
     ["add_mean.bias", "bool"]),
    (lambda s: s.update({"add_mean.bias": torch.zeros(3, device="meta")}),
     ["add_mean.bias", "meta"]),
    (lambda s: s.update({"body.999999999.x": torch.zeros(1)}), ["body.2 is missing"]),
    (lambda s: s.update({"body.0.modules_lfe.lfe_99999999.x": torch.zeros(1)}),
     ["body.0.modules_lfe.lfe_2 is missing"]),
    (lambda s: s.update({"body.0.modules_gmsa.gmsa_99999999.x": torch.zeros(1)}),
     ["body.0.modules_gmsa.gmsa_2 is missing"]),
    (lambda s: s.update({f"body.{i}.x": torch.zeros(1) for i in range(400)}
                        | {f"body.0.modules_lfe.lfe_{i}.x": torch.zeros(1) for i in range(400)}),
     ["lfe_2.conv0.shift_conv.conv1x1.weight is missing"]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ELAN_CHANGES)))
def test_elan_contents_that_do_not_fit(number: int, save: Callable[[Any], Path]) -> None:
    change, words = ELAN_CHANGES[number]
    state = small_elan().state_dict()
    change(state)
    refused(save(state), *words)


def test_masked_3x3_that_is_no_shift(save: Callable[[Any], Path]) -> None:
    state = masked_3x3(small_elan().state_dict())
    state["body.0.modules_lfe.lfe_0.conv0.shift_conv.m"][1].zero_()
    refused(save(state), "shift_conv.m", "differs")


@pytest.mark.parametrize("shape", [(0, 15, 3, 3), (0,), (15, 0, 3, 3)])
def test_masked_3x3_without_values(shape: tuple[int, ...], save: Callable[[Any], Path]) -> None:
    state = masked_3x3(small_elan().state_dict())
    for name in ("m", "w"):
        state["body.0.modules_lfe.lfe_0.conv0.shift_conv." + name] = torch.zeros(shape)
    refused(save(state), "shift_conv.", "empty")


@pytest.mark.parametrize("name", ["imdn_x4.pth", "pan_x4.pth", "dctlsa_x4.pt"])
def test_real_weights_of_other_networks(name: str, data: Path) -> None:
    refused(data / "weights" / name, "another network")
    with pytest.raises(UnknownNetworkError):
        load_checkpoint(data / "weights" / name)
