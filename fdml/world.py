"""The processes that train together: one, unless ``torchrun`` started more."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor

from fdml.errors import InputError

PATIENCE = timedelta(hours=1)
"""How long processes wait for one that works alone: the first validates and writes the report."""


@dataclass(frozen=True)
class World:
    """This process's place among ``size``. Every process draws the whole global batch and keeps its own ``rows``, so
    that the randomness of N processes is that of one."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None = None) -> "World":
        """The world that ``torchrun`` describes in the environment, or a world of one.

        ``device`` None takes a GPU where there is one. Raises ``InputError`` for a device that does not exist.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets it, for a single process too
        local = int(os.environ.get("LOCAL_RANK", "0"))
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            place = torch.device(name if name != "cuda" or size == 1 else f"cuda:{local}")
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():
            if place.type == "cuda":
                torch.cuda.set_device(place)
                dist.init_process_group("nccl", timeout=PATIENCE, device_id=place)
            else:
                dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(dist.get_rank() if size > 1 else 0, size, place)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's share of a global batch of ``batch`` images."""
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in order of rank; gradients flow back to the process that made them."""
        if self.size == 1:
            return tensor
        return torch.cat(differentiable.all_gather(tensor.contiguous()))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each value over the processes, all of which must call this with the same names."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def leave(self) -> None:
        """Ends the group, once all are here; this process goes on alone."""
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits for every process."""
        if self.size > 1:
            dist.barrier()
