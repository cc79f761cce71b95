"""Peak memory of one provider, in a process of its own.

On a CPU: growth of the resident set during one call, over what the process held before the
provider was built (before its sessions were made, for other runtimes, so that buffers they keep
count; what building them needed for a moment does not). A provider that needs more memory than
there is dies here, and not the run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from . import measure
from .cases import Case
from .providers import Provider, Subject, Unavailable, subject

__all__ = ["ProbeFailed", "growth"]

TOY_SIDE = 16  # a multiple of every window


class ProbeFailed(Exception):
    """The provider could not be run in a process of its own; the message says why.

    killed: by the system or after too long a time, so that running it here is not to be tried.
    """

    def __init__(self, message: str, *, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed


def growth(
    case: Case,
    provider: str,
    *,
    threads: int,
    weights: Path | None,
    image: Path,
    folder: Path,
    best_format: str,
    seconds: float = 900.0,
) -> int:
    """Bytes; raises Unavailable and ProbeFailed. Linux only."""
    # A server that has imported torch and never run anything forks in milliseconds.
    build = functools.partial(subject, weights=weights, image=image, folder=folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sr_kernels.benchmarks.probe"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_child,
        args=(theirs, build, case, provider, threads, best_format),
        daemon=True,
    )
    with _without_main():
        process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise ProbeFailed(f"no result within {seconds:.0f} s", killed=True)
        kind, value = ours.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        raise ProbeFailed(
            "its process was killed: probably out of memory"
            if code == -signal.SIGKILL
            else f"its process ended with status {code}",
            killed=True,
        ) from None
    finally:
        if process.is_alive():
            process.join(5)
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()
    if kind == "unavailable":
        raise Unavailable(value)
    if kind == "failed":
        raise ProbeFailed(value)
    return int(value)


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


def _child(
    pipe: Connection,
    build: Callable[[Case], Subject],
    case: Case,
    provider: str,
    threads: int,
    best_format: str,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    try:
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than another
        torch.set_num_threads(threads)
        toy = replace(case, batch=1, height=TOY_SIDE, width=TOY_SIDE)
        chosen = _find(build(case), provider, best_format)
        if chosen.foreign:
            with contextlib.suppress(ImportError):  # building it will say so
                importlib.import_module(provider)
        else:
            # Whatever torch and its libraries load and set up at their first calls.
            small = build(toy)
            _find(small, "eager", "").build().call(case.mode)()
            if not chosen.compiles:
                _find(small, provider, "").build().call(case.mode)()
            del small
        before = measure.resident()
        running = chosen.build()
        if chosen.compiles:
            # Compiled at the first call: what stays in memory from that does not count.
            built = measure.resident()
            running.call(case.mode)()
            before += measure.resident() - built
        call = running.call(case.mode)
        measure.reset_peak()
        call()
        pipe.send(("bytes", max(0, measure.peak() - before)))
    except Unavailable as error:
        pipe.send(("unavailable", str(error)))
    except Exception as error:
        pipe.send(("failed", "".join(traceback.format_exception_only(error)).strip()))
    finally:
        pipe.close()


def _find(all_of_them: Subject, name: str, best_format: str) -> Provider:
    all_of_them.best_format = best_format
    for provider in all_of_them.providers:
        if provider.name == name:
            return provider
    raise Unavailable(f"there is no provider {name!r} for {all_of_them.case}")
