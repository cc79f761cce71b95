"""How much faster are other people's networks with one line more? Run from a checkout:

    python benchmarks/patching.py --weights FOLDER --image PHOTO [--threads 2] [--rounds 7]

The networks are those of ``tests/patch/third_party.py``, with the files that the folder has of
elan_light_x4_official_keys.pth, elan_light_x4_frl_keys.pth, imdn_x4.pth, pan_x4.pth and
dctlsa_x4.pt. Each runs as it is and patched, in turns, on the same photograph; the outputs are
compared first. Times are medians with their 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sr_kernels.benchmarks.measure import percentile
from sr_kernels.benchmarks.networks import photograph
from torch import Tensor, nn

import sr_kernels

TESTS = Path(__file__).resolve().parents[1] / "tests" / "patch"


def networks() -> dict[str, tuple[Callable[[], nn.Module], float, tuple[int, int]]]:
    """file: (network, value of white, size of the input)."""
    sys.path.insert(0, str(TESTS))
    other: Any = importlib.import_module("third_party")
    return {
        "elan_light_x4_official_keys.pth": (other.ELAN, 255.0, (180, 320)),
        "elan_light_x4_frl_keys.pth": (
            lambda: other.ELAN(spelling="friedricelab"),
            255.0,
            (180, 320),
        ),
        "imdn_x4.pth": (other.IMDN, 1.0, (180, 320)),
        "pan_x4.pth": (other.PAN, 1.0, (180, 320)),
        "dctlsa_x4.pt": (other.DCTLSA, 1.0, (96, 96)),
    }


def load(path: Path, build: Callable[[], nn.Module]) -> nn.Module:
    """The network with these weights, whatever the file wraps them in."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {k.removeprefix("module."): v for k, v in state.get("params", state).items()}
    if "tail.weight" in state:
        state = {k.replace("tail.", "tail.0."): v for k, v in state.items()}
    model = build()
    model.load_state_dict(state)
    return model.eval()


def seconds(model: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


def spread(times: list[float]) -> str:
    middle, low, high = (1e3 * percentile(times, share) for share in (0.5, 0.2, 0.8))
    return f"{middle:8.1f} ({low:.1f} .. {high:.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the files above")
    parser.add_argument("--image", type=Path, required=True, help="a photograph")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}; ms, median (p20 .. p80)")
    for name, (build, white, (height, width)) in networks().items():
        file = options.weights / name
        if not file.exists():
            print(f"{name}: not in {options.weights}")
            continue
        stock = load(file, build)
        ours = copy.deepcopy(stock)
        report = sr_kernels.patch(ours)
        x = photograph(options.image, 1, height, width, white)
        times: dict[str, list[float]] = {"stock": [], "patched": []}
        with torch.inference_mode():
            error = float((ours(x) - stock(x)).abs().max()) / white
            if not error < 1e-3:
                raise SystemExit(f"{name}: the output differs by {error:.1e} of the range")
            for _ in range(options.rounds):
                times["stock"].append(seconds(stock, x))
                times["patched"].append(seconds(ours, x))
        ratio = percentile(times["stock"], 0.5) / percentile(times["patched"], 0.5)
        print(
            f"{name} {height}x{width}: stock {spread(times['stock'])}, "
            f"patched {spread(times['patched'])}, {ratio:.2f} times as fast, "
            f"{len(report.replaced)} modules replaced, output differs by {error:.0e} of the range"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
