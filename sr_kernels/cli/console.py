"""What the user sees: results on stdout, notes, errors and progress on stderr."""

from __future__ import annotations

import shutil
import sys
import time

_bar_shown = False


def say(text: str) -> None:
    clear_bar()
    print(text, flush=True)


def note(text: str) -> None:
    clear_bar()
    print(f"sr-kernels: note: {text}", file=sys.stderr, flush=True)


def error(text: str) -> None:
    clear_bar()
    print(f"sr-kernels: error: {text}", file=sys.stderr, flush=True)


def clear_bar() -> None:
    global _bar_shown
    if _bar_shown:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
        _bar_shown = False


class Progress:
    """Progress of one picture, and of the picture among many, or of a training run. `label` may be
    changed on the way; `begun` is the share that was done before.

    On a terminal a bar appears once the work has lasted for half a second. Elsewhere (a log file)
    a line is written every 30 seconds.
    """

    BAR_AFTER = 0.5
    BAR_EVERY = 0.1
    LINE_EVERY = 30.0

    def __init__(self, label: str, begun: float = 0.0) -> None:
        self.label, self._begun = label, begun
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + (self.BAR_AFTER if self._terminal else self.LINE_EVERY)

    def __call__(self, done: float, total: float) -> None:
        global _bar_shown
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (self.BAR_EVERY if self._terminal else self.LINE_EVERY)
        share = done / total
        elapsed = now - self._start
        ours = share - self._begun
        left = elapsed * (1 - share) / ours if ours > 0 else 0.0
        if not self._terminal:
            print(
                f"sr-kernels: {self.label}: {share:.0%}, about {_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )
            return
        columns = shutil.get_terminal_size().columns
        tail = f" {share:4.0%}  {_duration(elapsed)}, {_duration(left)} left"
        width = max(5, min(30, columns - len(self.label) - len(tail) - 4))
        filled = int(width * share)
        bar = f"{self.label} [{'#' * filled}{'.' * (width - filled)}]{tail}"
        sys.stderr.write("\r\x1b[K" + bar[: columns - 1])
        sys.stderr.flush()
        _bar_shown = True


def _duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d} h"
