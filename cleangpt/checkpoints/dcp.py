"""Tensors sharded over several processes, saved and loaded by `torch.distributed.checkpoint` (DCP).

DCP plans which process writes and reads what; this module is its storage, in the files of `tensor_files.py`. DCP's own
storage pickles its metadata; nothing here is unpickled.
"""

import io
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from cleangpt.checkpoints.tensor_files import (
    TensorEntry,
    TensorSlice,
    copy_to_host,
    shard_name,
    slice_name,
    write_index,
    write_shard,
)
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import UserError

FLAT = (False, False)
"""For DCP's planners: the state dict is already flat (`flatten_state_dict`, `flatten_sharded_tensors`)."""


# Writing --------------------------------------------------------------------------------------------------------------
class ShardPlanner(DefaultSavePlanner):
    """Plans this process's shard of some tensors.

    With `host`, the shard is copied into the tensors there at once, and the copy is what will be written.
    """

    def __init__(self, tensors: dict[str, Tensor], host: dict[MetadataIndex, Tensor] | None) -> None:
        super().__init__(*FLAT)
        super().set_up_planner(tensors)
        super().create_local_plan()
        self.host = host
        if host is not None:
            copy_to_host({item.index: self._tensor(item) for item in self.plan.items}, host)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Sets whether this is the coordinator; the tensors are known already."""
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """The plan made at construction."""
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor to write for an item of the plan."""
        return self._tensor(write_item) if self.host is None else self.host[write_item.index]

    def _tensor(self, item: WriteItem) -> Tensor:
        tensor = super().resolve_data(item)
        assert isinstance(tensor, Tensor)
        return tensor


def tensors_to_write(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of which this process writes its shard.

    Each replicated tensor is written once, by the least-loaded rank. All processes compute the same assignment without
    communicating, so none copies to the host what another one writes.
    """
    mine: dict[str, Tensor] = {}
    loads: dict[int, list[int]] = {}
    for name, tensor in tensors.items():
        replica, replicas = _replica(tensor, ranks)
        load = loads.setdefault(replicas, [0] * replicas)
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if writer == replica:
            mine[name] = tensor
    return mine


def _replica(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """Which replica of a tensor, or of a shard of it, this process has, and how many there are."""
    if not isinstance(tensor, DTensor):
        return ranks.rank, ranks.world_size
    mesh, replica, replicas = tensor.device_mesh, 0, 1
    for coordinate, size, placement in zip(mesh.get_coordinate() or (), mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            replica, replicas = replica * size + coordinate, replicas * size
    return replica, replicas


def write_shards(
    folder: Path,
    planner: ShardPlanner,
    rank: int,
    complete: Callable[[Mapping[str, Any]], None],
    group: dist.ProcessGroup,
) -> str:
    """Writes every process's shard; a collective over `group`, arguments as for `ShardWriter`.

    Returns:
        Why writing failed, or an empty string.
    """
    try:
        save({}, storage_writer=ShardWriter(folder, rank, complete), planner=planner, process_group=group)
    except CheckpointException as error:
        if reason := _reason(error, (OSError, SafetensorError)):
            return reason
        raise RuntimeError(f"{folder} could not be written: {error}") from error
    return ""


class ShardWriter(FileSystemWriter):
    """Writes one shard per process, and the index.

    Args:
        folder: created if missing.
        rank: this process's rank.
        complete: called on the main process once all shards are fsynced, with their manifest entries.
    """

    def __init__(self, folder: Path, rank: int, complete: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(folder)
        self.folder, self.complete = folder, complete
        self.shard = folder / shard_name(rank)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes and fsyncs this process's shard; the results carry its manifest entry."""
        tensors = {item.index: cast(Tensor, planner.resolve_data(item)) for item in plan.items}
        entry = write_shard(self.shard, {_name(index): tensor for index, tensor in tensors.items()})
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, tensor.nbytes, entry) for index, tensor in tensors.items()])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the index; runs on the main process when all shards are written."""
        entries: dict[str, Any] = {}
        files: dict[MetadataIndex, str] = {}
        for result in chain.from_iterable(results):
            entries |= result.storage_data
            (files[result.index],) = result.storage_data
        index = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            slices = [
                TensorSlice(files[MetadataIndex(name, chunk.offsets)], chunk.offsets, chunk.sizes)
                for chunk in entry.chunks
            ]
            index[name] = TensorEntry(entry.properties.dtype, entry.size, slices)
        write_index(self.folder, index)
        self.complete(entries)


# Reading --------------------------------------------------------------------------------------------------------------
def read_shards(
    folder: Path, index: Mapping[str, TensorEntry], tensors: dict[str, Any], group: dist.ProcessGroup | None
) -> None:
    """Fills `tensors` in place, each process its own shards; a collective over `group`.

    Raises:
        UserError: a file cannot be read, or has no such tensor, or one of another shape.
    """
    reader, planner = ShardReader(folder, index), DefaultLoadPlanner(*FLAT)
    try:
        load(tensors, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:
        reason = _reason(error, (OSError, SafetensorError, LookupError, TypeError, ValueError))
        raise (UserError if reason else RuntimeError)(f"{folder} cannot be loaded: {reason or error}") from error


class ShardReader(FileSystemReader):
    """Reads the slices that a process needs from the shards that hold them."""

    def __init__(self, folder: Path, index: Mapping[str, TensorEntry]) -> None:
        super().__init__(folder)
        self.folder, self.metadata = folder, Metadata({}, storage_data={})
        for name, entry in index.items():
            chunks = [ChunkStorageMetadata(piece.offset, piece.shape) for piece in entry.slices]
            properties = TensorProperties(dtype=entry.dtype)
            self.metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, entry.shape, chunks)
            for piece in entry.slices:
                self.metadata.storage_data[MetadataIndex(name, piece.offset)] = piece.file

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as DCP's metadata."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies slices from the shards into the tensors, file by file."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index], []).append(item)
        for file, items in files.items():
            with safe_open(self.folder / file, framework="pt") as shard:
                for item in items:
                    _read_slice(shard, item, planner.resolve_tensor(item).detach())
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_slice(shard: Any, item: ReadItem, target: Tensor) -> None:
    """Copies the slice that `item` describes from an open safetensors file into `target`."""
    name = _name(item.storage_index)
    ends = [start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True)]
    where = tuple(map(slice, item.storage_offsets, ends))
    target.copy_(shard.get_slice(name)[where] if where else shard.get_tensor(name))


# Both -----------------------------------------------------------------------------------------------------------------
def _name(index: MetadataIndex) -> str:
    """A slice's key in its file."""
    return slice_name(index.fqn, tuple(index.offset or ()))


def _reason(error: CheckpointException, expected: tuple[type[Exception], ...]) -> str:
    """The cause and rank of a failure, if the cause is one of the `expected` errors; else an empty string."""
    rank, (cause, _) = min(error.failures.items())
    return f"{cause} (process {rank})" if isinstance(cause, expected) else ""
