"""One process among those that ``torchrun`` has started; or the only one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Ranks", "TrainingError"]

MESSAGE_BYTES = 2000  # of what goes wrong in one process, the others are told so much


class TrainingError(RuntimeError):
    """The run cannot begin or cannot go on; the message says why and what is on the disk."""


@dataclass
class Ranks:
    """Attributes: rank: number of this process; size: how many there are; device: its own."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Meet the other processes, if torchrun's environment variables speak of any."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(0, 1, device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), size, device)

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def total(self, values: Sequence[float]) -> list[float]:
        """The values summed over all processes; waits for them."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Waits at the end of the block for the other processes. Where it fails in one of them it
        fails in all, so that none waits for another that is gone.

        Raises:
            TrainingError: it failed in another process; the message is that of the first such one.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        said = self._share("" if failure is None else str(failure) or type(failure).__name__)
        if any(said):
            self.leave()
        if failure is not None:
            raise failure
        for rank, text in enumerate(said):
            if text:
                raise TrainingError(f"process {rank}: {text}")

    def _share(self, text: str) -> list[str]:
        """The text of every process, by rank."""
        if self.size == 1:
            return [text]
        table = torch.zeros(self.size, MESSAGE_BYTES, dtype=torch.uint8)
        content = list(text.encode()[:MESSAGE_BYTES])
        table[self.rank, : len(content)] = torch.tensor(content, dtype=torch.uint8)
        table = table.to(self.device)
        dist.all_reduce(table)
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in table.tolist()]
