"""The process that `compare.py` starts for each build.

Its first line says which build it has loaded; then it takes one JSON message per line, and answers
each with a line {"value": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import sr_kernels
from sr_kernels._library import CPU_LIBRARY

from . import measure
from .cases import Case
from .providers import subject
from .run import PHOTOGRAPH, truth_of

__all__ = ["serve"]


def _loaded() -> dict[str, Any]:
    if not CPU_LIBRARY.loaded:
        return {"error": CPU_LIBRARY.error}
    return {"value": {"package": sr_kernels.__file__, "library": str(CPU_LIBRARY.path)}}


def serve(threads: int) -> None:
    """Answers until stdin ends."""
    # What libraries print, in Python or below it, must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    torch.set_num_threads(threads)
    measure.keep_freed_memory()
    print(json.dumps(_loaded()), file=answers, flush=True)
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
                # A network's plan, where it has one: what the package is for.
                names = [p.name for p in this.providers]
                best = f"{case.device}_plan"
                best = best if best in names else case.device
                ours = this.providers[names.index(best)]
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
