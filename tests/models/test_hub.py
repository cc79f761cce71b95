"""save_pretrained and from_pretrained on local folders; nothing here may reach for a network."""

from __future__ import annotations

import copy
import json
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sr_kernels.models import ELAN, MAFDN, CheckpointError, elan, load_checkpoint, mafdn, plan
from torch import Tensor, nn

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: sr_kernels[hub]")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a test of local folders asked for a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def small_elan(**options: Any) -> ELAN:
    return elan(2, **{"m_elan": 2, "c_elan": 15, "n_share": 1, **options}).eval()


def small_mafdn(**options: Any) -> MAFDN:
    return mafdn(3, **{"channels": 8, "num_blocks": 1, **options}).eval()


NETWORKS: dict[str, Callable[[], Any]] = {
    "elan": small_elan,
    "elan, other windows": lambda: small_elan(window_sizes=(2, 4, 8)),
    "elan, no mean, 0..255": lambda: small_elan(norm=False),
    "mafdn": small_mafdn,
    "mafdn, folded": lambda: small_mafdn().fold(),
    "mafdn, block": lambda: small_mafdn(attention="block", reduction=3),
}


def output(model: nn.Module) -> Tensor:
    x = torch.rand(1, 3, 9, 17, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = NETWORKS[name]()
    assert isinstance(model, hub.PyTorchModelHubMixin)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.training
    assert (loaded.config, loaded.rgb_range) == (model.config, model.rgb_range)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(output(loaded), output(model))
    plan(loaded)
    again = type(model)(**loaded.config)
    assert again.config == loaded.config


def test_saving_again_replaces_and_options_reach_the_network(tmp_path: Path) -> None:
    small_elan(backend="cpu").save_pretrained(tmp_path)
    model = small_elan(window_sizes=(2, 4, 8))
    model.save_pretrained(str(tmp_path))
    assert "backend" not in json.loads((tmp_path / "config.json").read_text())
    loaded = ELAN.from_pretrained(str(tmp_path), backend="reference", map_location="cpu")
    assert loaded.backend == "reference"
    assert loaded.window_sizes == (2, 4, 8)


def test_the_arguments_survive_copies(tmp_path: Path) -> None:
    model = small_elan(window_sizes=(2, 4, 8))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.save_pretrained(tmp_path)
        assert torch.equal(output(ELAN.from_pretrained(tmp_path)), output(model))


def test_channels_last_weights_and_a_loaded_checkpoint(tmp_path: Path) -> None:
    torch.save(small_mafdn().state_dict(), tmp_path / "weights.pth")
    model = load_checkpoint(tmp_path / "weights.pth").to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path / "folder")
    loaded = MAFDN.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(output(loaded), output(model))


# ---------------------------------------------------------------------------------- bad folders


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def poison(folder: Path) -> None:
    model = small_elan()
    with torch.no_grad():
        model.tail[0].bias.fill_(float("nan"))
    model.save_pretrained(folder)


CHANGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safet"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), CheckpointError, "damaged"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "holds a list"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-9]
        ),
        CheckpointError,
        "truncated or damaged",
    ),
    "another network": (lambda f: config(f, architecture="MAFDN"), CheckpointError, "of MAFDN"),
    "wrong argument": (lambda f: config(f, m_elan=3), CheckpointError, "m_elan is 3"),
    "another size": (lambda f: config(f, c_elan=30), CheckpointError, "of another shape"),
    "another depth": (lambda f: config(f, m_elan=4), CheckpointError, "is missing"),
    "not finite": (poison, CheckpointError, "NaN"),
    "other weights": (
        lambda f: save_file(small_mafdn().state_dict(), f / "model.safetensors"),
        CheckpointError,
        "does not fit ELAN",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_folder(name: str, tmp_path: Path) -> None:
    change, error, message = CHANGES[name]
    small_elan().save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(error, match=message):
        ELAN.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["/absent/folder", "./absent", "~/absent", "absent", "a/b/c", "config.json"]
)
def test_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        ELAN.from_pretrained(name)


def test_without_huggingface_hub() -> None:
    program = """
import sys
sys.modules["huggingface_hub"] = None
import torch
from sr_kernels.models import ELAN, mafdn
model = mafdn(2, channels=8, num_blocks=1)
assert model(torch.rand(1, 3, 4, 4)).shape == (1, 3, 8, 8)
for method in (model.save_pretrained, model.push_to_hub, ELAN.from_pretrained):
    try:
        method("folder")
    except ImportError as error:
        assert method.__name__ in str(error) and "sr_kernels[hub]" in str(error), error
    else:
        raise AssertionError(method)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
