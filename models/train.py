"""Train MAFDN on a folder of images, and export what was trained.

    python -m sr_kernels.models.train fit --data IMAGES --out RUN --minutes 90
    python -m sr_kernels.models.train export RUN/last.pt WEIGHTS.safetensors

Low-resolution images are made from the given ones by Pillow's antialiased bicubic reduction,
which is MATLAB's ``imresize`` kernel up to rounding. L1 loss, Adam, random crops with flips and
transposition, an exponential moving average (EMA) of the weights. The learning rate follows the
*clock*: a short warm-up and a cosine down to zero at the end of ``--minutes``, so that a run on
a busy machine still ends annealed. A run that was interrupted goes on with the same command.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sr_kernels._files import whole_or_nothing

from .checkpoints import load_checkpoint
from .evaluate import Pair, image_files, make_pair, psnr_y, to_tensor, upscale
from .mafdn import MAFDN


def load_pairs(folders: list[Path], scale: int, smallest: int, cache: Path | None) -> list[Pair]:
    """Every image of the folders as a pair, decoded once; ``cache`` (.npz) keeps the result."""
    if cache is not None and cache.exists():
        with np.load(cache) as stored:
            count = len(stored.files) // 2
            return [(stored[f"lr{i}"], stored[f"hr{i}"]) for i in range(count)]
    pairs: list[Pair] = []
    for path in image_files(folders):
        with Image.open(path) as image:
            if min(image.size) >= smallest * scale:
                pairs.append(make_pair(image, scale))
    if not pairs:
        raise ValueError(f"no image is at least {smallest * scale} pixels in both directions")
    if cache is not None:
        arrays = {f"lr{i}": lr for i, (lr, _) in enumerate(pairs)}
        arrays |= {f"hr{i}": hr for i, (_, hr) in enumerate(pairs)}
        np.savez(cache, **arrays)  # type: ignore[arg-type]
    return pairs


class Crops:
    """Random augmented crops; of ``candidates`` drawn each time the most textured is taken.

    Flat crops teach little: nearly all of them are already right after interpolation.
    """

    def __init__(
        self, pairs: list[Pair], scale: int, patch: int, batch: int, candidates: int, seed: int
    ) -> None:
        self.pairs, self.scale, self.patch, self.batch = pairs, scale, patch, batch
        self.candidates = candidates
        self.random = np.random.default_rng(seed)
        # Images are drawn by the square root of their area: small sharp sets still count.
        areas = np.array([lr.shape[0] * lr.shape[1] for lr, _ in pairs], dtype=np.float64)
        self.probability = np.sqrt(areas) / np.sqrt(areas).sum()

    def one(self) -> Pair:
        p, s, rng = self.patch, self.scale, self.random
        best: tuple[float, Pair] | None = None
        for _ in range(self.candidates):
            lr, hr = self.pairs[rng.choice(len(self.pairs), p=self.probability)]
            y = int(rng.integers(lr.shape[0] - p + 1))
            x = int(rng.integers(lr.shape[1] - p + 1))
            a = lr[y : y + p, x : x + p]
            green = a[..., 1].astype(np.int16)
            texture = float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green)).mean())
            if best is None or texture > best[0]:
                best = texture, (a, hr[y * s : (y + p) * s, x * s : (x + p) * s])
        assert best is not None
        lr, hr = best[1]
        if rng.random() < 0.5:
            lr, hr = lr[:, ::-1], hr[:, ::-1]
        if rng.random() < 0.5:
            lr, hr = lr[::-1], hr[::-1]
        if rng.random() < 0.5:
            lr, hr = lr.transpose(1, 0, 2), hr.transpose(1, 0, 2)
        return lr, hr

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            drawn = [self.one() for _ in range(self.batch)]
            yield to_tensor([lr for lr, _ in drawn]), to_tensor([hr for _, hr in drawn])


def validate(model: nn.Module, pairs: list[Pair], scale: int) -> float:
    """Mean Y-PSNR (dB) of the model over the pairs, output rounded to 8 bits."""
    return sum(psnr_y(upscale(model, lr), hr, scale) for lr, hr in pairs) / len(pairs)


def learning_rate(peak: float, progress: float, warmup: float) -> float:
    """Linear warm-up over the first ``warmup`` of the time, then a cosine to 0 at the end."""
    if progress < warmup:
        return peak * max(progress / warmup, 0.01)
    rest = min((progress - warmup) / (1 - warmup), 1.0)
    return peak * 0.5 * (1 + math.cos(math.pi * rest))


def save_atomically(state: dict[str, object], path: Path) -> None:
    """An interrupted save leaves the previous file whole."""
    with whole_or_nothing(path) as file:
        torch.save(state, file)


def fit(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    last, log = out / "last.pt", out / "log.txt"

    pairs = load_pairs(args.data, args.scale, args.patch, args.cache)
    print(
        f"{len(pairs)} images, {sum(hr.size for _, hr in pairs) / 3e6:.1f} megapixels", flush=True
    )
    held_out: list[Pair] = []
    for path in image_files([args.validate])[:: args.validate_every] if args.validate else []:
        with Image.open(path) as image:  # a centre crop is enough to watch a run by
            side = min(args.validate_side, *image.size)
            x, y = (image.width - side) // 2, (image.height - side) // 2
            held_out.append(make_pair(image.crop((x, y, x + side, y + side)), args.scale))

    model = MAFDN(args.scale).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = MAFDN(args.scale)
    average.load_state_dict(model.state_dict())
    average.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))
    step, spent = 0, 0.0  # spent: seconds of training before this start
    if last.exists():
        state = torch.load(last, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        print(f"going on from step {step}, {spent / 60:.1f} minutes", flush=True)

    def objective(lr: Tensor, hr: Tensor) -> Tensor:
        return (model(lr) - hr).abs().mean()

    loss_of = torch.compile(objective) if args.compile else objective
    sources = list(model.state_dict().values())
    targets = list(average.state_dict().values())
    crops = Crops(pairs, args.scale, args.patch, args.batch, args.candidates, args.seed + step)
    budget = args.minutes * 60
    begin, shown, mean_loss, first = time.monotonic() - spent, 0.0, 0.0, step
    next_check = spent + args.check_seconds

    for lr, hr in crops:
        seconds = time.monotonic() - begin
        if seconds >= budget:
            break
        rate = learning_rate(args.lr, seconds / budget, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(lr, hr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        if not bool(torch.isfinite(norm)):
            print(f"\nstep {step}: gradient is not finite; step left out", flush=True)
            continue
        optimizer.step()
        step += 1
        with torch.no_grad():  # the first steps are averaged over a shorter memory
            torch._foreach_lerp_(targets, sources, 1 - min(args.ema, step / (step + 10)))
        mean_loss += (loss.item() - mean_loss) / min(step - first, 100)

        if seconds - shown > 5 or step == 1:
            shown = seconds
            done = int(30 * seconds / budget)
            print(
                f"\r[{'#' * done}{'.' * (30 - done)}] {seconds / 60:5.1f}/{args.minutes:g} min  "
                f"step {step}  loss {mean_loss:.5f}  lr {rate:.2e}",
                end="",
                flush=True,
            )
        if seconds > next_check:
            next_check = seconds + args.check_seconds
            save(last, model, average, optimizer, step, time.monotonic() - begin, args)
            score = validate(average, held_out, args.scale) if held_out else math.nan
            report(log, step, seconds, mean_loss, score)

    save(last, model, average, optimizer, step, time.monotonic() - begin, args)
    score = validate(average, held_out, args.scale) if held_out else math.nan
    report(log, step, time.monotonic() - begin, mean_loss, score)


def save(
    path: Path,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    args: argparse.Namespace,
) -> None:
    save_atomically(
        {
            "model": model.state_dict(),
            "ema": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
            "scale": args.scale,
        },
        path,
    )


def report(log: Path, step: int, seconds: float, loss: float, score: float) -> None:
    line = f"step {step}  {seconds / 60:.1f} min  loss {loss:.5f}  validation {score:.3f} dB"
    print("\n" + line, flush=True)
    with log.open("a") as file:
        file.write(line + "\n")


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights of a training checkpoint: folded, half precision, safetensors."""
    from safetensors.torch import save as to_bytes

    model = load_checkpoint(args.checkpoint)
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} does not fit into half precision")
    metadata = {
        "architecture": type(model).__name__,
        "scale": str(model.scale),
        "rgb_range": str(model.rgb_range),
    }
    with whole_or_nothing(args.weights) as file:
        file.write(to_bytes(tensors, metadata))
    print(f"{args.weights}: {sum(value.numel() for value in tensors.values())} parameters")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m sr_kernels.models.train",
        description="Train MAFDN on a folder of images; export what was trained.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("fit", help="train")
    run.add_argument("--data", type=Path, nargs="+", required=True, help="training folders")
    run.add_argument("--out", type=Path, required=True, help="folder of checkpoint and log")
    run.add_argument("--scale", type=int, default=4, choices=(2, 3, 4))
    run.add_argument("--minutes", type=float, default=90, help="wall clock the run may take")
    run.add_argument("--batch", type=int, default=16)
    run.add_argument("--patch", type=int, default=32, help="side of a crop, in LR pixels")
    run.add_argument("--candidates", type=int, default=2, help="crops drawn for each one used")
    run.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    run.add_argument("--warmup", type=float, default=0.03, help="share of the time")
    run.add_argument("--clip", type=float, default=0.5, help="largest gradient norm")
    run.add_argument("--ema", type=float, default=0.999)
    run.add_argument("--seed", type=int, default=1)
    run.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    run.add_argument("--compile", action="store_true", help="torch.compile the training step")
    run.add_argument("--cache", type=Path, help=".npz file that keeps the decoded images")
    run.add_argument("--validate", type=Path, help="folder of held-out images")
    run.add_argument("--validate-every", type=int, default=4, help="use every n-th of them")
    run.add_argument("--validate-side", type=int, default=256, help="centre crop, HR pixels")
    run.add_argument("--check-seconds", type=float, default=120, help="validate and save")
    out = commands.add_parser("export", help="write weights to ship")
    out.add_argument("checkpoint", type=Path, help="last.pt of a run")
    out.add_argument("weights", type=Path, help="file to write, .safetensors")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        fit(args) if args.command == "fit" else export(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
