"""A network cheap enough for tests of the command line, and that command line with it.

    python tests/cli/nearest.py upscale photo.png

Environment of the second: NEAREST_SECONDS, how long each tile takes.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from torch import nn


class Nearest(nn.Module):
    """Each pixel becomes a square of itself, plus `offset` times the mean of its surroundings.

    limit: largest tile, in pixels, before it says that memory ran out (0: none).
    seconds: how long each tile takes.
    reach: receptive radius (a box filter's), 0 for pure nearest neighbour.
    """

    name = "Nearest"

    def __init__(
        self,
        scale: int = 4,
        *,
        rgb_range: float = 1.0,
        limit: int = 0,
        seconds: float = 0.0,
        reach: int = 0,
        multiple: int = 1,
        overlap: int = 8,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.rgb_range = rgb_range
        self.tile_multiple = multiple
        self.tile_overlap = overlap
        self.backend = None
        self.limit = limit
        self.seconds = seconds
        self.reach = reach
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.shape[2], x.shape[3]))
        if self.limit and x.shape[2] * x.shape[3] > self.limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        time.sleep(self.seconds)
        if self.reach:
            x = nn.functional.pad(x, (self.reach,) * 4)
            x = nn.functional.avg_pool2d(x, 2 * self.reach + 1, stride=1)
        return nn.functional.interpolate(x, scale_factor=self.scale, mode="nearest")


def main() -> int:
    from sr_kernels import cli
    from sr_kernels.cli import network

    def load_shipped(*_: Any) -> Nearest:
        return Nearest(seconds=float(os.environ.get("NEAREST_SECONDS", "0")))

    network.load_shipped = load_shipped
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
