"""The layout of the processes: a device mesh of replicas x shards x tensor-parallel ranks."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from cleangpt.config import ModelConfig, ParallelConfig, TrainingConfig
from cleangpt.distributed.device import device_memory
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.meta import on_meta


def state_bytes(model: LanguageModel) -> int:
    """Bytes of weights, and of gradients and both moments of those that train, in fp32."""
    return sum(parameter.numel() * (16 if parameter.requires_grad else 4) for parameter in model.parameters())


@dataclass(frozen=True)
class Layout:
    """The sizes of the device mesh (replicate, shard, tensor); tensor-parallel ranks are neighbours."""

    replicas: int = 1
    shards: int = 1
    tensor: int = 1

    @property
    def dp_size(self) -> int:
        """The number of data-parallel ranks; tensor-parallel ranks count as one, since they read the same samples."""
        return self.replicas * self.shards

    def dp_rank(self, rank: int) -> int:
        """The data-parallel rank of a process."""
        return rank // self.tensor

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded, as `DTensor`s."""
        return self.shards * self.tensor > 1

    def mesh(self, device: torch.device, timeout: timedelta | None = None) -> DeviceMesh:
        """PyTorch's device mesh; `timeout` limits its collectives (None: PyTorch's default)."""
        names = ("replicate", "shard", "tensor")
        mesh = init_device_mesh(device.type, (self.replicas, self.shards, self.tensor), mesh_dim_names=names)
        if timeout is not None:
            for group in mesh.get_all_groups():
                _set_pg_timeout(timeout, group)  # they do not inherit the default group's
        return mesh


def layout_for(config: ParallelConfig, world_size: int) -> Layout:
    """The layout of a strategy on `world_size` processes; `auto` counts as ddp.

    Raises:
        UserError: the strategy does not fit the number of processes.
    """
    strategy, tensor = config.strategy, config.tensor
    if tensor > 1 and strategy not in ("fsdp", "hsdp"):
        raise UserError(f"parallel.tensor is {tensor}; allowed with strategy {strategy}: 1 (fsdp and hsdp take more)")
    if world_size == 1:
        return Layout()
    if world_size % tensor:
        raise UserError(f"parallel.tensor is {tensor}; allowed: a divisor of the {world_size} processes")
    dp_size = world_size // tensor
    if strategy == "hsdp":
        if config.replicas < 2 or dp_size % config.replicas or dp_size == config.replicas:
            among = f"{world_size} processes" if tensor == 1 else f"{dp_size} groups of {tensor} processes"
            raise UserError(
                f"parallel.replicas is {config.replicas}; allowed with strategy hsdp: a divisor of the {among}, "
                "neither 1 nor all of them"
            )
        return Layout(config.replicas, dp_size // config.replicas, tensor)
    if strategy == "fsdp":
        return Layout(1, dp_size, tensor)
    return Layout(1, 1, world_size) if strategy == "tp" else Layout(world_size)


def check_compilation(compiled: str, layout: Layout, device: torch.device) -> None:
    """Refuses to compile under tensor parallelism over gloo: about one run in thirty ended there in a corrupted heap.

    Raises:
        UserError: names the field and what is allowed.
    """
    if compiled != "off" and layout.tensor > 1 and device.type == "cpu":
        raise UserError(f"training.compile is {compiled!r}; allowed with tensor parallelism on CPUs: off")


def check_loss_chunk(training: TrainingConfig, model: ModelConfig, layout: Layout) -> None:
    """Refuses a chunked loss where the head is sharded, or compiled together with the model.

    Raises:
        UserError: names the field and what is allowed.
    """
    asked = f"training.loss_chunk is {training.loss_chunk}"
    if training.loss_chunk is None:
        return
    if layout.tensor > 1:
        raise UserError(f"{asked}; allowed with tensor parallelism: None, since the logits are sharded")
    if training.compile == "model":
        raise UserError(f"{asked}; allowed with training.compile model: None; compile blocks instead")


def check_devices(device: torch.device, processes: int) -> None:
    """Refuses a device that several processes would have to share, or that has no collectives.

    Raises:
        UserError: names the field and what is allowed.
    """
    if processes > 1 and (device.type == "mps" or device.index is not None):
        allowed = "cpu, or cuda, where each process takes its own device"
        raise UserError(f"training.device is {str(device)!r}; allowed with {processes} processes: {allowed}")


def choose_layout(
    config: ParallelConfig,
    model: ModelConfig,
    ranks: Ranks,
    device: torch.device,
    prepare: Callable[[LanguageModel], None] = lambda model: None,
    heads: Collection[str] = (),
) -> Layout:
    """As `layout_for`, but `auto` becomes fsdp if weights, gradients and moments take over half of a device's memory.

    `prepare` changes a model with these scalar `heads` in place, as for `parallelize`: only parameters that require a
    gradient count as trained.
    """
    if config.strategy == "auto" and ranks.world_size > 1:
        with on_meta():
            plain = build_model(model, heads)
        prepare(plain)
        needed, memory = state_bytes(plain), device_memory(device)
        fits = memory is None or needed <= memory / 2
        # Ranks may see different amounts of memory; the main process decides.
        config = replace(config, strategy=ranks.broadcast("ddp" if fits else "fsdp"))
    return layout_for(config, ranks.world_size)
