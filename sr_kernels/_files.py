"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["temporary_name", "whole_or_nothing"]


def temporary_name(path: Path) -> Path:
    """A name that nothing else has, in the folder of `path`."""
    return path.parent / f".sr-kernels-{secrets.token_hex(8)}.part"


@contextlib.contextmanager
def whole_or_nothing(path: Path) -> Iterator[IO[bytes]]:
    """An open file that takes the place of `path` once everything is on the disk, and vanishes if
    anything at all (Ctrl-C included) goes wrong before."""
    temporary = temporary_name(path)
    try:
        # "x+": a TIFF writer reads back; and nothing that exists is ever opened.
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
