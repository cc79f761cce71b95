"""What GPU tests run something in: a stream of its own, a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from sr_kernels.testing import bitwise_equal

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]


def on_a_side_stream(run: Callable[[Tensors], T], tensors: Tensors) -> T:
    """What `run` returns for the tensors, in a stream of its own, behind work that takes a while:
    what it launched elsewhere would read zeros."""
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(tensors)  # what is set up once, and memory, for which it would wait
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        found = run(late)
    side.synchronize()
    return found


def replay_equals_run(run: Callable[[], list[torch.Tensor]], x: torch.Tensor) -> None:
    """A graph of what `run` does, replayed after x has changed, gives what running it gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for scale in (1.0, -0.5):
        with torch.no_grad():
            x.mul_(scale)
        graph.replay()
        assert all(map(bitwise_equal, captured, run()))
