"""The command line: `sr-kernels upscale | demo | evaluate | train | pack | export-weights | bench |
tune | env`; also `python -m sr_kernels`.

Exit status: 0 done; 1 something failed, and stderr says what; 2 the command itself is wrong;
130 interrupted with Ctrl-C; 143 ended by SIGTERM. A failure is one sentence; `--debug` adds the
traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from sr_kernels.cli import console, signals
from sr_kernels.cli.errors import Failure, UsageError
from sr_kernels.inference import is_out_of_memory

__all__ = ["main"]

_DESCRIPTION = """\
Upscale pictures with ELAN and MAFDN on hand-written kernels; measure and train such networks.

  sr-kernels demo                       upscale a small photograph that comes with the package
  sr-kernels upscale photo.jpg          write photo_x4.png beside it
  sr-kernels upscale photos/ -o large/  a whole folder tree
  sr-kernels evaluate --weights mafdn_x4 --data Kodak24     PSNR and SSIM
  sr-kernels train elan_light_x4_short --data images/ --out run/
  sr-kernels pack images/ -o crops.zip  training crops for a machine without images
  sr-kernels bench --quick              measure the kernels against everything else
  sr-kernels tune                       fit the Triton kernels to this machine's GPU
  sr-kernels env                        what runs here, and why the rest does not
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n(see: {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    from sr_kernels.cli import (
        bench,
        demo,
        env,
        evaluate,
        export_weights,
        pack,
        train,
        tune,
        upscale,
    )

    parser = _Parser(
        prog="sr-kernels",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (upscale, demo, evaluate, train, pack, export_weights, bench, tune, env):
        command = commands.add_parser(
            module.NAME,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument(
            "--debug", action="store_true", help="show the traceback of an error as well"
        )
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process); returns the exit status."""
    debug, command = False, None
    previous_warning = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        parser = build_parser()
        arguments = parser.parse_args(argv)
        if arguments.version:
            from sr_kernels._version import __version__

            print(f"sr-kernels {__version__}")
            return 0
        if arguments.command is None:
            parser.print_help()
            return 2
        debug, command = arguments.debug, arguments.command
        with signals.handled():
            status = arguments.run(arguments)
            signals.check()
            sys.stdout.flush()
        return status
    except UsageError as error:
        return _report(error, 2, debug)
    except Failure as error:
        return _report(error, 1, debug)
    except KeyboardInterrupt:
        console.error("interrupted; no unfinished file is left")
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if is_out_of_memory(error):
            smaller = {
                "upscale": " or use a smaller --tile",
                "train": " or a smaller --batch or --patch",
            }
            message = f"memory ran out; close other programs{smaller.get(str(command), '')}"
        else:
            kind = type(error).__name__
            message = f"{kind}: {error}\n(this was not foreseen; --debug shows where)"
        return _report(Failure(message), 1, debug, cause=error)
    finally:
        warnings.showwarning = previous_warning


def _report(error: Exception, status: int, debug: bool, cause: BaseException | None = None) -> int:
    if debug:
        traceback.print_exception(cause or error)
    console.error(str(error))
    return status


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    console.note(str(message))
