"""The processes of a run: a single one, or those that torchrun starts, one per device.

RANK numbers the processes of all machines, and decides which samples a process reads and whether it logs; LOCAL_RANK
numbers those of one machine, and decides which of its devices a process uses.
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

from cleangpt.distributed.signals import ignore_signal
from cleangpt.errors import RunFailedError, UserError

T = TypeVar("T")


PATIENCE = timedelta(seconds=3)
"""How long a process that lost another waits for others to report an error, before it names the silent ones."""


@dataclass(frozen=True)
class Ranks:
    """This process among all, and the collectives over them."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    heartbeats: Store | None = field(default=None, repr=False, compare=False)
    """Key-value store in which the processes report their steps and errors; None: a single process."""
    launch: Store | None = field(default=None, repr=False, compare=False)
    """Key-value store that outlives the processes: torchrun keeps it across restarts."""
    timeout: timedelta = timedelta(minutes=10)
    """How long a collective waits for the other processes."""
    owns_group: bool = True
    """Whether the process group ends with the run; False if Ray Train created it."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """All-reduces numbers by sum in float64, on the host, so that no device is synchronized."""
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """All-reduces a tensor by sum, in place, on its device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on the main process and broadcasts its result.

        Raises:
            UserError: raised by `work`; on every process.
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

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Runs `work` on the main process, then on the others, which wait without a timeout."""
        while self.heartbeats is not None and not self.is_main and not self.heartbeats.check(["main_done"]):
            time.sleep(0.05)
        result = work()
        if self.heartbeats is not None and self.is_main:
            self.heartbeats.set("main_done", "")
        return result

    def across_restarts(self, name: str, value: str) -> str:
        """The first `value` that any process of this torchrun launch gave for `name`; it survives restarts."""
        if self.launch is None:
            return value
        first: bytes = self.launch.compare_set(f"cleangpt_{name}", "", value)
        return first.decode()

    def heartbeat(self, step: int) -> None:
        """Reports the step that this process has reached, for the others to name should it fail."""
        if self.heartbeats is not None:
            self.heartbeats.set(f"step_{self.rank}", f"{step} {platform.node()}")

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the process group; after an error, reports it to the others, or finds out which process failed.

        Raises:
            RunFailedError: another process failed, ended or hangs; names it, its machine and its step.
        """
        if error is None:
            self.leave()
        elif self.heartbeats is not None and _is_connection_error(error):
            # torchrun sends SIGTERM when one process has died, before the others can report it.
            with ignore_signal(signal.SIGTERM):
                reason = _diagnose(self, self.heartbeats, "timed out" in str(error).lower())
                _stay_for_others(self, self.heartbeats)
            raise RunFailedError(reason) from error
        elif self.heartbeats is not None:
            _report_failure(self.rank, self.heartbeats, error)

    def leave(self) -> None:
        """Waits for the others and destroys the process group; one that has already left is no failure."""
        if self.world_size > 1:
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            if self.owns_group:
                dist.destroy_process_group()


def join(timeout: int = 600) -> Ranks:
    """Joins the process group that the environment variables describe; without them, a single process.

    Args:
        timeout: limit for collectives, in seconds.
    """
    if world_size() == 1:
        return Ranks()
    limit = timedelta(seconds=timeout)
    rank, local = int(os.environ["RANK"]), local_rank()
    if local < torch.cuda.device_count():  # with more processes than GPUs, training is on the CPU
        torch.cuda.set_device(local)
    external = dist.is_initialized()
    if external:  # by Ray Train, which sets torchrun's variables too
        launch = store = dist.distributed_c10d._get_default_store()
    else:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, _, _ = next(rendezvous("env://", timeout=limit))
        # torchrun keeps its store across restarts; without a prefix, new processes would find addresses of dead ones.
        launch = store
        store = PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size(), timeout=limit)
    ranks = Ranks(rank, local, world_size(), PrefixStore("heartbeats", store), launch, limit, owns_group=not external)
    ranks.heartbeat(0)
    return ranks


def world_size() -> int:
    """The number of processes, also before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, also before it has joined."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


# When a process fails ------------------------------------------------------------------------------------------------
def _is_connection_error(error: BaseException) -> bool:
    """Whether another process could not be reached; gloo raises a plain RuntimeError for that."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _report_failure(rank: int, heartbeats: Store, error: BaseException) -> None:
    """Reports this process's own error to those that will lose the connection to it."""
    reason = str(error) or type(error).__name__
    with contextlib.suppress(RuntimeError):
        step, machine = _last_heartbeat(rank, heartbeats)
        heartbeats.set("error", f"process {rank} (machine {machine}) failed at step {step}: {reason}")


def _diagnose(ranks: Ranks, heartbeats: Store, timed_out: bool) -> str:
    """Why a collective failed: the error that a process reported, or which processes are silent."""
    try:
        heartbeats.set(f"lost_{ranks.rank}", "")
        if timed_out:  # gloo then closes the connections to the others, who see no more than that
            heartbeats.set("timed_out", "")
        with contextlib.suppress(dist.DistStoreError):
            heartbeats.wait(["error"], PATIENCE)
            return str(heartbeats.get("error").decode())
        timed_out = heartbeats.check(["timed_out"])
        silent = [rank for rank in range(ranks.world_size) if not heartbeats.check([f"lost_{rank}"])]
        step_here, _ = _last_heartbeat(ranks.rank, heartbeats)
        last_seen = [(*_last_heartbeat(rank, heartbeats), rank) for rank in silent]
    except RuntimeError:
        return "the machine that hosts the rendezvous is unreachable"
    # Some silent processes may only be waiting for the one that failed; they have got further than it.
    failed = " and ".join(
        f"process {rank} (machine {machine}), last heard of at step {step}"
        for step, machine, rank in last_seen
        if step == min(last_seen)[0]
    )
    if timed_out:
        return (
            f"no answer within {ranks.timeout.total_seconds():.0f} s at step {step_here} from {failed or 'any process'}"
        )
    return f"lost the connection at step {step_here} to {failed or 'another process'}"


def _stay_for_others(ranks: Ranks, heartbeats: Store) -> None:
    """Keeps the store alive, where this process hosts it, until the others that are alive have found the reason too."""
    with contextlib.suppress(RuntimeError):
        heartbeats.set(f"diagnosed_{ranks.rank}", "")
        if ranks.is_main:
            alive = [rank for rank in range(ranks.world_size) if heartbeats.check([f"lost_{rank}"])]
            heartbeats.wait([f"diagnosed_{rank}" for rank in alive], PATIENCE)


def _last_heartbeat(rank: int, heartbeats: Store) -> tuple[int, str]:
    """The step and the machine that a process last reported."""
    step, machine = heartbeats.get(f"step_{rank}").decode().split(" ", 1)
    return int(step), machine
