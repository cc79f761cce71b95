"""Ctrl-C and SIGTERM: both unwind the stack, so that unfinished files are removed on the way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_pending: BaseException | None = None


@contextmanager
def handled() -> Iterator[None]:
    """Within the block, SIGINT raises KeyboardInterrupt and SIGTERM SystemExit(143), at once, and
    again in `check`. A signal that the caller has ignored (nohup) stays ignored."""
    global _pending
    _pending = None
    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, _raise)
    except ValueError:
        pass  # not the main thread: signals are not ours to handle
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises again what a signal has raised before. The interpreter drops an exception that comes
    up in a destructor or a callback from C; without this the signal would be lost with it."""
    if _pending is not None:
        raise _pending


def _raise(number: int, frame: FrameType | None) -> None:
    global _pending
    if number == signal.SIGINT:
        _pending = KeyboardInterrupt()
    else:
        _pending = SystemExit(128 + number)
    raise _pending
