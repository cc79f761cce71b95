from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from from_file import load
from PIL import Image
from threads import threads

from sr_kernels import cli
from sr_kernels.cli import network

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The network is next to nothing: more threads would only wait for each other."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def nearest_class() -> Any:
    return load(HERE / "nearest.py").Nearest


@dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nearest_class: Any
) -> Callable[..., Outcome]:
    """The command line in this process, with the cheap network in the place of shipped weights."""

    def call(*arguments: object, net: Any = None) -> Outcome:
        monkeypatch.setattr(network, "load_shipped", lambda *_: net or nearest_class())
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse after --help
            status = leaving.code if isinstance(leaving.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """The same in a process of its own."""

    def call(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(HERE / "nearest.py"), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    return call


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small RGB PNG."""
    path = tmp_path / "photo.png"
    Image.fromarray(gradient(12, 20)).save(path)
    return path


def gradient(height: int, width: int) -> np.ndarray:
    """A smooth RGB picture with all levels different in x, y and channel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)
