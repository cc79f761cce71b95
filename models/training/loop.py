"""The training loop, its checkpoints and its log.

``OUT/last.pt`` is the state to go on from, ``OUT/best.pt`` that of the best validation, and
``OUT/log.csv`` has a row for each validation. A checkpoint is a dict of tensors and plain values:
model, ema (moving average of the weights), optimizer, scaler, step, seconds, scale, and what a run
needs to go on exactly: config, rng, world_size, loss, best. It replaces the older one once it is
whole on the disk.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from sr_kernels._files import whole_or_nothing
from sr_kernels.inference import is_out_of_memory

from ..checkpoints import read
from ..evaluate import Pair, Watch, score, unwatched, upscale
from .config import Config, ConfigError
from .data import Crops, load_pairs, load_validation, to_device
from .ranks import Ranks, TrainingError
from .start import fresh_network, take_weights

__all__ = ["Status", "Trainer", "TrainingError", "learning_rate", "reconstruction_loss"]

COLUMNS = ("step", "seconds", "loss", "learning_rate", "psnr_y", "ssim_y")
BAD_GRADIENTS = 10  # in a row; the odd one is left out


@dataclass(frozen=True)
class Status:
    """Where a run is: after how many steps and seconds, at which share of its length (0..1)."""

    step: int
    seconds: float
    progress: float
    loss: float
    rate: float


def learning_rate(config: Config, progress: float) -> float:
    """The rate at ``progress`` (0..1) through the run.

    A linear warm-up over the first ``warmup`` of it, then a cosine down to 0 ("cosine"), ``gamma``
    times the rate after each milestone ("multistep"), or the peak ("constant").
    """
    if progress < config.warmup:
        return config.peak_lr * max(progress / config.warmup, 0.01)
    if config.schedule == "cosine":
        rest = min((progress - config.warmup) / (1 - config.warmup), 1.0)
        return config.peak_lr * 0.5 * (1 + math.cos(math.pi * rest))
    if config.schedule == "multistep":
        return config.peak_lr * config.gamma ** sum(progress >= m for m in config.milestones)
    return config.peak_lr


def reconstruction_loss(output: Tensor, target: Tensor, white: float, frequency: float) -> Tensor:
    """mean |y - t| + frequency mean |F(y) - F(t)|, images in 0..1.

    F is the two-dimensional Fourier transform; the second mean is over its real and imaginary
    parts (Cho et al., "Rethinking coarse-to-fine approach in single image deblurring", 2021).
    """
    difference = (output.float() - target) / white
    loss = difference.abs().mean()
    if frequency > 0:
        loss = loss + frequency * torch.view_as_real(torch.fft.rfft2(difference)).abs().mean()
    return loss


class _Signals:
    """Ctrl-C and SIGTERM are remembered until the step in hand is done, and the first is
    acknowledged. One more than two seconds after it (torchrun repeats it at once) ends the process
    where it is."""

    def __init__(self, speaks: bool) -> None:
        self.received, self._speaks = 0, speaks
        self._when = 0.0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._when > 2:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._when = number, time.monotonic()
            if self._speaks:  # print() must not be called while another print() is at work
                os.write(2, b"\nsr-kernels: ending after this step; again: stop at once\n")

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        previous = {}
        with contextlib.suppress(ValueError):  # in another than the main thread there are none
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    previous[number] = signal.signal(number, self._remember)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Trainer:
    """One training run.

    Args:
        config: with ``data``, ``out``, and ``steps`` or ``minutes`` set.
        device: where it runs; under torchrun the GPU of this process is taken.
        resume: go on from ``OUT/last.pt``.
        note: is told, in sentences, what the user should know.
        reading: is told how far the images are read.

    Raises:
        ConfigError: the configuration does not go with this machine, or lacks something.
        TrainingError: OUT holds a run already, or none to resume, or one of another network; memory
            ran out while images were read; or another process cannot begin, and says why.
        FileNotFoundError, ValueError: as :func:`.data.load_pairs`.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        resume: bool = False,
        note: Callable[[str], None] = print,
        reading: Watch = unwatched,
    ) -> None:
        _check(config, device)
        self.config, self._note = config, note
        if config.threads:
            torch.set_num_threads(config.threads)
        assert config.out is not None
        self.out = Path(config.out)
        self.last, self.best_path = self.out / "last.pt", self.out / "best.pt"
        self.log = self.out / "log.csv"
        if resume and not self.last.is_file():
            raise TrainingError(f"there is nothing to resume: {self.last} does not exist")
        _check_folder(self.out)
        if not resume:
            if self.last.exists():
                raise TrainingError(
                    f"{self.last} exists: go on from it with --resume, or give another --out"
                )
            for path in (self.best_path, self.log):
                if path.exists():
                    raise TrainingError(
                        f"{path} exists, which this run would overwrite: move it away, or give "
                        "another --out"
                    )
        self.ranks = Ranks.join(device)
        self.device = self.ranks.device
        if self.ranks.rank:
            self._note, reading = lambda _: None, unwatched
        self.step, self.seconds, self.loss = 0, 0.0, 0.0
        self.best: float | None = None
        self.saved: int | None = None
        self._logged: int | None = None  # step of the last row
        self.skipped, self._bad = 0, 0
        self._phase: Literal["between", "step", "update"] = "between"
        self.held_out: list[Pair] = []
        with self.ranks.together():
            self._build(resume)
            self._read_images(reading)
            if self.ranks.rank == 0:
                self.out.mkdir(parents=True, exist_ok=True)
                self._trim_log()
        self._distribute()
        self._board = _tensorboard(self.out) if self.ranks.rank == 0 else None

    # ------------------------------------------------------------------------------- beginning

    def _read_images(self, watch: Watch) -> None:
        config, rank = self.config, self.ranks.rank
        try:
            pairs = load_pairs(
                config.data, config.lr_data, config.scale, config.patch, self._note, watch
            )
            pixels = sum(hr.shape[0] * hr.shape[1] for _, hr in pairs)
            self._note(f"training on {len(pairs)} images, {pixels / 1e6:.1f} megapixels")
            if config.validate and rank == 0:
                self.held_out = load_validation(
                    config.validate,
                    config.validate_lr,
                    config.scale,
                    config.validate_side,
                    config.validate_count,
                    watch,
                )
        except MemoryError as error:
            raise TrainingError(
                "memory ran out while the images were read, which all stay in memory, with 3 bytes "
                "a pixel: give fewer, or a packed file of crops of them (sr-kernels pack)"
            ) from error
        self.crops = Crops(
            pairs, config.scale, config.patch, config.batch, config.candidates, config.seed, rank
        )

    def _build(self, resume: bool) -> None:
        config = self.config
        self.model = fresh_network(config)
        if config.init_from and not resume:
            taken, fresh = take_weights(self.model, config.init_from)
            rest = ", ".join(fresh[:8]) + (", ..." if len(fresh) > 8 else "")
            self._note(
                f"{len(taken)} tensors taken from {config.init_from}; fresh: {rest or 'none'}"
            )
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model.to(self.device)
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.model.backend = None if config.backend == "auto" else config.backend
        self.average = config.build().to(self.device).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.average.backend = self.model.backend
        betas = (config.betas[0], config.betas[1])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.peak_lr, betas=betas)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        if resume:
            self._restore()
        own, other = self.model.state_dict(), self.average.state_dict()
        floats = [name for name, value in own.items() if value.is_floating_point()]
        self._weights = [own[name] for name in floats], [other[name] for name in floats]
        counts = [name for name in own if name not in floats]
        self._counts = [own[name] for name in counts], [other[name] for name in counts]
        # What a forward pass changes, and a copy from before it.
        statistics = [
            value
            for layer in self.model.modules()
            if isinstance(layer, nn.BatchNorm2d)
            for value in layer.buffers()
        ]
        self._statistics = statistics, [value.clone() for value in statistics]

    def _distribute(self) -> None:
        self.network: nn.Module = self.model.train()
        if self.ranks.size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.network = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        self._objective: Callable[[Tensor, Tensor], Tensor] = self._loss
        if self.config.compile:
            self._objective = torch.compile(self._loss)

    def _restore(self) -> None:
        state = read(self.last)
        needed = ("model", "ema", "optimizer", "step", "seconds", "config", "rng", "world_size")
        absent = [key for key in needed if not isinstance(state, dict) or key not in state]
        if absent:
            raise TrainingError(
                f"{self.last} is no training checkpoint of this program: it lacks "
                f"{', '.join(absent)}; its weights can be taken with init_from"
            )
        if state["world_size"] != self.ranks.size:
            raise TrainingError(
                f"{self.last} is of a run with {state['world_size']} processes, here are "
                f"{self.ranks.size}; go on with as many"
            )
        before, now = state["config"], self.config.plain()
        for key in ("model", "scale", "options"):
            if before.get(key) != now[key]:
                raise TrainingError(
                    f"{self.last} is of a run with {key} {before.get(key)!r}, now it is "
                    f"{now[key]!r}; go on with the same"
                )
        changed = [
            f"{key} {before.get(key)!r} -> {value!r}"
            for key, value in now.items()
            if before.get(key) != value
        ]
        if changed:
            self._note(f"changed since the run began: {'; '.join(changed)}")
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state.get("scaler"):  # empty where the run was not in float16
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{self.last} does not fit this network: {reason}") from error
        self.step, self.seconds = state["step"], state["seconds"]
        self.loss, self.best, self.saved = state["loss"], state["best"], state["step"]
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self._note(f"going on from step {self.step}, {self.seconds / 60:.1f} minutes")

    # -------------------------------------------------------------------------------- the loop

    def run(self, watch: Callable[[Status], None] = lambda _: None) -> None:
        """Train to the end of the schedule; ``watch`` is called after each step.

        Raises:
            KeyboardInterrupt, SystemExit: a signal came; the state is in ``OUT/last.pt``, unless
                ``saved`` is not ``step``: a second one did not wait for the end of the step.
            TrainingError: the loss or the gradients are not finite, memory ran out, or the last
                checkpoint cannot be written.
        """
        if self.progress() >= 1 and self.step == self.saved == self._logged:
            self._note(f"the run is finished, after {self.step} steps: nothing is left to do")
        signals = _Signals(self.ranks.rank == 0)
        with signals.handled(), self._prefetching() as draw:
            try:
                self._loop(draw, signals, watch)
                return
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, TrainingError) or not is_out_of_memory(error):
                    raise
                tried = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
            # Outside of the handler: the exception holds what the step has computed.
            self._memory_ran_out("" if tried is None else f", {tried[1]} at once")

    def _loop(
        self,
        draw: Callable[[int], tuple[Tensor, Tensor]],
        signals: _Signals,
        watch: Callable[[Status], None],
    ) -> None:
        begin = next_save = time.monotonic()
        begin -= self.seconds
        while True:
            # All processes go by the first one's clock, and stop if any is told to.
            mine = time.monotonic() - begin if self.ranks.rank == 0 else 0.0
            self.seconds, stop = self.ranks.total([mine, float(signals.received > 0)])
            if stop:
                self._save(self.last, final=True)
                if signals.received == signal.SIGTERM:
                    raise SystemExit(128 + signal.SIGTERM)
                raise KeyboardInterrupt
            progress = self.progress()
            if progress >= 1:
                break
            rate = learning_rate(self.config, progress)
            if self._statistics[0]:
                torch._foreach_copy_(self._statistics[1], self._statistics[0])
            self._phase = "step"
            self._train_step(*draw(self.step), rate)
            self._phase = "between"
            watch(Status(self.step, self.seconds, progress, self.loss, rate))
            if self.step % self.config.validate_every == 0:
                self._validate(rate)
                next_save = begin + self.seconds
            elif begin + self.seconds - next_save >= 60 * self.config.save_minutes:
                self._save(self.last)
                next_save = begin + self.seconds
        if self._logged != self.step:
            self._validate(learning_rate(self.config, 1.0), final=True)
        elif self.saved != self.step:
            self._save(self.last, final=True)
        self.ranks.total([0.0])  # the others wait for the last checkpoint

    def progress(self) -> float:
        """Share of the run that is done, 1 or more at its end: by steps or by the clock, whichever
        is further."""
        config = self.config
        by_steps = self.step / config.steps if config.steps is not None else 0.0
        by_clock = self.seconds / (60 * config.minutes) if config.minutes is not None else 0.0
        return max(by_steps, by_clock)

    @contextlib.contextmanager
    def _prefetching(self) -> Iterator[Callable[[int], tuple[Tensor, Tensor]]]:
        """step -> (LR, HR). On a GPU the next step's crops are cut while it computes this one."""
        last, white = self.config.channels_last, self.model.rgb_range
        if self.device.type == "cpu":
            yield lambda step: to_device(self.crops.draw(step), self.device, white, last)
            return
        with ThreadPoolExecutor(1) as pool:
            waiting: dict[int, Future[tuple[Tensor, Tensor, Tensor]]] = {}

            def draw(step: int) -> tuple[Tensor, Tensor]:
                drawn = waiting.pop(step, None) or pool.submit(self.crops.draw, step)
                waiting[step + 1] = pool.submit(self.crops.draw, step + 1)
                return to_device(drawn.result(), self.device, white, last)

            yield draw

    def _loss(self, lr: Tensor, hr: Tensor) -> Tensor:
        dtype = getattr(torch, self.config.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            output = self.network(lr)
        return reconstruction_loss(output, hr, self.model.rgb_range, self.config.frequency_loss)

    def _train_step(self, lr: Tensor, hr: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._objective(lr, hr)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        clip = math.inf if self.config.clip is None else self.config.clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        value = self.ranks.total([loss.item()])[0] / self.ranks.size
        if not math.isfinite(value):
            self._stop(f"the loss is {value}")
        finite = math.isfinite(norm.item())
        self._phase = "update"  # what is in memory is the state after no step
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()  # after a step that was left out, a smaller factor of the loss
        if finite:
            self._bad = 0
        else:
            self.skipped, self._bad = self.skipped + 1, self._bad + 1
            self._note(f"step {self.step}: the gradient is not finite; left out")
            if self._bad >= BAD_GRADIENTS:
                self._stop(f"the gradients of {self._bad} steps in a row are not finite")
        self.step += 1
        with torch.no_grad():  # the first steps are averaged over a shorter memory
            weights, averaged = self._weights
            keep = min(self.config.ema, self.step / (self.step + 10))
            torch._foreach_lerp_(averaged, weights, 1 - keep)
            for count, copy in zip(*self._counts, strict=True):
                copy.copy_(count)
        self.loss += (value - self.loss) / min(self.step, 100)

    def _kept(self) -> str:
        if self.ranks.rank:  # which the first process alone knows
            return f"{self.last} keeps what was saved last"
        if self.saved is None:
            return "no checkpoint had been written yet"
        return f"{self.last} keeps the state after step {self.saved}"

    def _stop(self, reason: str) -> NoReturn:
        raise TrainingError(
            f"step {self.step}: {reason}; {self._kept()}. A smaller peak_lr, a clip or another "
            "precision may help"
        )

    def _memory_ran_out(self, asked: str) -> NoReturn:
        """Saves what the last whole step left, unless memory ran out while the weights changed."""
        phase, config = self._phase, self.config
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if phase == "step" and self._statistics[0]:
            torch._foreach_copy_(self._statistics[0], self._statistics[1])
        if phase != "update" and self.saved != self.step > 0:
            with contextlib.suppress(MemoryError, RuntimeError):  # then an older one is kept
                self._save(self.last)
        advice = (
            f"A smaller patch (now {config.patch}) or batch (now {config.batch}) needs less"
            if phase != "between"
            else "Validation of smaller parts of the images needs less (validate_side, now "
            f"{config.validate_side or 'all'})"
        )
        resume = "" if self.saved is None else "; with --resume the run goes on from there"
        raise TrainingError(
            f"step {self.step}: memory ran out on {self.device}{asked}; {self._kept()}. "
            f"{advice}{resume}"
        )

    # ----------------------------------------------------------------------- what is written

    def _validate(self, rate: float, final: bool = False) -> None:
        """Measures the averaged weights, logs, keeps the best, saves."""
        if self.ranks.rank == 0:
            psnr, ssim = math.nan, math.nan
            if self.held_out:
                scores = [
                    score(upscale(self.average, low), high, self.config.scale)
                    for low, high in self.held_out
                ]
                psnr, ssim = (sum(column) / len(scores) for column in zip(*scores, strict=True))
            better = self.held_out and (self.best is None or psnr > self.best)
            shown = f", {psnr:.3f} dB, SSIM {ssim:.4f}" if self.held_out else ""
            self._note(
                f"step {self.step}, {self.seconds / 60:.1f} min: loss {self.loss:.5f}{shown}"
                + (" (best so far)" if better else "")
            )
            row = (self.step, f"{self.seconds:.1f}", f"{self.loss:.6f}", f"{rate:.3e}")
            self._write_log(
                [*row, f"{psnr:.4f}", f"{ssim:.5f}"] if self.held_out else [*row, "", ""]
            )
            if self._board is not None:
                values = {"loss": self.loss, "learning_rate": rate, "psnr_y": psnr, "ssim_y": ssim}
                for name, value in values.items():
                    self._board.add_scalar(name, value, self.step)
            if better:
                before, self.best = self.best, psnr  # the checkpoint holds its own
                if not self._save(self.best_path):
                    self.best = before  # or a later, worse one than this would never be kept
        self._save(self.last, final=final)

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "scale": self.config.scale,
            "config": self.config.plain(),
            "rng": rng,
            "world_size": self.ranks.size,
            "loss": self.loss,
            "best": self.best,
        }

    def _save(self, path: Path, final: bool = False) -> bool:
        """Whole or not at all; says which. A disk that is full for a while does not end a run: only
        the last checkpoint must be written."""
        if self.ranks.rank:
            return False
        content = io.BytesIO()  # torch.save hides the reason why a file cannot be written
        torch.save(self.state(), content)
        try:
            with whole_or_nothing(path) as file:
                file.write(content.getbuffer())
        except OSError as error:
            older = f"; the one after step {self.saved} is intact" if self.saved is not None else ""
            message = f"{path} cannot be written: {error.strerror or error}{older}"
            if final:
                raise TrainingError(message) from error
            self._note(f"{message}; the run goes on and tries again")
            return False
        if path == self.last:
            self.saved = self.step
        return True

    def _write_log(self, row: list[Any]) -> None:
        try:
            new = not self.log.exists()
            with self.log.open("a", newline="") as file:
                csv.writer(file).writerows([COLUMNS, row] if new else [row])
            self._logged = self.step
        except OSError as error:
            self._note(f"{self.log} cannot be written: {error.strerror or error}")

    def _trim_log(self) -> None:
        """Rows of steps that are done again go."""
        if self.ranks.rank or not self.log.exists():
            return
        try:
            header, *lines = self.log.read_text().splitlines() or [""]
            steps = [int(line.split(",")[0]) for line in lines if line]
            if header and header != ",".join(COLUMNS):
                raise ValueError(f"its first line is {header!r}; expected {','.join(COLUMNS)}")
        except ValueError as error:
            raise TrainingError(
                f"{self.log} is not the log of such a run ({error}); move it away"
            ) from error
        kept = [
            line for line, step in zip(filter(None, lines), steps, strict=True) if step <= self.step
        ]
        self._logged = max((step for step in steps if step <= self.step), default=None)
        with whole_or_nothing(self.log) as file:
            file.write(("\n".join([",".join(COLUMNS), *kept]) + "\n").encode())

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        self.ranks.leave()


def _check_folder(out: Path) -> None:
    present = next((path for path in (out, *out.parents) if path.exists()), None)
    if present is not None and not present.is_dir():
        raise TrainingError(f"out is {str(out)!r}, but {present} is a file; expected a folder")


def _check(config: Config, device: torch.device) -> None:
    for key in ("data", "out"):
        if not getattr(config, key):
            raise ConfigError(f"{key} is not set: give --{key} or write it in the configuration")
    if config.steps is None and config.minutes is None:
        raise ConfigError("neither steps nor minutes is set: a run needs an end")
    if config.precision == "float16" and device.type != "cuda":
        raise ConfigError(f"precision is 'float16'; on {device.type} accepted: float32, bfloat16")
    if device.type == "cpu" and config.backend == "cuda":
        raise ConfigError("backend is 'cuda', which does not run on the CPU")


def _tensorboard(out: Path) -> Any:
    """A writer into OUT/tensorboard where the package tensorboard is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))
