"""How far 16-bit arithmetic moves a picture: PSNR on Set5 x4 in float16, bfloat16 and float32.

    python tools/psnr_change.py --device cuda --data FOLDER     # with HR and LR_bicubic/X4

For each network whose weights the package ships, through its plan and the kernels of the device.
Prints a line for each, adds rows to benchmarks/results/psnr.csv, and fails where a mean changes by
more than 0.01 dB.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sr_kernels.benchmarks import table  # noqa: E402
from sr_kernels.models import evaluate  # noqa: E402

from sr_kernels import models  # noqa: E402

LIMIT = 0.01  # dB
DTYPES = ("float32", "float16", "bfloat16")
COLUMNS = ("network", "dtype", "images", "psnr_y", "change", "device", "versions", "commit", "date")


def mean_psnr(name: str, pairs: Sequence[evaluate.Pair], device: str, dtype: str) -> float:
    model = models.load_pretrained(name).eval().to(device, getattr(torch, dtype))
    model.backend = torch.device(device).type
    fast = models.plan(model)
    outputs = ((evaluate.upscale(fast, low), high) for low, high in pairs)
    return sum(evaluate.psnr_y(out, high, model.scale) for out, high in outputs) / len(pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="PSNR in 16 bits against float32.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--networks", nargs="+", choices=models.PRETRAINED, metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "psnr.csv")
    options = parser.parse_args(arguments)
    # What is called float32 is.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = evaluate.read_pairs(options.data / "HR", options.data / "LR_bicubic" / "X4", 4)
    pairs = [pair for _, pair in found]
    where = (
        table.device_name(options.device),
        f"torch {torch.__version__}",
        table.commit(),
        datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
    rows, worst = [], 0.0
    for name in options.networks or models.PRETRAINED:
        exact = 0.0
        for dtype in DTYPES:
            mean = mean_psnr(name, pairs, options.device, dtype)
            exact = mean if dtype == "float32" else exact
            worst = max(worst, abs(mean - exact))
            print(f"{name:16} {dtype:9} {mean:8.4f} dB  {mean - exact:+.4f}", flush=True)
            rows.append((name, dtype, len(pairs), f"{mean:.4f}", f"{mean - exact:.4f}", *where))
    new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows] if new else rows)
    print(f"largest change {worst:.4f} dB, allowed {LIMIT} dB")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
