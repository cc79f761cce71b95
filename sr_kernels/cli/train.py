"""`sr-kernels train`: trains a network on folders of images."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from sr_kernels.cli import console, network
from sr_kernels.cli.errors import Failure, UsageError

NAME = "train"
SUMMARY = "train a network on folders of images"
DESCRIPTION = """\
Train ELAN or MAFDN on folders of images, on this package's kernels. CONFIG is a YAML file, or the
name of a configuration that comes with the package: elan_light_x2, _x3, _x4 and mafdn_x2, _x3, _x4
have the papers' recipes, the same with _short are for an hour or two on a CPU. Any key can be set
on the command line, the common ones with options of their own.
"""
EPILOG = """\
examples:
  sr-kernels train elan_light_x4_short --data images/ --validate Kodak24 --out run/
  sr-kernels train elan_light_x4_short --data images/ --out run/ --resume
  sr-kernels train mafdn_x4 --data DIV2K/HR --out run/ --init-from mafdn_x4 --steps 20000
  sr-kernels train mafdn_x4 --print > mine.yaml           a configuration to edit
  sr-kernels train mine.yaml --data crops.zip --out run/ --set candidates=3
  torchrun --nproc-per-node 4 -m sr_kernels train elan_light_x4 --data DIV2K/HR --out run/
  sr-kernels export-weights run/last.pt weights.safetensors

data:
  Photographs without visible noise or JPEG blocks, larger than a crop (--patch times the scale).
  They stay in memory, with 3 bytes a pixel. Low-resolution images are made from them as MATLAB's
  imresize makes them, or come from --lr-data. What cannot be read, or is too small, is named and
  left out. A packed file (sr-kernels pack) carries crops to a machine that has no images.
  Validate with images that are not trained on, and do not choose by those that you report.

what comes of it:
  OUT/last.pt, the state to go on from, every few minutes; OUT/best.pt, that of the best validation;
  OUT/log.csv, a row for each validation: loss, learning rate, PSNR and SSIM of the averaged
  weights. Ctrl-C ends the run after the step in hand, with last.pt written; the same command with
  --resume goes on exactly there, also with another --batch, --patch, rate or length.

x2 before x4:
  A network that was trained for x2 is a better beginning for x4 than a random one; all but the last
  layer is taken over.
  sr-kernels train elan_light_x2_short --data images/ --out x2/
  sr-kernels train elan_light_x4_short --data images/ --out x4/ --init-from x2/last.pt

when it fails:
  Out of memory: a smaller --patch or --batch, or --precision bfloat16 on a GPU.
  The loss is not finite: a smaller rate (--set peak_lr=1e-4), or --set clip=0.5.

docs/training.md explains every key.
exit status: 0 done, 1 something failed (stderr says what), 2 wrong command line, 130 Ctrl-C, 143
SIGTERM.
"""
# Options of keys that are often set: key -> (metavar, help); the rest is for --set.
_OPTIONS = {
    "out": ("FOLDER", "checkpoints and log"),
    "validate": ("FOLDER", "images to validate with (never trained on)"),
    "steps": ("N", "end after N steps"),
    "minutes": ("M", "end after M minutes of training"),
    "batch": ("N", "crops of a step, on each process"),
    "patch": ("N", "side of a crop in low-resolution pixels"),
    "init_from": ("NAME|FILE", "weights to begin with, of this or another scale"),
    "precision": ("TYPE", "float32, bfloat16 or (on a GPU) float16"),
    "device": ("DEVICE", "auto, cpu, cuda, cuda:1, ..."),
    "backend": ("NAME", "auto, cuda, triton, cpu, or reference for stock PyTorch"),
    "threads": ("N", "of PyTorch"),
    "seed": ("N", "of weights and crops"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a name as above")
    parser.add_argument(
        "--data", nargs="+", metavar="FOLDER|FILE", help="training images, or packed files of crops"
    )
    parser.add_argument(
        "--lr-data", nargs="+", metavar="FOLDER", help="their low-resolution images, if not bicubic"
    )
    for key, (metavar, text) in _OPTIONS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", dest=key, metavar=metavar, help=text)
    parser.add_argument("--compile", action="store_true", default=None, help="use torch.compile")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other key, in YAML"
    )
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    parser.add_argument(
        "--print", action="store_true", help="print the whole configuration and do nothing else"
    )


def run(arguments: argparse.Namespace) -> int:
    import yaml

    from sr_kernels.models import CheckpointError
    from sr_kernels.models.training import ConfigError, Trainer, TrainingError, load_config

    try:
        config = load_config(arguments.config, _overrides(arguments))
        if arguments.print:
            console.say(yaml.safe_dump(config.plain(), sort_keys=False).rstrip())
            return 0
        device, _ = network.where(config.device, config.backend)
        reading = console.Progress("reading images")
        trainer = Trainer(
            config, device, resume=arguments.resume, note=console.say, reading=reading
        )
    except ConfigError as error:
        raise UsageError(str(error)) from error
    except (OSError, ValueError, CheckpointError, TrainingError) as error:
        raise Failure(str(error)) from error

    first = int(os.environ.get("RANK", "0")) == 0
    bar = console.Progress("training", trainer.progress()) if first else None

    def watch(status: Any) -> None:
        if bar is not None:
            bar.label = f"step {status.step}  loss {status.loss:.5f}  lr {status.rate:.1e}"
            bar(min(status.progress, 1), 1)

    try:
        trainer.run(watch)
    except TrainingError as error:
        raise Failure(str(error)) from error
    except KeyboardInterrupt:
        if first:
            console.note(_stopped(trainer.step, trainer.saved, trainer.last))
        return 130
    finally:
        trainer.close()
    if first:
        console.say(f"done: {trainer.last}")
    return 0


def _stopped(step: int, saved: int | None, last: Path) -> str:
    if saved is None:
        return f"stopped after step {step}; no checkpoint had been written"
    if saved == step:
        return f"stopped after step {step}; the same command with --resume goes on there"
    return (
        f"stopped after step {step}, which is not saved; {last} has step {saved}, and the same "
        "command with --resume goes on there"
    )


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    import yaml

    keys = ("data", "lr_data", "compile", *_OPTIONS)
    given = {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: expected KEY=VALUE")
        try:
            given[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {text}: {value!r} is not YAML") from error
    return given
