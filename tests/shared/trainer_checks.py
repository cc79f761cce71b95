"""What the trainer must do on every device: learn, average, be interrupted, go on, run out of
memory. The same bodies run on the CPU (tests/models) and on a GPU (tests/gpu)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sr_kernels.models import load_checkpoint
from sr_kernels.models.training import Config, Trainer, TrainingError, loop
from sr_kernels.models.training.data import to_device

TINY_ELAN = {"m_elan": 2, "c_elan": 15, "rgb_range": 1.0}
TINY_MAFDN = {"channels": 8, "num_blocks": 1, "branches": 2}
TINY: dict[str, dict[str, Any]] = {
    "elan_light": TINY_ELAN | {"window_sizes": [2, 4, 8]},
    "mafdn": TINY_MAFDN,
}


def write_image(path: Path, height: int, width: int, seed: int = 0) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


def quiet(_: str) -> None:
    pass


def interrupt_at(step: int, number: int = signal.SIGINT) -> Callable[[loop.Status], None]:
    """Ctrl-C (the signal itself) in that step."""

    def watch(status: loop.Status) -> None:
        if status.step == step:
            os.kill(os.getpid(), number)

    return watch


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same bits, on whichever device."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def spoil(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], torch.Tensor]
) -> None:
    """Lets ``change`` have the losses: number of the call, loss -> loss."""
    true, calls = loop.reconstruction_loss, []

    def spoiled(*arguments: Any) -> torch.Tensor:
        calls.append(0)
        return change(len(calls), true(*arguments))

    monkeypatch.setattr(loop, "reconstruction_loss", spoiled)


def tiny(folder: Path, model: str, **keys: Any) -> Config:
    """A configuration that trains a network of two layers on images in FOLDER/images."""
    images = folder / "images"
    if not images.exists():
        for number in range(3):
            write_image(images / f"{number}.png", 50, 66, number)
    given = {"model": model, "scale": 2, "options": TINY[model], "data": [str(images)]}
    given |= {"out": str(folder / "run"), "patch": 8, "batch": 2, "peak_lr": 2e-3, "steps": 20}
    return Config(**{**given, **keys})


def check_training(
    folder: Path, model: str, precision: str, device: str, backend: str, steps: int = 30
) -> None:
    """The loss falls, the averaged weights follow their recursion, and ``steps`` are half
    of them, Ctrl-C and the other half; then two more on the CPU. A GPU need not repeat every bit of
    a sum: there the state is compared where the run goes on, and the loss where it ends."""
    place = torch.device(device)
    keys = {"precision": precision, "backend": backend, "steps": steps, "ema": 0.8, "warmup": 0.1}
    keys |= {"validate": str(folder / "images"), "validate_side": 32, "validate_every": steps // 2}
    straight = Trainer(tiny(folder, model, **keys), place, note=quiet)
    own, averaged = straight.model.state_dict(), straight.average.state_dict()
    name = next(key for key in own if key.startswith("head.") and key.endswith("weight"))
    expected = own[name].clone()

    def error() -> float:
        """Of the averaged weights, on a batch that is always the same."""
        crops = [straight.crops.draw(1000 + number) for number in range(8)]
        drawn = torch.cat([c[0] for c in crops]), torch.cat([c[1] for c in crops])
        turns = torch.cat([c[2] for c in crops], 1)
        low, high = to_device((*drawn, turns), place, straight.average.rgb_range, True)
        with torch.inference_mode():
            return (straight.average(low) - high).abs().mean().item()

    def watch(status: loop.Status) -> None:
        expected.lerp_(own[name], 1 - min(0.8, status.step / (status.step + 10)))

    before = error()
    straight.run(watch)
    assert straight.step == steps
    assert error() < 0.95 * before
    assert all(value.device.type == place.type for value in own.values())
    assert all(value.dtype in (torch.float32, torch.int64) for value in own.values())
    torch.testing.assert_close(averaged[name], expected)
    assert not torch.equal(averaged[name], own[name])

    parts = tiny(folder, model, out=str(folder / "parts"), **keys)
    first = Trainer(parts, place, note=quiet)
    with pytest.raises(KeyboardInterrupt):
        first.run(interrupt_at(steps // 2))
    then = Trainer(parts, place, resume=True, note=quiet)
    assert then.step == steps // 2
    assert same(then.state(), first.state())
    assert place.type in then.state()["rng"]
    then.run()
    a, b = (torch.load(t.last, "cpu", weights_only=True) for t in (straight, then))
    assert b["loss"] == pytest.approx(a["loss"], rel=0 if place.type == "cpu" else 0.05)
    if place.type == "cpu":
        assert same([a[key] for key in ("model", "ema")], [b[key] for key in ("model", "ema")])

    keys |= {"steps": steps + 2, "backend": "auto"}
    keys |= {"precision": "float32" if precision == "float16" else precision}
    carried = tiny(folder, model, out=str(folder / "parts"), **keys)
    back = Trainer(carried, torch.device("cpu"), resume=True, note=quiet)
    assert same(back.state()["optimizer"], b["optimizer"])
    back.run()
    assert back.step == steps + 2
    assert load_checkpoint(back.last).scale == 2


def check_memory_running_out(
    folder: Path, device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward pass of step 8, after the batch statistics have changed: what is kept is the
    state after step 7, and the message says what needs less."""
    config = tiny(folder, "elan_light", backend=backend, save_minutes=60)
    trainer = Trainer(config, torch.device(device), note=quiet)
    after: list[Any] = []

    def ask_for_too_much(call: int, loss: torch.Tensor) -> torch.Tensor:
        return loss + torch.empty(1 << 60, device=device) if call == 8 else loss

    def watch(status: loop.Status) -> None:
        after[:] = [{k: v.clone() for k, v in trainer.model.state_dict().items()}]

    spoil(monkeypatch, ask_for_too_much)
    with pytest.raises(TrainingError) as caught:
        trainer.run(watch)
    said = str(caught.value)
    assert f"step 7: memory ran out on {device}, " in said
    assert f"{trainer.last} keeps the state after step 7. A smaller patch (now 8) or batch" in said
    assert "(now 2) needs less; with --resume the run goes on from there" in said
    state = torch.load(trainer.last, "cpu", weights_only=True)
    assert state["step"] == 7
    assert same(state["model"], after[0])
    smaller = tiny(folder, "elan_light", backend=backend, batch=1)
    more = Trainer(smaller, torch.device(device), resume=True, note=quiet)
    more.run()
    assert more.step == 20
