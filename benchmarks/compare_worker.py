"""The process that `compare.py` starts for each build: one JSON message per line, and answers."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import measure
from .cases import Case
from .providers import subject
from .run import PHOTOGRAPH, truth_of

__all__ = ["serve"]


def serve(threads: int) -> None:
    """Answers until stdin ends."""
    torch.set_num_threads(threads)
    # What libraries print must not end up between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    call: Any = None
    clock = measure.Clock("cpu")
    for line in sys.stdin:
        message = json.loads(line)
        value: Any = None
        try:
            if message["do"] == "prepare":
                case = Case(**message["case"])
                with tempfile.TemporaryDirectory() as folder:
                    this = subject(case, weights=None, image=PHOTOGRAPH, folder=Path(folder))
                ours = next(p for p in this.providers if p.name == case.device)
                running = ours.build()
                truth_of(this).check(running.results(case.mode))
                call = running.call(case.mode)
                call()
            else:
                call()
                value = clock.time(call, message["repeats"])
            answer = {"value": value}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
