"""The wheel: one for every Python >= 3.10, whole, and independent of the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "setup.py").exists(), reason="the tests run without the source tree"
    ),
]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    drop = ("SR_KERNELS_", "PYTHON", "LD_PRELOAD")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return {**kept, "SR_KERNELS_BUILD_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """Built with the object files that are there: `pip wheel` compiles what has changed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"]
    command += ["--no-deps", "--no-index", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    [result] = folder.glob("*.whl")
    return result


@pytest.fixture(scope="module")
def site(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Path:
    """The wheel installed in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--target", str(folder), str(wheel)]
    subprocess.run(command, env=environment, check=True)
    return folder


# Run before everything: nothing of the source tree can be imported, installed in editable form or
# not.
ISOLATE = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path[:] = [p for p in sys.path if p != "" and not p.startswith({str(ROOT)!r} + "/sr_kernels")]
assert {str(ROOT)!r} not in sys.path
"""


def run_isolated(
    site: Path, cwd: Path, environment: dict[str, str], code: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ISOLATE + code],
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )


def test_tag_says_every_python(wheel: Path) -> None:
    name, _, python, abi, platform = wheel.stem.split("-")
    assert name == "sr_kernels"
    assert (python, abi) == ("cp310", "abi3")
    assert platform.startswith("linux_")
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [n for n in archive.namelist() if n.endswith(".dist-info/WHEEL")]
        text = archive.read(metadata).decode()
    assert "Root-Is-Purelib: false" in text
    assert f"Tag: cp310-abi3-{platform}" in text


def test_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "sr_kernels/_C.abi3.so" in names
    assert "sr_kernels/_C_cuda.abi3.so" not in names
    assert "sr_kernels/_build.json" in names
    assert "sr_kernels/py.typed" in names
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"sr_kernels", "sr_kernels_cli.py"}
    folders = ("sr_kernels", "models", "benchmarks")
    for source in (file for folder in folders for file in ROOT.glob(f"{folder}/**/*.py")):
        relative = source.relative_to(ROOT)
        inside = relative if relative.parts[0] == "sr_kernels" else Path("sr_kernels") / relative
        assert inside.as_posix() in names
    for folder, inside in (
        ("models/weights", "models/weights"),
        ("sr_kernels/cli/assets", "cli/assets"),
    ):
        for file in (ROOT / folder).glob("*"):
            assert f"sr_kernels/{inside}/{file.name}" in names
    assert "sr_kernels/benchmarks/cases.yaml" in names
    assert not [n for n in names if n.endswith(("results.csv", ".svg"))]
    assert not [n for n in names if "__pycache__" in n or n.endswith((".cpp", ".cu", ".o"))]


def test_works_without_the_source_tree(
    site: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = run_isolated(
        site,
        tmp_path,
        environment,
        """
import torch, sr_kernels, sr_kernels.models
print(sr_kernels.__file__)
print(sr_kernels.models.__file__)
x, weight = torch.randn(1, 10, 7, 9, requires_grad=True), torch.randn(10, 10, 1, 1)
ours = sr_kernels.shift_conv2d(x, weight, activation="relu", backend="cpu")
torch.testing.assert_close(ours, sr_kernels.reference.shift_conv2d(x, weight, activation="relu"))
ours.sum().backward()
assert x.grad is not None
try:
    import csrc
except ModuleNotFoundError:
    print("no sources")
""",
    )
    assert run.returncode == 0, run.stderr
    package, models, sources = run.stdout.splitlines()
    assert Path(package).is_relative_to(site)
    assert Path(models).is_relative_to(site)
    assert sources == "no sources"


def test_shipped_weights_come_with_it(
    site: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = run_isolated(
        site,
        tmp_path,
        environment,
        """
import torch, sr_kernels.models as models
for name in models.PRETRAINED:
    model = models.load_pretrained(name, backend="cpu")
    with torch.no_grad():
        y = model(torch.rand(1, 3, 5, 6) * model.rgb_range)
    assert y.shape == (1, 3, 5 * model.scale, 6 * model.scale), name
print("done")
""",
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"


def test_command_line_is_installed(site: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    script = site / "bin" / "sr-kernels"
    assert script.exists()
    run = run_isolated(
        site,
        tmp_path,
        environment,
        f"import runpy; sys.argv = ['sr-kernels', '--help']; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')",
    )
    assert run.returncode == 0, run.stderr
    assert "upscale" in run.stdout


def test_without_libraries_it_is_a_pure_package(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"]
    command += ["--no-deps", "--no-index", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, env={**environment, "SR_KERNELS_BUILD": "0"}, check=True)
    [pure] = tmp_path.glob("*.whl")
    assert pure.stem.endswith("py3-none-any")
    with zipfile.ZipFile(pure) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
