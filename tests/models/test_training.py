"""Training on a few synthetic images: resuming, interruptions, what is refused, what is written."""

from __future__ import annotations

import csv
import errno
import functools
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sr_kernels.models import (
    CheckpointError,
    elan_light,
    load_checkpoint,
    load_pretrained,
    mafdn,
)
from sr_kernels.models.imresize import downscale
from sr_kernels.models.training import (
    CONFIGS,
    Config,
    ConfigError,
    Trainer,
    TrainingError,
    config,
    export_weights,
    load_config,
    loop,
)
from sr_kernels.models.training.data import Crops, load_pairs, load_validation, to_device
from sr_kernels.models.training.loop import learning_rate, reconstruction_loss
from sr_kernels.models.training.start import fresh_network, take_weights
from threads import threads
from trainer_checks import (
    TINY_ELAN,
    TINY_MAFDN,
    check_memory_running_out,
    check_training,
    interrupt_at,
    quiet,
    same,
    spoil,
    tiny,
    write_image,
)

from sr_kernels import cli

pytestmark = pytest.mark.unpoisoned  # it would be most of the time of a step of a tiny network

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are next to nothing: more threads would only wait for each other."""
    with threads(1):
        yield


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(3):
        write_image(tmp_path / "images" / f"{number}.png", 50, 66, number)
    return tmp_path / "images"


@pytest.fixture
def make(images: Path, tmp_path: Path) -> Callable[..., Config]:
    """A configuration that trains a network of two layers on the images."""
    return lambda model="elan_light", **keys: tiny(tmp_path, model, **keys)


# ---------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_configuration_holds(name: str) -> None:
    it = load_config(name)
    assert name.startswith(f"{it.model}_x{it.scale}")
    assert (it.minutes is not None) == name.endswith("_short")
    assert (it.steps is None) == name.endswith("_short")


def test_six_networks_have_a_recipe_and_a_short_one() -> None:
    names = {f"{m}_x{s}" for m in ("elan_light", "mafdn") for s in (2, 3, 4)}
    assert set(CONFIGS) == names | {f"{name}_short" for name in names}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pathc: 3", "no key 'pathc'; did you mean 'patch'"),
        ("xyzzy: 3", "no key 'xyzzy'; accepted are model, scale"),
        ("patch: many", "patch is 'many'; accepted: a whole number >= 4"),
        ("patch: 8.5", "patch is 8.5"),
        ("patch: true", "patch is True"),
        ("scale: 5", "scale is 5; accepted: 2, 3, 4"),
        ("model: edsr", "model is 'edsr'; accepted: elan, elan_light, mafdn"),
        ("peak_lr: -1", "peak_lr is -1; accepted: a number >= 0"),
        ("peak_lr: .nan", "peak_lr is nan"),
        ("ema: 1", "ema is 1; accepted: a number >= 0 and < 1"),
        ("betas: [0.9]", "betas is [0.9]; accepted: 2 numbers"),
        ("milestones: [0.5, 0.2]", "milestones is [0.5, 0.2]; accepted: a rising list"),
        ("compile: perhaps", "compile is 'perhaps'; accepted: true or false"),
        ("data: [1]", "data is [1]; accepted: a folder or packed file, or a list of such"),
        ("options: 3", "options is 3; accepted: a mapping"),
        ("precision: float8", "precision is 'float8'; accepted: float32, bfloat16, float16"),
        ("lr_data: low", "lr_data is ['low'], but data is not set"),
        ("model: mafdn\ntail_init: 0.3", "tail_init 0.3; mafdn"),
        ("base: mafdn", "base is 'mafdn'; accepted: elan_light_x2"),
        ("base: [x]", "base is ['x']; accepted: elan_light_x2"),
        ("- 3", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_configurations(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert words in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_base_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: elan_light_x2_short\npeak_lr: 3e-4\nbatch: 7\n")
    it = load_config(str(path), {"batch": "9", "minutes": None, "steps": 5})
    assert (it.scale, it.peak_lr, it.batch, it.patch) == (2, 3e-4, 9, 32)
    assert (it.minutes, it.steps) == (None, 5)
    with pytest.raises(ConfigError, match="did you mean 'minutes'"):
        load_config(str(path), {"minute": 1})
    with pytest.raises(ConfigError, match="did you mean mafdn_x4"):
        load_config("mafdn_x5")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data": []}, "data is not set: give --data"),
        ({"out": None}, "out is not set"),
        ({"steps": None}, "neither steps nor minutes"),
        ({"precision": "float16"}, "precision is 'float16'; on cpu accepted: float32, bfloat16"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"options": {"chanels": 3}}, "options is {'chanels': 3}: .*chanels"),
        ({"options": {"c_elan": -1}}, "c_elan is -1; expected at least 1"),
        ({"options": {"window_sizes": [0, 4, 8]}}, r"window_sizes is \[0, 4, 8\]; expected sides"),
        ({"options": {"rgb_range": 0}}, "rgb_range is 0; expected a number > 0"),
    ],
)
def test_what_a_run_needs(keys: dict[str, Any], words: str, make: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=words):
        Trainer(make(**keys), CPU, note=quiet)


# ------------------------------------------------------------------------------------------- data


def test_crops_belong_together_and_depend_on_the_step(images: Path) -> None:
    pairs = load_pairs([str(images)], [], 2, 8, quiet)
    crops = Crops(pairs, 2, 8, 4, 2, 1)
    lr, hr, turns = crops.draw(5)
    assert (lr.shape, hr.shape, turns.shape) == ((4, 8, 8, 3), (4, 16, 16, 3), (3, 4))
    inner = slice(2, -2)  # a crop's border was made from pixels outside of it
    for low, high in zip(lr.numpy(), hr.numpy(), strict=True):
        assert np.array_equal(downscale(high, 2)[inner, inner], low[inner, inner])
    assert same(crops.draw(5), (lr, hr, turns))
    others = [crops.draw(6), Crops(pairs, 2, 8, 4, 2, 1, rank=1).draw(5)]
    others.append(Crops(pairs, 2, 8, 4, 2, 2).draw(5))
    assert not any(torch.equal(lr, other[0]) for other in others)


def test_the_most_textured_candidate_is_taken(tmp_path: Path) -> None:
    half = np.zeros((40, 80, 3), np.uint8)
    half[:, 40:] = np.random.default_rng(0).integers(0, 256, (40, 40, 3))
    (tmp_path / "a").mkdir()
    Image.fromarray(half).save(tmp_path / "a" / "a.png")
    pairs = load_pairs([str(tmp_path / "a")], [], 2, 4, quiet)
    flat = [
        sum(not Crops(pairs, 2, 4, 1, n, 1).draw(step)[1].any() for step in range(60))
        for n in (1, 8)
    ]
    assert flat[0] > 10
    assert flat[1] == 0


@pytest.mark.parametrize("turn", range(8))
def test_turns(turn: int) -> None:
    """The eight turns, the same for both images."""
    lr, hr = (torch.randint(256, (1, n, n, 3), dtype=torch.uint8) for n in (4, 8))
    bits = [bool(turn >> k & 1) for k in range(3)]
    turned = to_device((lr, hr, torch.tensor(bits)[:, None]), CPU, 1.0, True)
    for before, after in zip((lr, hr), turned, strict=True):
        expected = before[0].numpy()
        expected = expected[:, ::-1] if bits[0] else expected
        expected = expected[::-1] if bits[1] else expected
        expected = expected.transpose(1, 0, 2) if bits[2] else expected
        assert after.is_contiguous(memory_format=torch.channels_last)
        actual = (after[0] * 255).round().permute(1, 2, 0).numpy()
        assert np.array_equal(actual, expected)


def test_given_low_resolution_images(images: Path, tmp_path: Path) -> None:
    for path in images.iterdir():
        low = downscale(np.asarray(Image.open(path)), 2) // 2  # another degradation
        (tmp_path / "low").mkdir(exist_ok=True)
        Image.fromarray(low).save(tmp_path / "low" / f"{path.stem}x2.png")
    pairs = load_pairs([str(images)], [str(tmp_path / "low")], 2, 8, quiet)
    assert len(pairs) == 3
    assert np.array_equal(pairs[0][0], downscale(pairs[0][1], 2) // 2)
    (tmp_path / "low" / "2x2.png").rename(tmp_path / "low" / "2x3.png")
    with pytest.raises(FileNotFoundError, match=r"0 low-resolution images for 2\.png"):
        load_pairs([str(images)], [str(tmp_path / "low")], 2, 8, quiet)


def test_low_resolution_images_of_another_scale(images: Path, tmp_path: Path) -> None:
    for path in images.iterdir():
        write_image(tmp_path / "low" / path.name, 12, 16)
    with pytest.raises(ValueError, match=r"low/0\.png is 16x12 .*0\.png \(66x50\) reduced by 2"):
        load_pairs([str(images)], [str(tmp_path / "low")], 2, 8, quiet)


def test_unreadable_and_tiny_images_are_left_out(images: Path) -> None:
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:300])
    (images / "text.jpg").write_text("no picture")
    write_image(images / "tiny.png", 15, 40)
    notes: list[str] = []
    assert len(load_pairs([str(images)], [], 2, 8, notes.append)) == 2
    said = "\n".join(notes)
    assert "left out: " in said
    assert "1.png cannot be read" in said
    assert "text.jpg cannot be read" in said
    assert "unreadable images left out: 2" in said
    assert "smaller than 16 pixels in a direction left out: 1" in said
    with pytest.raises(ValueError, match="2 are unreadable, 3 smaller than 104x104"):
        load_pairs([str(images)], [], 2, 52, quiet)


def test_unreadable_images_do_not_end_a_run(images: Path, make: Callable[..., Config]) -> None:
    """Images are decoded before the first step: one in the middle is named, left out, counted."""
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:300])
    notes: list[str] = []
    trainer = Trainer(make(steps=2), CPU, note=notes.append)
    trainer.run()
    assert trainer.step == 2
    assert "1.png cannot be read" in notes[0]
    assert notes[1:3] == ["unreadable images left out: 1", "training on 2 images, 0.0 megapixels"]


def test_reading_is_watched(images: Path, make: Callable[..., Config]) -> None:
    told: list[tuple[float, float]] = []
    it = make(validate=str(images), validate_count=2)
    Trainer(it, CPU, note=quiet, reading=lambda *numbers: told.append(numbers))
    assert told == [(0, 3), (1, 3), (2, 3), (0, 2), (1, 2)]


def test_memory_running_out_while_images_are_read(
    images: Path, make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is no unreadable image."""

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(TrainingError, match=r"memory ran out while the images were read.*pack"):
        Trainer(make(), CPU, note=quiet)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no images in"):
        load_pairs([str(tmp_path)], [], 2, 8, quiet)
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        load_pairs(["absent"], [], 2, 8, quiet)


def test_validation_images(images: Path) -> None:
    pairs = load_validation(str(images), None, 2, 32, 2)
    assert [high.shape for _, high in pairs] == [(32, 32, 3)] * 2
    whole = np.asarray(Image.open(images / "0.png"))
    assert np.array_equal(pairs[0][1], whole[9:41, 17:49])
    with pytest.raises(ValueError, match=r"0\.png: 14x14 pixels are too few"):
        load_validation(str(images), None, 2, 14, None)


# ------------------------------------------------------------------------------ schedule and loss


def test_schedules(make: Callable[..., Config]) -> None:
    cosine = make(peak_lr=1.0, warmup=0.1)
    rates = [learning_rate(cosine, p / 100) for p in range(101)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0)
    steps = make(peak_lr=1.0, schedule="multistep", milestones=[0.5, 0.8], gamma=0.1)
    assert [learning_rate(steps, p) for p in (0, 0.49, 0.5, 0.8)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )
    assert learning_rate(make(peak_lr=0.5, schedule="constant"), 0.9) == 0.5


def test_loss_by_its_formula() -> None:
    y, t = torch.rand(2, 3, 6, 8), torch.rand(2, 3, 6, 8)
    d = y.double().numpy() - t.double().numpy()
    f = np.fft.rfft2(d)
    expected = np.abs(d).mean() + 0.1 * (np.abs(f.real).mean() + np.abs(f.imag).mean()) / 2
    assert reconstruction_loss(y, t, 1.0, 0.1).item() == pytest.approx(expected, rel=1e-5)
    white = reconstruction_loss(255 * y, 255 * t, 255.0, 0.1).item()
    assert white == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    ("model", "options", "steps"),
    [
        ("elan_light", TINY_ELAN | {"window_sizes": [2, 4, 8]}, (60, 100)),
        ("mafdn", TINY_MAFDN, (3, 6)),
    ],
)
def test_resuming_is_exact(
    model: str,
    options: dict[str, Any],
    steps: tuple[int, int],
    images: Path,
    make: Callable[..., Config],
    tmp_path: Path,
) -> None:
    """100 steps = 60, Ctrl-C, 40 more: weights, averages, optimizer, log, all bits."""
    keys = {"model": model, "options": options, "steps": steps[1], "warmup": 0.1, "clip": 0.5}
    keys |= {"validate": str(images), "validate_every": max(1, steps[1] // 4), "validate_count": 1}
    straight = make(out=str(tmp_path / "straight"), **keys)
    Trainer(straight, CPU, note=quiet).run()
    parts = make(out=str(tmp_path / "parts"), **keys)
    first = Trainer(parts, CPU, note=quiet)
    with pytest.raises(KeyboardInterrupt):
        first.run(interrupt_at(steps[0]))
    assert first.step == steps[0]
    torch.rand(7)  # what happens in between does not matter
    np.random.rand(7)
    notes: list[str] = []
    Trainer(parts, CPU, resume=True, note=notes.append).run()
    assert f"going on from step {steps[0]}" in notes[0]

    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("straight", "parts"))
    assert a["step"] == b["step"] == steps[1]
    assert set(a) == set(b)
    for key in set(a) - {"seconds", "config"}:
        assert same(a[key], b[key]), key
    rows = [
        [row | {"seconds": ""} for row in csv.DictReader((tmp_path / n / "log.csv").open())]
        for n in ("straight", "parts")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == len({row["step"] for row in rows[0]}) >= 4
    if steps[1] == 100:
        assert float(rows[0][-1]["loss"]) < float(rows[0][0]["loss"])


def test_resuming_refuses_what_does_not_fit(make: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        Trainer(make(), CPU, resume=True, note=quiet)
    Trainer(make(steps=1), CPU, note=quiet).run()
    with pytest.raises(TrainingError, match=r"last\.pt exists: go on from it with --resume"):
        Trainer(make(), CPU, note=quiet)
    with pytest.raises(TrainingError, match="scale 2, now it is 3"):
        Trainer(make(scale=3), CPU, resume=True, note=quiet)
    notes: list[str] = []
    assert Trainer(make(batch=3), CPU, resume=True, note=notes.append).step == 1
    assert "batch 2 -> 3" in notes[0]
    last = tmp_path / "run" / "last.pt"
    state = torch.load(last, weights_only=True)
    torch.save({**state, "world_size": 2}, last)
    with pytest.raises(TrainingError, match="2 processes, here are 1"):
        Trainer(make(), CPU, resume=True, note=quiet)
    torch.save(state["ema"], last)
    with pytest.raises(TrainingError, match="it lacks model, ema"):
        Trainer(make(), CPU, resume=True, note=quiet)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_a_checkpoint_is_never_run_as_code(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    torch.save({"model": Code()}, tmp_path / "run" / "last.pt")
    with pytest.raises(CheckpointError, match="would run code"):
        Trainer(make(), CPU, resume=True, note=quiet)
    with pytest.raises(CheckpointError, match="would run code"):
        Trainer(make(init_from="run/last.pt", out="other"), CPU, note=quiet)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run(
    value: float, make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda call, loss: loss * value if call == 8 else loss)
    trainer = Trainer(make(validate_every=5), CPU, note=quiet)
    words = rf"step 7: the loss is {value}; .*last\.pt keeps the state after step 5"
    with pytest.raises(TrainingError, match=words):
        trainer.run()
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["step"] == 5
    assert all(bool(torch.isfinite(v).all()) for v in state["model"].values())


def test_gradients_that_are_not_finite_are_left_out(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is left out; the weights stay finite. Ten in a row end the run."""

    def poison(first: int, last: int) -> None:
        # sqrt's derivative is infinite at 0, and the loss as it was
        spoil(monkeypatch, lambda call, x: x + (0 * x).sqrt() if first <= call <= last else x)

    poison(3, 3)
    notes: list[str] = []
    trainer = Trainer(make(steps=6), CPU, note=notes.append)
    trainer.run()
    assert (trainer.step, trainer.skipped) == (6, 1)
    assert any("gradient is not finite; left out" in note for note in notes)
    assert all(bool(torch.isfinite(v).all()) for v in trainer.model.state_dict().values())
    poison(1, 99)
    with pytest.raises(TrainingError, match="10 steps in a row"):
        Trainer(make(steps=30, out=str(trainer.out) + "2"), CPU, note=quiet).run()


def test_full_disk_leaves_the_old_checkpoint(make: Callable[..., Config]) -> None:
    """No file may grow beyond 4 KB, as if the disk were full."""
    trainer = Trainer(make(steps=2), CPU, note=quiet)
    trainer.run()
    before = trainer.last.read_bytes()
    assert len(before) > 4096
    notes: list[str] = []
    more = Trainer(make(steps=4, validate_every=3), CPU, resume=True, note=notes.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"last\.pt cannot be written: .*step 2 is intact"):
            more.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert any("the run goes on and tries again" in note for note in notes)  # at step 3
    assert more.step == 4
    assert trainer.last.read_bytes() == before
    assert sorted(path.name for path in trainer.out.iterdir()) == ["last.pt", "log.csv"]


def test_best_is_kept_and_the_log_has_rows(
    make: Callable[..., Config], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([(20.0, 0.5), (22.0, 0.6), (21.0, 0.7)])
    monkeypatch.setattr(loop, "score", lambda *_: next(scores))
    it = make(steps=6, validate=str(images), validate_every=2, validate_count=1)
    trainer = Trainer(it, CPU, note=quiet)
    trainer.run()
    best = torch.load(trainer.best_path, weights_only=True)
    assert (best["step"], best["best"]) == (4, 22.0)
    with trainer.log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], float(row["psnr_y"])) for row in rows] == [
        ("2", 20),
        ("4", 22),
        ("6", 21),
    ]


def test_best_that_could_not_be_written_is_not_the_best(
    make: Callable[..., Config], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when best.pt is due for the first time: a later, worse one is kept."""
    scores = iter([(22.0, 0.6), (21.0, 0.5), (20.0, 0.4)])
    monkeypatch.setattr(loop, "score", lambda *_: next(scores))
    true, tried = loop.whole_or_nothing, []

    def full_at_first(path: Path) -> Any:
        if path.name == "best.pt":
            tried.append(path)
            if len(tried) == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        return true(path)

    monkeypatch.setattr(loop, "whole_or_nothing", full_at_first)
    it = make(steps=6, validate=str(images), validate_every=2, validate_count=1)
    trainer = Trainer(it, CPU, note=quiet)
    trainer.run()
    best = torch.load(trainer.best_path, weights_only=True)
    assert (best["step"], best["best"]) == (4, 21.0)
    assert torch.load(trainer.last, weights_only=True)["best"] == 21.0


def test_tensorboard_where_it_is_installed(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder.endswith("tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trainer = Trainer(make(steps=2), CPU, note=quiet)
    trainer.run()
    trainer.close()
    assert [name for name, _, _ in written][:2] == ["loss", "learning_rate"]
    assert written[-1][0] == "closed"


def test_average_of_the_weights(make: Callable[..., Config]) -> None:
    """The average by its recursion, and the counts of batches copied."""
    trainer = Trainer(make(ema=0.5, steps=3), CPU, note=quiet)
    name = "head.0.weight"
    expected = trainer.model.state_dict()[name].clone()

    def watch(status: loop.Status) -> None:
        keep = min(0.5, status.step / (status.step + 10))
        expected.lerp_(trainer.model.state_dict()[name], 1 - keep)

    trainer.run(watch)
    torch.testing.assert_close(trainer.average.state_dict()[name], expected)
    counts = [v for k, v in trainer.average.state_dict().items() if "num_batches" in k]
    assert [int(count) for count in counts] == [3] * len(counts) != []


@pytest.mark.parametrize(
    "keys",
    [
        {"precision": "bfloat16"},
        {"channels_last": False, "frequency_loss": 0.05, "schedule": "multistep"},
        {
            "model": "mafdn",
            "options": TINY_MAFDN,
            "precision": "bfloat16",
            "clip": 0.5,
            "peak_lr": 3e-4,
            "steps": 40,
        },
        {"minutes": 0.02, "steps": None},
    ],
)
def test_options_of_a_run(keys: dict[str, Any], make: Callable[..., Config]) -> None:
    losses: list[float] = []
    trainer = Trainer(make(**keys), CPU, note=quiet)
    trainer.run(lambda status: losses.append(status.loss))
    assert losses[-1] < losses[0]
    assert all(v.dtype != torch.bfloat16 for v in trainer.model.state_dict().values())
    assert trainer.progress() >= 1


@pytest.mark.parametrize(
    ("model", "precision"),
    [("elan_light", "bfloat16"), ("mafdn", "float32"), ("mafdn", "bfloat16")],
)
def test_what_a_gpu_must_do_too(model: str, precision: str, tmp_path: Path) -> None:
    """The bodies of tests/gpu/test_training.py."""
    check_training(tmp_path, model, precision, "cpu", "auto", steps=16)


def test_memory_running_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory_running_out(tmp_path, "cpu", "auto", monkeypatch)


def test_going_on_after_memory_ran_out_is_exact(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = Trainer(make(out=str(tmp_path / "straight")), CPU, note=quiet)
    straight.run()

    def full(call: int, loss: torch.Tensor) -> torch.Tensor:
        if call == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0")
        return loss

    spoil(monkeypatch, full)
    with pytest.raises(TrainingError, match=r"step 7: memory ran out on cpu, 2\.50 GiB at once; "):
        Trainer(make(), CPU, note=quiet).run()
    more = Trainer(make(), CPU, resume=True, note=quiet)
    more.run()
    for key in ("model", "ema", "optimizer", "loss"):
        assert same(straight.state()[key], more.state()[key]), key


def test_memory_running_out_elsewhere(
    make: Callable[..., Config], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an update nothing is saved; in validation the step before it is."""

    def full(*_: Any) -> None:
        raise MemoryError

    trainer = Trainer(make(validate_every=5), CPU, note=quiet)
    update = trainer.optimizer.step

    def half(*arguments: Any, **options: Any) -> None:
        update(*arguments, **options)
        if trainer.step == 7:
            full()

    monkeypatch.setattr(trainer.optimizer, "step", half)
    with pytest.raises(TrainingError, match=r"step 7: memory ran out.* after step 5\. A smaller"):
        trainer.run()
    assert torch.load(trainer.last, weights_only=True)["step"] == 5

    monkeypatch.setattr(loop, "upscale", full)
    it = make(validate_every=5, validate=str(images), out=f"{trainer.out}2", save_minutes=60)
    trainer = Trainer(it, CPU, note=quiet)
    words = r"step 5: memory ran out on cpu; .* after step 5\. Validation .*validate_side, now all"
    with pytest.raises(TrainingError, match=words):
        trainer.run()
    saved, own = torch.load(trainer.last, weights_only=True), trainer.state()
    assert same([saved["model"], saved["step"]], [own["model"], 5])

    spoil(monkeypatch, full)
    trainer = Trainer(make(out=f"{trainer.out}3"), CPU, note=quiet)
    with pytest.raises(TrainingError, match=r"step 0: .*no checkpoint .* needs less$"):
        trainer.run()


def test_gradients_are_clipped(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: dict[float | None, float] = {}
    for clip in (None, 1e-3):
        trainer = Trainer(make(clip=clip, steps=1, out=f"{make().out}{clip}"), CPU, note=quiet)
        update = trainer.optimizer.step

        def step(*arguments: Any, **options: Any) -> Any:
            gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]  # noqa: B023
            norms[clip] = float(torch.stack([g.norm() for g in gradients]).norm())  # noqa: B023
            return update(*arguments, **options)  # noqa: B023

        monkeypatch.setattr(trainer.optimizer, "step", step)
        trainer.run()
    assert norms[None] > 1e-2
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)


def test_termination_is_understood(make: Callable[..., Config]) -> None:
    trainer = Trainer(make(), CPU, note=quiet)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        trainer.run(interrupt_at(3, signal.SIGTERM))
    assert getattr(caught.value, "code", "Ctrl-C") == 143
    assert torch.load(trainer.last, weights_only=True)["step"] == trainer.step == 3


def test_time_between_checkpoints(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 40 s: of six, those after 2, 4 and 6 are saved."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    saved: list[int | None] = []

    def watch(status: loop.Status) -> None:
        now[0] += 40
        saved.append(trainer.saved)

    trainer = Trainer(make(steps=6, save_minutes=1), CPU, note=quiet)
    trainer.run(watch)
    saved.append(trainer.saved)
    assert saved == [None, None, None, 3, 3, 5, 6]


def test_compiled(make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, forward and backward are one graph with the same losses. Inductor, which takes a
    minute, is tested with the operators."""
    whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(loop.torch, "compile", whole)
    losses: list[list[float]] = []
    for compiled in (False, True):
        options = TINY_MAFDN | {"channels": 4, "branches": 1}
        keys = {"model": "mafdn", "options": options, "steps": 3, "compile": compiled}
        trainer = Trainer(make(**keys, out=f"{make().out}{compiled}"), CPU, note=quiet)
        losses.append([])
        trainer.run(lambda status: losses[-1].append(status.loss))
        assert hasattr(trainer._objective, "_torchdynamo_orig_callable") == compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("model", ["elan_light", "mafdn"])
def test_our_operators_learn_as_stock_ones_do(
    model: str, make: Callable[..., Config], tmp_path: Path
) -> None:
    """200 steps from the same weights with the same crops: only rounding differs."""
    curves, speeds = {}, {}
    for backend in ("auto", "reference"):
        it = make(model, backend=backend, steps=200, out=str(tmp_path / backend), peak_lr=1e-3)
        trainer = Trainer(it, CPU, note=quiet)
        curve: list[float] = []
        start = time.process_time()
        trainer.run(lambda status: curve.append(status.loss))  # noqa: B023 (called at once)
        speeds[backend] = 200 / (time.process_time() - start)
        curves[backend] = np.array(curve)
    ours, stock = curves["auto"], curves["reference"]
    print(f"{model}: steps per second of processor time:", {k: round(v) for k, v in speeds.items()})
    print("largest relative difference of the loss:", np.abs(ours / stock - 1).max())
    assert stock[-1] < 0.6 * stock[0]
    np.testing.assert_allclose(ours[:10], stock[:10], rtol=1e-4)
    np.testing.assert_allclose(ours, stock, rtol=1e-3)


@pytest.mark.parametrize("name", ["best.pt", "log.csv"])
def test_a_fresh_run_overwrites_nothing(name: str, make: Callable[..., Config]) -> None:
    out = Path(str(make().out))
    out.mkdir()
    (out / name).write_text("step,mine\n99,1\n")
    with pytest.raises(TrainingError, match=rf"{name} exists, which this run would overwrite"):
        Trainer(make(), CPU, note=quiet)
    assert (out / name).read_text() == "step,mine\n99,1\n"


@pytest.mark.parametrize("text", ["step,mine\n1,2\n", "name,mine\nbaby,2\n"])
def test_a_log_of_something_else_is_kept(text: str, make: Callable[..., Config]) -> None:
    trainer = Trainer(make(steps=1), CPU, note=quiet)
    trainer.run()
    trainer.log.write_text(text)
    with pytest.raises(TrainingError, match=r"log\.csv is not the log of such a run"):
        Trainer(make(), CPU, resume=True, note=quiet)
    assert trainer.log.read_text() == text


def test_out_is_a_file(make: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        with pytest.raises(TrainingError, match=r"file is a file; expected a folder"):
            Trainer(make(out=str(tmp_path / out)), CPU, note=quiet)


def test_a_finished_run_has_nothing_to_resume(make: Callable[..., Config]) -> None:
    trainer = Trainer(make(steps=3), CPU, note=quiet)
    trainer.run()
    before = trainer.log.read_text(), trainer.last.read_bytes()
    notes: list[str] = []
    Trainer(make(steps=3), CPU, resume=True, note=notes.append).run()
    assert "the run is finished, after 3 steps: nothing is left to do" in notes
    assert (trainer.log.read_text(), trainer.last.read_bytes()) == before


def test_steps_that_the_scaler_leaves_out_count(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda call, x: x + (0 * x).sqrt())
    trainer = Trainer(make(), CPU, note=quiet)
    trainer.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(TrainingError, match="10 steps in a row"):
        trainer.run()
    assert trainer.skipped == 10
    assert trainer.scaler.get_scale() == 2.0 ** (16 - 10)


def test_float16_goes_on_from_float32(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(make(steps=1), CPU, note=quiet).run()
    monkeypatch.setattr(loop, "_check", lambda *_: None)  # which wants a GPU for it
    it = Trainer(make(precision="float16"), CPU, resume=True, note=quiet)
    assert it.step == 1
    assert it.scaler.is_enabled()


def test_time_left_after_resuming(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the run in 60 s, with half of it done before: the last 40 % take 240 s."""
    now = [100.0]
    monkeypatch.setattr(cli.console.time, "monotonic", lambda: now[0])
    bar = cli.console.Progress("training", 0.5)
    now[0] += 60
    bar(0.6, 1)
    assert "60%, about 4:00 min left" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the first weights


def test_x4_begins_with_x2(make: Callable[..., Config], tmp_path: Path) -> None:
    torch.manual_seed(1)
    options = TINY_ELAN | {"window_sizes": (4, 8, 16)}
    source = elan_light(2, **options)
    torch.save(source.state_dict(), tmp_path / "x2.pt")
    notes: list[str] = []
    keys = {"scale": 4, "options": options, "init_from": str(tmp_path / "x2.pt")}
    trainer = Trainer(make(**keys), CPU, note=notes.append)
    assert "fresh: tail.0.weight, tail.0.bias" in notes[0]
    own, given = trainer.model.state_dict(), source.state_dict()
    for name in own:
        assert torch.equal(own[name], given[name]) == (not name.startswith("tail.")), name


def before_the_tail(network: Any) -> torch.Tensor:
    """What the last layer gets for a certain image."""
    seen: list[torch.Tensor] = []
    handle = network.tail.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        network(torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("model", ["elan_light", "mafdn"])
def test_each_scale_begins_with_the_one_before(model: str, images: Path, tmp_path: Path) -> None:
    """The shipped x2, x3 and x4 configurations, one after the other: each begins with the averaged
    weights of the other, tail excepted, and the file that it leaves is of its scale."""
    options = {"elan_light": TINY_ELAN, "mafdn": TINY_MAFDN}[model]
    before: Trainer | None = None
    for scale in (2, 3, 4):
        keys = {"options": options, "data": [str(images)], "out": str(tmp_path / f"x{scale}")}
        keys |= {"patch": 8, "batch": 1, "steps": 2, "minutes": None, "threads": 1}
        if before is not None:
            keys["init_from"] = str(before.last)
        notes: list[str] = []
        it = load_config(f"{model}_x{scale}_short", keys)
        trainer = Trainer(it, CPU, note=notes.append)
        if before is not None:
            fresh = notes[0].split("fresh: ")[1].split(", ")
            assert [name for name in fresh if not name.startswith("tail.")] == []
            old, new = (before_the_tail(t.average) for t in (before, trainer))
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
        trainer.run()
        assert trainer.step == 2
        export_weights(trainer.last, tmp_path / f"{scale}.safetensors")
        assert load_checkpoint(tmp_path / f"{scale}.safetensors").scale == scale
        before = trainer


def test_weights_for_another_white(tmp_path: Path) -> None:
    """A network for 0..255 becomes one for 0..1 with the same picture."""
    source = elan_light(2, **(TINY_ELAN | {"rgb_range": 255.0})).eval()
    torch.save(source.state_dict(), tmp_path / "x2.pt")
    target = elan_light(2, **TINY_ELAN).eval()
    _, fresh = take_weights(target, str(tmp_path / "x2.pt"))
    assert fresh == []
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(target(x), source(255 * x) / 255, rtol=1e-4, atol=1e-4)


def test_folded_weights_become_over_parameterised_ones(set5: Any) -> None:
    target = mafdn(4).eval()
    _, fresh = take_weights(target, "mafdn_x4")
    assert fresh == []
    assert not target.folded
    x = torch.rand(1, 3, 12, 12)
    torch.testing.assert_close(target(x), load_pretrained("mafdn_x4")(x), rtol=1e-4, atol=1e-4)


def test_first_weights_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'absent\.pt', which is neither a file nor one of .*maf"
    ):
        take_weights(mafdn(4), "absent.pt")
    with pytest.raises(ConfigError, match="weights of MAFDN; expected weights of ELAN"):
        take_weights(elan_light(4), "mafdn_x4")
    with pytest.raises(ConfigError, match="of 52 channels; expected 48"):
        take_weights(mafdn(4, channels=48, colors=3), "mafdn_x4")


def test_branches_begin_small(make: Callable[..., Config]) -> None:
    plain, small = (
        fresh_network(make(residual_init=r, tail_init=t)) for r, t in ((1, 1), (0.5, 0.25))
    )
    for (name, a), b in zip(plain.named_parameters(), small.parameters(), strict=True):
        factor = 0.25 if name.startswith("tail.") else 1.0
        if name.endswith("weight") and (
            "project_out" in name or "conv1.shift_conv.conv1x1" in name
        ):
            factor = 0.5
        torch.testing.assert_close(b, a * factor, msg=name)


# ------------------------------------------------------------------------------------ the command


def command(images: Path, out: Path, *more: str) -> list[str]:
    options = "options={m_elan: 2, c_elan: 15, rgb_range: 1.0}"
    line = ["train", "elan_light_x2_short", "--data", str(images), "--out", str(out)]
    return [*line, "--set", options, "--patch", "16", "--batch", "1", *more]


def test_train_interrupt_resume_export_evaluate(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    line = command(images, out, "--steps", "8", "--validate", str(images))
    line += ["--set", "validate_every=4", "--set", "validate_side=32"]
    train_step = Trainer._train_step

    def interrupted(self: Trainer, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        train_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        assert cli.main(line) == 130
    assert "stopped after step 1; the same command with --resume" in capsys.readouterr().err
    assert cli.main(line) == 1
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*line, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "going on from step 1" in said
    assert "(best so far)" in said
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "log.csv"]

    assert cli.main(["export-weights", str(out / "last.pt"), str(weights)]) == 0
    stored = load_file(weights)
    model = load_checkpoint(weights)
    assert (model.scale, model.rgb_range) == (2, 1.0)
    averaged = torch.load(out / "last.pt", weights_only=True)["ema"]
    for name, value in averaged.items():
        exact = not value.is_floating_point()
        assert stored[name].dtype == (value.dtype if exact else torch.float16)
        torch.testing.assert_close(
            model.state_dict()[name], value, rtol=0 if exact else 1e-3, atol=1e-5
        )
    assert cli.main(["export-weights", str(out / "last.pt"), str(weights)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["evaluate", "--weights", str(weights), "--data", str(images)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_second_interruption_says_what_was_saved(
    images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice Ctrl-C within step 3, the second 3 s later: nothing is saved, and that is said."""
    train_step, true, later = Trainer._train_step, time.monotonic, [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: true() + later[0])

    def interrupted(self: Trainer, *arguments: Any) -> None:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            later[0] += 3
            os.kill(os.getpid(), signal.SIGINT)
        train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    line = command(images, tmp_path / "run", "--steps", "8")
    assert cli.main(line) == 130
    said = capfd.readouterr().err
    assert "ending after this step; again: stop at once" in said
    assert "stopped after step 2; no checkpoint had been written" in said
    assert not (tmp_path / "run" / "last.pt").exists()
    line = command(images, tmp_path / "other", "--steps", "8", "--set", "validate_every=1")
    assert cli.main([*line, "--set", "save_minutes=60"]) == 130
    assert "--resume goes on there" in capfd.readouterr().err
    assert torch.load(tmp_path / "other" / "last.pt", weights_only=True)["step"] == 2


def test_export_of_a_bare_checkpoint(tmp_path: Path) -> None:
    """One with model, ema, optimizer, step, seconds and scale alone."""
    a, b = elan_light(2, **TINY_ELAN), elan_light(2, **TINY_ELAN)
    state = {"model": a.state_dict(), "ema": b.state_dict(), "optimizer": {}, "step": 1}
    torch.save({**state, "seconds": 1.0, "scale": 2}, tmp_path / "last.pt")
    export_weights(tmp_path / "last.pt", tmp_path / "w.safetensors", half=False)
    model = load_checkpoint(tmp_path / "w.safetensors")
    assert same(model.state_dict(), b.state_dict())
    b.head[0].bias.data[0] = 1e6
    torch.save(b.state_dict(), tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"head\.0\.bias does not fit into half precision"):
        export_weights(tmp_path / "last.pt", tmp_path / "w2.safetensors")


def test_windows_survive_training_and_export(make: Callable[..., Config], tmp_path: Path) -> None:
    trainer = Trainer(make(steps=1), CPU, note=quiet)
    trainer.run()
    weights = tmp_path / "w.safetensors"
    export_weights(trainer.last, weights, half=False)
    x = torch.rand(1, 3, 11, 13)
    for path in (trainer.last, weights):
        model = load_checkpoint(path)
        assert model.window_sizes == (2, 4, 8)
        assert torch.equal(model(x), trainer.average(x))
    assert load_checkpoint(weights, window_sizes=(4, 8, 16)).window_sizes == (4, 8, 16)
    state = torch.load(trainer.last, weights_only=True)
    state["config"]["options"]["window_sizes"] = [0, 4, 8]
    torch.save(state, trainer.last)
    with pytest.raises(CheckpointError, match=r"last\.pt: its window_sizes are \[0, 4, 8\]; expec"):
        load_checkpoint(trainer.last)


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["--patch", "2"], 2, "patch is '2'; accepted"),
        (["--set", "pach=8"], 2, "did you mean 'patch'"),
        (["--set", "patch"], 2, "expected KEY=VALUE"),
        (["--device", "tpu"], 2, "--device"),
        (["--patch", "400"], 1, "3 smaller than 800x800"),
        (["--init-from", "absent.pt"], 2, "absent.pt"),
        (["--validate", "absent"], 1, "absent is not a folder"),
    ],
)
def test_command_says_what_is_wrong(
    more: list[str],
    status: int,
    words: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*command(images, tmp_path / "run"), *more]) == status
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_command_when_memory_runs_out(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, lambda call, loss: torch.empty(1 << 60) if call == 3 else loss)
    line = command(images, tmp_path / "run", "--steps", "3")
    assert cli.main(line) == 1
    said = capsys.readouterr().err
    assert "step 2: memory ran out on cpu, " in said
    assert "not foreseen" not in said
    assert cli.main([*line, "--resume"]) == 0

    def full(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(Trainer, "_build", full)
    assert cli.main(command(images, tmp_path / "other")) == 1
    said = capsys.readouterr().err
    assert "memory ran out; close other programs or a smaller --batch or --patch" in said
    assert "not foreseen" not in said


def test_command_shows_that_it_reads(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli.console.Progress, "LINE_EVERY", 0.0)
    assert cli.main(command(images, tmp_path / "run", "--steps", "1")) == 0
    assert "reading images: 67%, about" in capsys.readouterr().err
    assert cli.main(["evaluate", "--bicubic", "--scale", "2", "--data", str(images)]) == 0
    assert "reading images: 67%, about" in capsys.readouterr().err


def test_printed_configuration_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "mafdn_x2_short", "--minutes", "3", "--print"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(str(path)) == load_config("mafdn_x2_short", {"minutes": 3})
    assert set(load_config(str(path)).plain()) == set(config.KEYS)


# ------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes(images: Path, tmp_path: Path) -> None:
    """torchrun with gloo: both see other crops and hold the same weights, the first writes, and
    4 steps = 2, Ctrl-C to one of them, and 2 more."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            import torch
            from sr_kernels.models.training import Config, Trainer
            torch.set_num_threads(1)
            images, out, name, stop = sys.argv[1:]
            options = {"m_elan": 2, "c_elan": 15, "window_sizes": [2, 4, 8]}
            keys = dict(scale=2, options=options, data=[images], patch=8, batch=2, steps=4)
            it = Config(out=f"{out}/{name}", **keys)
            trainer = Trainer(it, torch.device("cpu"), resume=stop == "resume")
            rank = trainer.ranks.rank
            def watch(status):
                if str(status.step) == stop and rank == 1:
                    os.kill(os.getpid(), signal.SIGINT)
            try:
                trainer.run(watch)
            except KeyboardInterrupt:
                assert str(trainer.step) == stop
            crops = trainer.crops.draw(0)[0].double().mean().item()
            weights = trainer.model.tail[0].weight.double().sum().item()
            open(f"{out}/{name}{trainer.step}.{rank}", "w").write(f"{crops} {weights!r}")
            trainer.close()
            """
        )
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for run in (["straight", ""], ["parts", "2"], ["parts", "resume"]):
        done = subprocess.run(
            [*line, str(script), str(images), str(tmp_path), *run],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("training on 3 images") == 1  # the first process alone speaks
    said = {path.name: path.read_text().split() for path in tmp_path.glob("*[0-9].[01]")}
    assert said["straight4.0"][0] != said["straight4.1"][0]
    assert said["straight4.0"][1] == said["straight4.1"][1]
    assert said["parts2.0"][1] == said["parts2.1"][1] != said["straight4.0"][1]
    assert said["parts4.0"] == said["straight4.0"]
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("straight", "parts"))
    assert a["world_size"] == 2
    for key in ("model", "ema", "optimizer", "loss"):
        assert same(a[key], b[key]), key


def processes(count: int, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """The command, in processes that meet as torchrun's do; nobody ends one when another ends."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "sr_kernels", *arguments],
            env={
                **os.environ,
                **meet,
                "OMP_NUM_THREADS": "1",
                "RANK": f"{n}",
                "LOCAL_RANK": f"{n}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(count)
    ]


@pytest.mark.slow
def test_processes_fail_together(images: Path, tmp_path: Path) -> None:
    """The validation images are read by the first process alone: it does not leave the other one
    waiting for it."""
    line = command(images, tmp_path / "run", "--steps", "2", "--validate", str(tmp_path / "absent"))
    both = processes(2, line)
    try:
        said = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [1, 1]
    assert f"sr-kernels: error: {tmp_path / 'absent'} is not a folder" in said[0]
    assert f"sr-kernels: error: process 0: {tmp_path / 'absent'} is not a folder" in said[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_command_with_two_processes(images: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["--steps", "3", "--validate", str(images), "--set", "validate_every=2"]
    done = subprocess.run(
        [*line, "-m", "sr_kernels", *command(images, tmp_path / "run", *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for words in ("training on 3 images", "step 2, ", "step 3, ", "done: "):
        assert done.stdout.count(words) == 1, words
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (state["step"], state["world_size"]) == (3, 2)
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["2", "3"]
    assert all(float(row["psnr_y"]) > 0 for row in rows)
