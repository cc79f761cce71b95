"""Where the command `sr-kernels` begins.

It is outside the package because importing anything of the package imports torch, which takes
seconds: Ctrl-C must be understood before that.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """`sr_kernels.cli.main`, with Ctrl-C and a failed import handled; returns the exit status."""
    # Where the caller has ignored the signal (nohup), it stays ignored.
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if handled:
            signal.signal(signal.SIGINT, _leave)
        try:
            from sr_kernels.cli import main as run
        except Exception as error:
            if "--debug" in sys.argv:
                raise
            print(
                f"sr-kernels: error: the package cannot be imported: {error}\n"
                "(--debug shows where)",
                file=sys.stderr,
            )
            return 1
        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run()
    except KeyboardInterrupt:
        return 130  # before the first handler, or after the second


def _leave(number: int, frame: FrameType | None) -> None:
    """At once: an exception raised in the middle of an import may be swallowed there or become
    another one, and there is nothing to clean up yet."""
    os.write(2, b"sr-kernels: error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
