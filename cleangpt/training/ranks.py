"""The processes of a run: one alone, or those that torchrun started, each with its own device.

RANK says which part of the data a process has and whether it speaks; LOCAL_RANK says which device of its machine it
uses. They differ as soon as there are two machines.
"""

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this one is."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over the processes; on the host, so no device is waited for."""
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """A tensor summed over the processes, on its device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Waits for the others and ends the process group; a neighbour that has left before is no failure any more."""
        if self.world_size > 1:
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            dist.destroy_process_group()


def join() -> Ranks:
    """Joins the process group that torchrun's environment describes; without one, this process is alone."""
    if world_size() == 1:
        return Ranks()
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), world_size())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps its store when it starts processes again; without a prefix of their own, the new ones would find
    # the addresses of the dead ones there.
    store = PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return ranks


def world_size() -> int:
    """Processes in the run, before any of them has joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))
