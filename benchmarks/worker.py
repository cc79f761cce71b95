"""Where a provider runs while it is verified and measured: a process of its own, or this one.

On a CPU each has a fresh process (`Apart`). It meets there what it meets in a program that uses
nothing else, and no other runtime's threads; what it took at its peak can be read, and a provider
that is killed takes only its own process with it. Timed, it keeps what it has freed
(`measure.keep_freed_memory`): whether buffers cost page faults decides more than it seems, a factor
of three for stock's shift convolution, and is chance in a heap that is left to itself. That heap is
what a program has that sets nothing, so that it can be asked for (`HEAPS`).

On a GPU all share this process (`Here`): the contexts of several would take turns on the device.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import measure
from .cases import Case
from .measure import Sampler
from .providers import Provider, Running, Subject, Unavailable
from .table import SYSTEM_HEAP

__all__ = ["HEAPS", "Apart", "Failed", "Here", "Ready"]

# What the C library does with what a timed process frees, and what the table calls it: keeps it, or
# gives it back whenever its own rules say so.
HEAPS = {"kept": "warm", "system": SYSTEM_HEAP}

TOY_SIDE = 16  # divided by every window, so that any network and operator takes it
PATIENCE = 900.0  # seconds for one answer
GRACE = 3.0  # seconds to end in


class Failed(RuntimeError):
    """What became of a provider's process: it raised something, was killed, or does not answer."""

    def __init__(self, provider: str, message: str) -> None:
        super().__init__(message)
        self.provider = provider


@dataclass(frozen=True)
class Ready:
    """results: for verification, on the CPU.  memory: bytes at the peak of one call over those
    before it, None where not measured.  private: bytes that the process alone keeps.  note: what
    the table should say of it."""

    results: dict[str, Tensor]
    memory: int | None = None
    private: int = 0
    note: str = ""


class Here:
    """In this process, on the CPU or a GPU. Memory is measured on a GPU only."""

    cpu_seconds = 0.0  # is in this process's own

    def __init__(self, provider: Provider, case: Case, *, memory: bool) -> None:
        self._provider, self._case, self._memory = provider, case, memory
        self.calls: dict[str, int] = {}
        self._running: Running | None = None

    def ready(self) -> Ready:
        """Builds the provider; raises Unavailable, and whatever it raises."""
        self._running = self._provider.build()
        # Copied before another call, which may write where the first one did.
        results = {
            name: value.detach().to("cpu", copy=True)
            for name, value in self._running.results(self._case.mode).items()
        }
        memory, note = None, ""
        if self._provider.graphs:
            note = "no memory: its graph's is allocated once"
        elif self._memory and self._case.device != "cpu":
            call = self._running.call(self._case.mode)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated() - before
        return Ready(results, memory, note=note)

    def samplers(self) -> tuple[dict[str, Sampler], dict[str, str]]:
        """By state of the cache, what takes a sample; and why there is none. `calls` says how many
        calls a sampler takes for one, where that is not one."""
        assert self._running is not None
        mode = self._case.mode
        with self._failing():
            call = self._running.call(mode)
        if self._case.device == "cpu":
            return {"warm": self._sampler(measure.Clock("cpu").sampler(call))}, {}
        result = {
            "hot": self._sampler(measure.Clock("cuda").sampler(call)),
            "cold": self._sampler(measure.Clock("cuda", cold=True).sampler(call)),
        }
        if mode == "backward":  # it goes through a graph of autograd's that was made outside
            return result, {}
        if self._provider.graphs:
            return {**result, "graph": result["hot"]}, {}
        calls = measure.graph_calls(result["hot"](1, True))
        try:
            replay = measure.graphed(call, calls)
        except Exception as problem:
            return result, {"graph": f"{type(problem).__name__}: {problem}"}
        self.calls["graph"] = calls
        result["graph"] = self._sampler(measure.Clock("cuda").sampler(replay))
        return result, {}

    def _sampler(self, sampler: Sampler) -> Sampler:
        def sample(repeats: int, warm: bool) -> float:
            with self._failing():
                return sampler(repeats, warm)

        return sample

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What goes wrong is this provider's, and not the case's."""
        try:
            yield
        except Exception as problem:
            raise Failed(self._provider.name, _said(problem)) from problem

    def close(self) -> None:
        self._running = None


class Apart:
    """In a process of its own, which begins to build the provider at once. Linux only.

    build: makes the case's providers there.  file: a name for what is handed back.
    memory: measure it, which takes a call more.  heap: one of `HEAPS`.
    """

    def __init__(
        self,
        build: Callable[[Case], Subject],
        case: Case,
        provider: str,
        *,
        threads: int,
        best_format: str,
        file: Path,
        memory: bool,
        heap: str,
    ) -> None:
        self.cpu_seconds = 0.0
        self.calls: dict[str, int] = {}
        self._name, self._file = provider, file
        self._state = HEAPS[heap]
        # A server that has imported torch and its compiler (three seconds, which every compiled
        # provider would need) and never run anything forks in milliseconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "torch._dynamo", "torch._inductor.compile_fx"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, build, case, provider, threads, best_format, file, memory, heap),
            daemon=True,
        )
        with _without_main():
            self._process.start()
        theirs.close()

    def ready(self, patience: float = PATIENCE) -> Ready:
        """Waits for the provider; raises Unavailable and Failed."""
        memory, private, note, self.cpu_seconds = self._answer(patience)
        results = torch.load(self._file, weights_only=True)
        self._file.unlink()
        return Ready(results, memory, private, note)

    def samplers(self) -> tuple[dict[str, Sampler], dict[str, str]]:
        return {self._state: self._sample}, {}

    def _sample(self, repeats: int, warm: bool) -> float:
        with contextlib.suppress(BrokenPipeError):  # reading then says more
            self._pipe.send((repeats, warm))
        seconds, self.cpu_seconds = self._answer(PATIENCE)
        return float(seconds)

    def _answer(self, patience: float) -> tuple[Any, ...]:
        try:
            if not self._pipe.poll(patience):
                raise Failed(self._name, f"no answer within {patience:.0f} s")
            kind, *values = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            raise Failed(
                self._name,
                "its process was killed: probably out of memory"
                if code == -signal.SIGKILL
                else f"its process ended with status {code}",
            ) from None
        if kind == "unavailable":
            raise Unavailable(values[0])
        if kind == "failed":
            raise Failed(self._name, values[0])
        return tuple(values)

    def close(self) -> None:
        # It ends by itself when the pipe does, and cleans up what it shares with the system.
        self._pipe.close()
        self._process.join(GRACE)
        self._process.kill()
        self._process.join()
        self._file.unlink(missing_ok=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keeps the child from importing the program that we run in: it needs nothing of it."""
    main = sys.modules["__main__"]
    saved = {n: getattr(main, n) for n in ("__file__", "__spec__") if hasattr(main, n)}
    try:
        if "__file__" in saved:
            del main.__file__
        main.__spec__ = None
        yield
    finally:
        for name, value in saved.items():
            setattr(main, name, value)


# ------------------------------------------------------------------------------ over there


def _serve(
    pipe: Connection,
    build: Callable[[Case], Subject],
    case: Case,
    name: str,
    threads: int,
    best_format: str,
    file: Path,
    memory: bool,
    heap: str,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    try:
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than another
        torch.set_num_threads(threads)
        running, grown, note = _started(build, case, name, best_format, memory)
        if heap == "kept":
            measure.keep_freed_memory()
        torch.save({n: t.detach() for n, t in running.results(case.mode).items()}, file)
        sampler = measure.Clock("cpu").sampler(running.call(case.mode))
        gc.collect()
        gc.freeze()
        gc.disable()
        pipe.send(("ready", grown, measure.private(), note, time.process_time()))
        while True:
            seconds = sampler(*pipe.recv())
            pipe.send(("seconds", seconds, time.process_time()))
    except (EOFError, ConnectionError):
        pass  # the parent is done with us
    except Exception as error:
        if isinstance(error, Unavailable):
            answer = ("unavailable", str(error))
        else:
            answer = ("failed", _said(error))
        with contextlib.suppress(ConnectionError):
            pipe.send(answer)
    finally:
        pipe.close()


def _started(
    build: Callable[[Case], Subject], case: Case, name: str, best_format: str, memory: bool
) -> tuple[Running, int | None, str]:
    chosen = _find(build(case), name, best_format)
    if not memory:
        return chosen.build(), None, ""
    if chosen.foreign:
        with contextlib.suppress(ImportError):  # building it will say so
            importlib.import_module(name)
    else:
        # Whatever torch and its libraries load and set up at their first calls.
        small = build(replace(case, batch=1, height=TOY_SIDE, width=TOY_SIDE))
        _find(small, "eager", "").build().call(case.mode)()
        if not chosen.compiles:
            _find(small, name, "").build().call(case.mode)()
        del small
    try:
        before = measure.resident()
        measure.reset_peak()
    except (OSError, RuntimeError) as error:
        return chosen.build(), None, f"memory: {error}"
    running = chosen.build()
    if chosen.compiles:
        # Compiled at the first call: what stays in memory from that does not count.
        built = measure.resident()
        running.call(case.mode)()
        before += measure.resident() - built
    call = running.call(case.mode)
    measure.reset_peak()
    call()
    return running, max(0, measure.peak() - before), ""


def _said(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _find(subject: Subject, name: str, best_format: str) -> Provider:
    subject.best_format = best_format
    for provider in subject.providers:
        if provider.name == name:
            return provider
    raise Unavailable(f"there is no provider {name!r} for {subject.case}")
