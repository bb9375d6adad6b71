"""Which process does what: copies of the model, parts of a copy, parts of each matrix."""

from collections.abc import Callable
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
from cleangpt.models.base import LanguageModel, on_meta


def state_bytes(model: LanguageModel) -> int:
    """Bytes of all weights, and of a gradient and two moments of each that trains, in fp32."""
    return sum(parameter.numel() * (16 if parameter.requires_grad else 4) for parameter in model.parameters())


# Which device does what ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layout:
    """The processes as a box: copies of the model x parts of a copy x parts of each matrix; the last are neighbours."""

    replicas: int = 1
    shards: int = 1
    tensor: int = 1

    @property
    def parts(self) -> int:
        """Parts that a batch is cut into; those who share a matrix see the same part."""
        return self.replicas * self.shards

    def part(self, rank: int) -> int:
        """The part of each batch that a process sees."""
        return rank // self.tensor

    @property
    def sharded(self) -> bool:
        """Whether a process holds parts of tensors."""
        return self.shards * self.tensor > 1

    def mesh(self, device: torch.device, timeout: timedelta | None = None) -> DeviceMesh:
        """The box in PyTorch's terms; its groups wait for each other as long as `timeout` (None: PyTorch's own)."""
        names = ("replicate", "shard", "tensor")
        mesh = init_device_mesh(device.type, (self.replicas, self.shards, self.tensor), mesh_dim_names=names)
        if timeout is not None:
            for group in mesh.get_all_groups():
                _set_pg_timeout(timeout, group)  # they do not take over that of the group of all
        return mesh


def layout_for(config: ParallelConfig, world_size: int) -> Layout:
    """How a strategy uses so many processes; `auto` counts as ddp.

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
    parts = world_size // tensor
    if strategy == "hsdp":
        if config.replicas < 2 or parts % config.replicas or parts == config.replicas:
            among = f"{world_size} processes" if tensor == 1 else f"{parts} groups of {tensor} processes"
            raise UserError(
                f"parallel.replicas is {config.replicas}; allowed with strategy hsdp: a divisor of the {among}, "
                "neither 1 nor all of them"
            )
        return Layout(config.replicas, parts // config.replicas, tensor)
    if strategy == "fsdp":
        return Layout(1, parts, tensor)
    return Layout(1, 1, world_size) if strategy == "tp" else Layout(world_size)


def check_compilation(compiled: str, layout: Layout, device: torch.device) -> None:
    """Refuses to compile over gloo where matrices are cut: one run in some thirty has ended in a corrupted heap there.

    Raises:
        UserError: names the field and what is allowed.
    """
    if compiled != "off" and layout.tensor > 1 and device.type == "cpu":
        raise UserError(f"training.compile is {compiled!r}; allowed on CPUs with matrices cut: off; it is not reliable")


def check_loss_chunk(training: TrainingConfig, model: ModelConfig, layout: Layout) -> None:
    """Refuses a loss in chunks where the head is not this process's own, or cannot be called apart from the model.

    Raises:
        UserError: names the field and what is allowed.
    """
    asked = f"training.loss_chunk is {training.loss_chunk}"
    if training.loss_chunk is None:
        return
    if layout.tensor > 1:
        raise UserError(f"{asked}; allowed where matrices are cut: None, for the logits are cut as well")
    if training.compile == "model":
        raise UserError(f"{asked}; allowed with training.compile model: None; compile blocks instead")


def check_devices(device: torch.device, processes: int) -> None:
    """Refuses a device that several processes would have to share, or that has no means to exchange.

    Raises:
        UserError: names the field and what is allowed.
    """
    if processes > 1 and (device.type == "mps" or device.index is not None):
        allowed = "cpu, or cuda, of which each takes its own"
        raise UserError(f"training.device is {str(device)!r}; allowed with {processes} processes: {allowed}")


def choose_layout(
    config: ParallelConfig,
    model: ModelConfig,
    ranks: Ranks,
    device: torch.device,
    freeze_and_add_lora: Callable[[LanguageModel], None] = lambda model: None,
) -> Layout:
    """`layout`, where `auto` becomes fsdp if weights, gradients and moments take more than half of the memory.

    `restrict` changes a model so that what does not train requires no gradient.
    """
    if config.strategy == "auto" and ranks.world_size > 1:
        with on_meta():
            plain = build_model(model)
        freeze_and_add_lora(plain)
        needed, memory = state_bytes(plain), device_memory(device)
        fits = memory is None or needed <= memory / 2
        # Processes may see different amounts of memory; the main one decides for all.
        config = replace(config, strategy=ranks.broadcast("ddp" if fits else "fsdp"))
    return layout_for(config, ranks.world_size)
