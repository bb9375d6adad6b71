"""The processes of a run: one alone, or those that torchrun started, each with its own device.

RANK says which part of the data a process has and whether it speaks; LOCAL_RANK says which device of its machine it
uses. They differ as soon as there are two machines.
"""

import contextlib
import os
import platform
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from cleangpt.distributed.signals import without
from cleangpt.errors import RunFailedError, UserError

T = TypeVar("T")


PATIENCE = timedelta(seconds=3)
"""How long a process that has lost another waits for the word of the rest, before it says who is silent."""


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this one is."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    notes: Store | None = field(default=None, repr=False, compare=False)
    """Where the processes leave word of themselves: their steps and errors. None: a process alone."""
    launch: Store | None = field(default=None, repr=False, compare=False)
    """Where torchrun keeps what its processes tell, also when it starts them anew."""
    timeout: timedelta = timedelta(minutes=10)
    """How long a process waits for the others."""
    owns_group: bool = True
    """Whether the process group ends with the run; not where Ray Train has made it."""

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

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main process, on every process.

        Raises:
            UserError: that of `work`, on all of them.
        """
        outcome: Any = None
        if self.is_main:
            try:
                outcome = work()
            except UserError as error:
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return cast(T, outcome)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def after_main(self, work: Callable[[], T]) -> T:
        """What `work` returns, once the main process has done it; the others wait for that as long as it takes."""
        while self.notes is not None and not self.is_main and not self.notes.check(["main_done"]):
            time.sleep(0.05)
        result = work()
        if self.notes is not None and self.is_main:
            self.notes.set("main_done", "")
        return result

    def of_launch(self, name: str, value: str) -> str:
        """The `value` that the first process of this launch gave under a name, before torchrun started any anew."""
        if self.launch is None:
            return value
        first: bytes = self.launch.compare_set(f"cleangpt_{name}", "", value)
        return first.decode()

    def heartbeat(self, step: int) -> None:
        """Leaves word of the step that this process has reached, for the others to find should it fall silent."""
        if self.notes is not None:
            self.notes.set(f"step_{self.rank}", f"{step} {platform.node()}")

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves; after an error, tells the others why, or says which of them is missing.

        Raises:
            RunFailedError: another process failed, ended or fell silent; names it, its machine and its step.
        """
        if error is None:
            self.leave()
        elif self.notes is not None and _is_of_the_connection(error):
            # torchrun sends SIGTERM when one process has died, before the others can say so.
            with ignore_signal(signal.SIGTERM):
                reason = _explain(self, self.notes, "timed out" in str(error).lower())
            raise RunFailedError(reason) from error
        elif self.notes is not None:
            _tell_failure(self.rank, self.notes, error)

    def leave(self) -> None:
        """Waits for the others and ends the process group; a neighbour that has left before is no failure any more."""
        if self.world_size > 1:
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            if self.owns_group:
                dist.destroy_process_group()


def join(timeout: int = 600) -> Ranks:
    """Joins the process group that the environment describes; without one, this process is alone.

    Args:
        timeout: seconds that a process waits for the others before it gives up.
    """
    if world_size() == 1:
        return Ranks()
    limit = timedelta(seconds=timeout)
    rank, local = int(os.environ["RANK"]), local_rank()
    if local < torch.cuda.device_count():  # more processes than GPUs may train on the CPU
        torch.cuda.set_device(local)
    made = dist.is_initialized()
    if made:  # by Ray Train, which also sets the variables that torchrun sets
        launch = store = dist.distributed_c10d._get_default_store()
    else:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, _, _ = next(rendezvous("env://", timeout=limit))
        # torchrun keeps its store when it starts processes again; without a prefix of their own, the new ones would
        # find the addresses of the dead ones there.
        launch = store
        store = PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size(), timeout=limit)
    ranks = Ranks(rank, local, world_size(), PrefixStore("notes", store), launch, limit, owns_group=not made)
    ranks.heartbeat(0)
    return ranks


def world_size() -> int:
    """Processes in the run, before any of them has joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of the processes of its machine this one is, before any of them has joined."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


# When one is missing -------------------------------------------------------------------------------------------------
def _is_of_the_connection(error: BaseException) -> bool:
    """Whether an error only says that another process could not be reached: gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _tell_failure(rank: int, notes: Store, error: BaseException) -> None:
    """Leaves word of this process's own error, for those that will miss it."""
    reason = str(error) or type(error).__name__
    with contextlib.suppress(RuntimeError):
        step, machine = _last_heartbeat(rank, notes)
        notes.set("error", f"process {rank} (machine {machine}) failed at step {step}: {reason}")


def _explain(ranks: Ranks, notes: Store, timed_out: bool) -> str:
    """Why a message to or from another process failed: the error that one left word of, or who is silent, where."""
    try:
        notes.set(f"lost_{ranks.rank}", "")
        with contextlib.suppress(dist.DistStoreError):
            notes.wait(["error"], PATIENCE)
            return str(notes.get("error").decode())
        silent = [rank for rank in range(ranks.world_size) if not notes.check([f"lost_{rank}"])]
        here, _ = _last_heartbeat(ranks.rank, notes)
        known = [(*_last_heartbeat(rank, notes), rank) for rank in silent]
    except RuntimeError:
        return "the machine that holds the rendezvous cannot be reached any more"
    # Among the silent may be some that wait for the one in question, and so have come further than it.
    who = " and ".join(
        f"process {rank} (machine {machine}), last heard of at step {step}"
        for step, machine, rank in known
        if step == min(known)[0]
    )
    if timed_out:
        return f"no answer within {ranks.timeout.total_seconds():.0f} s at step {here} from {who or 'any process'}"
    return f"lost the connection at step {here}; no more was heard of {who or 'the others'}"


def _last_heartbeat(rank: int, notes: Store) -> tuple[int, str]:
    """The step and the machine that a process last left word of."""
    step, machine = notes.get(f"step_{rank}").decode().split(" ", 1)
    return int(step), machine
