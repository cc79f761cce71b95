"""ONNX files that compute what the network computes, and torch.export with our operators kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sr_kernels.models import elan, load_pretrained, mafdn, plan
from torch import Tensor, nn

import sr_kernels
from sr_kernels import export

NETWORKS: dict[str, Callable[[], Any]] = {
    "elan": lambda: elan(2, m_elan=2, c_elan=15, n_share=1, window_sizes=(2, 4, 8), rgb_range=1.0),
    "mafdn": lambda: mafdn(3, channels=8, num_blocks=1, branches=2),
}


def network(name: str, planned: bool) -> Any:
    model = NETWORKS[name]().eval()
    return plan(model) if planned else model


def runtime(file: Path) -> Callable[[Tensor], Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


@pytest.fixture
def onnx() -> Any:
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


# -------------------------------------------------------------------------------------- to ONNX


@pytest.mark.parametrize("planned", [False, True], ids=["network", "plan"])
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_file_of_standard_operators(
    name: str, planned: bool, tmp_path: Path, onnx: Any
) -> None:
    model = network(name, planned)
    model.backend = "cpu"  # a wish of the user's that the file cannot fulfil
    x = torch.rand(1, 3, 11, 19)
    file = sr_kernels.export_onnx(model, x, tmp_path / "network.onnx")
    content = onnx.load(str(file))
    assert {node.domain for node in content.graph.node} == {""}
    with torch.no_grad():
        torch.testing.assert_close(runtime(file)(x), model(x), rtol=0, atol=1e-5)
    assert model.backend == "cpu"
    assert [other.name for other in tmp_path.iterdir()] == ["network.onnx"]


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_file_of_any_size(name: str, tmp_path: Path, onnx: Any) -> None:
    model = network(name, planned=True)
    sample = torch.rand(1, 3, 11, 6)
    run = runtime(sr_kernels.export_onnx(model, sample, tmp_path / "a.onnx", dynamic=True))
    for height, width in ((1, 1), (3, 17), (16, 8), (24, 5)):
        x = torch.rand(1, 3, height, width)
        torch.testing.assert_close(run(x), model(x), rtol=0, atol=1e-5)


def test_onnx_file_of_the_sample_size_refuses_others(tmp_path: Path, onnx: Any) -> None:
    model = network("mafdn", planned=False)
    run = runtime(sr_kernels.export_onnx(model, torch.rand(1, 3, 6, 6), tmp_path / "a.onnx"))
    with pytest.raises(Exception, match="invalid dimensions"):
        run(torch.rand(1, 3, 7, 6))


def test_onnx_file_of_trained_weights(tmp_path: Path, onnx: Any) -> None:
    model = plan(load_pretrained("mafdn_x4"))
    x = torch.rand(1, 3, 16, 16)
    run = runtime(sr_kernels.export_onnx(model, x, tmp_path / "mafdn.onnx"))
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=1e-5)


class Foreign(nn.Module):
    """Someone else's network, with a pixel attention of the usual form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class Operators(Foreign):
    """The same after our operator has taken its place."""

    def forward(self, x: Tensor) -> Tensor:
        return sr_kernels.pixel_attention(x, self.conv.weight, self.conv.bias)


def test_onnx_file_of_a_swapped_layer(tmp_path: Path, onnx: Any) -> None:
    model = nn.Sequential(Foreign(), nn.PixelShuffle(1))
    x = torch.rand(1, 3, 5, 7)
    with torch.no_grad():
        expected = model(x)
    model[0].__class__ = Operators
    run = runtime(sr_kernels.export_onnx(model, x, tmp_path / "a.onnx", dynamic=True))
    torch.testing.assert_close(run(x), expected)


class Random(nn.Module):
    """Differs at every call, as an export that goes wrong differs from its network."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class ThreeTimes(nn.Module):
    """Tracing forgets the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[2] < 6 else 3 * x


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such picture")


X = torch.rand(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("model", "sample", "dynamic", "error", "message"),
    [
        (Random(), X, False, RuntimeError, "differs from the model by"),
        (ThreeTimes(), X, True, RuntimeError, r"differs .* shape \(1, 3, 8, 8\)"),
        (Two(), X, False, TypeError, "returns a tuple"),
        (Breaks(), X, False, RuntimeError, "cannot export Breaks to ONNX: no such picture"),
        (nn.ReLU(), X[0], False, ValueError, r"sample must be \(N, C, H, W\)"),
        (nn.ReLU(), [X], False, TypeError, "sample must be a tensor, got list"),
        (torch.relu, X, False, TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_bad_export_leaves_no_file(
    model: Any,
    sample: Any,
    dynamic: bool,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    onnx: Any,
) -> None:
    file = tmp_path / "network.onnx"
    file.write_bytes(b"of an earlier run")
    with pytest.raises(error, match=message):
        sr_kernels.export_onnx(model, sample, file, dynamic=dynamic)
    assert [other.name for other in tmp_path.iterdir()] == ["network.onnx"]
    assert file.read_bytes() == b"of an earlier run"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*sr_kernels\[onnx\]"):
        sr_kernels.export_onnx(nn.ReLU(), X, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_absent_folder(tmp_path: Path, onnx: Any) -> None:
    with pytest.raises((OSError, RuntimeError), match="absent"):
        sr_kernels.export_onnx(nn.ReLU(), X, tmp_path / "absent" / "a.onnx")


def test_verification_may_be_left_out(tmp_path: Path, onnx: Any) -> None:
    assert export.export_onnx(Random(), X, tmp_path / "a.onnx", verify=False).is_file()


# --------------------------------------------------------------------------------- torch.export

KEPT = {
    ("elan", False): {
        "shift_conv2d",
        "shift_conv_block",
        "grouped_window_attention",
        "apply_grouped_window_scores",
    },
    ("elan", True): {
        "shift_conv_block",
        "grouped_attention_block",
        "apply_grouped_attention_block",
        "conv3x3",
    },
    ("mafdn", False): {"pixel_spatial_attention", "channel_gate", "gated_conv1x1"},
    ("mafdn", True): {
        "pixel_spatial_attention",
        "channel_gate",
        "gated_conv1x1",
        "shift_conv2d",
        "conv3x3",
    },
}


@pytest.mark.parametrize(("name", "planned"), KEPT)
def test_torch_export_keeps_the_operators(name: str, planned: bool) -> None:
    model = network(name, planned)
    multiple = model.tile_multiple  # of other sizes torch exports one
    rows, columns = torch.export.Dim("rows", min=2), torch.export.Dim("columns", min=2)
    x = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        program = torch.export.export(
            model, (x,), dynamic_shapes=[{2: multiple * rows, 3: multiple * columns}]
        )
        targets = (str(node.target).split(".") for node in program.graph.nodes)
        assert {target[1] for target in targets if target[0] == "sr_kernels"} == KEPT[name, planned]
        for height, width in ((16, 24), (32, 16)):
            x = torch.rand(1, 3, height, width)
            torch.testing.assert_close(program.module()(x), model(x))


def test_torch_export_of_a_size_that_is_padded() -> None:
    model, x = network("elan", planned=True), torch.rand(1, 3, 13, 18)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
