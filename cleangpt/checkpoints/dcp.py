"""Tensors cut over many processes, saved and loaded by `torch.distributed.checkpoint` in the files of `shards.py`.

PyTorch plans who writes what and what each reads back; here is only how it is written and read. Its own storage
pickles its index; nothing here is unpickled.
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
    part_name,
    shard_name,
    write_index,
    write_shard,
)
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import UserError

FLAT = (False, False)
"""For PyTorch's planners: the tensors come in one dict already."""


# Writing --------------------------------------------------------------------------------------------------------------
class Parts(DefaultSavePlanner):
    """Plans what this process writes of the tensors that it is made of.

    With `host`, it copies that to the host at once, into the tensors there or new ones, and the copy is written.
    """

    def __init__(self, tensors: dict[str, Tensor], host: dict[MetadataIndex, Tensor] | None) -> None:
        super().__init__(*FLAT)
        super().set_up_planner(tensors)
        super().create_local_plan()
        self.host = host
        if host is not None:
            copy_to_host({item.index: self._part(item) for item in self.plan.items}, host)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Learns whether this is the process that puts the plans together; the tensors are known."""
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """What this process writes."""
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor that is to be written for an item of the plan."""
        return self._part(write_item) if self.host is None else self.host[write_item.index]

    def _part(self, item: WriteItem) -> Tensor:
        part = super().resolve_data(item)
        assert isinstance(part, Tensor)
        return part


def to_write(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of which this process writes its part.

    Of equal copies one is written, by whoever has least to write so far. All processes come to the same result without
    asking each other, so that what another one writes need not be copied to the host here.
    """
    mine: dict[str, Tensor] = {}
    loads: dict[int, list[int]] = {}
    for name, tensor in tensors.items():
        copy, copies = _copy(tensor, ranks)
        load = loads.setdefault(copies, [0] * copies)
        chosen = load.index(min(load))
        load[chosen] += tensor.numel() * tensor.element_size()
        if chosen == copy:
            mine[name] = tensor
    return mine


def _copy(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """Which copy is here, of how many equal ones, of a tensor or of a part of it."""
    if not isinstance(tensor, DTensor):
        return ranks.rank, ranks.world_size
    mesh, copy, copies = tensor.device_mesh, 0, 1
    for place, size, placement in zip(mesh.get_coordinate() or (), mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            copy, copies = copy * size + place, copies * size
    return copy, copies


def write_parts(
    folder: Path,
    planner: Parts,
    rank: int,
    complete: Callable[[Mapping[str, Any]], None],
    group: dist.ProcessGroup,
) -> str:
    """Writes what `planner` has of the tensors, on all processes of `group` together.

    Returns:
        Why that could not be, in a few words; empty where it could.
    """
    try:
        save({}, storage_writer=ShardWriter(folder, rank, complete), planner=planner, process_group=group)
    except CheckpointException as error:
        if reason := _reason(error, (OSError, SafetensorError)):
            return reason
        raise RuntimeError(f"{folder} could not be written: {error}") from error
    return ""


class ShardWriter(FileSystemWriter):
    """Writes one file per process, and the index.

    Args:
        folder: where; made where it is missing.
        rank: this process's number.
        complete: called on the main process when all files are on the disk, with their entries for a manifest.
    """

    def __init__(self, folder: Path, rank: int, complete: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(folder)
        self.folder, self.complete = folder, complete
        self.shard = folder / shard_name(rank)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes and flushes this process's file; the results carry its entry for the manifest."""
        parts = {item.index: cast(Tensor, planner.resolve_data(item)) for item in plan.items}
        entry = write_shard(self.shard, {_name(index): part for index, part in parts.items()})
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, part.nbytes, entry) for index, part in parts.items()])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Runs on the main process when all have written."""
        entries: dict[str, Any] = {}
        files: dict[MetadataIndex, str] = {}
        for result in chain.from_iterable(results):
            entries |= result.storage_data
            (files[result.index],) = result.storage_data
        index = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            parts = [TensorSlice(files[MetadataIndex(name, chunk.offsets)], chunk.offsets, chunk.sizes)
                     for chunk in entry.chunks]  # fmt: skip
            index[name] = TensorEntry(entry.properties.dtype, entry.size, parts)
        write_index(self.folder, index)
        self.complete(entries)


# Reading --------------------------------------------------------------------------------------------------------------
def read_parts(
    folder: Path, index: Mapping[str, TensorEntry], tensors: dict[str, Any], group: dist.ProcessGroup | None
) -> None:
    """Fills `tensors` in place, of which each process reads its parts; as `shards.read_shards`."""
    reader, planner = ShardReader(folder, index), DefaultLoadPlanner(*FLAT)
    try:
        load(tensors, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:
        reason = _reason(error, (OSError, SafetensorError, LookupError, TypeError, ValueError))
        raise (UserError if reason else RuntimeError)(f"{folder} cannot be loaded: {reason or error}") from error


class ShardReader(FileSystemReader):
    """Reads the parts that a process needs from the files that have them."""

    def __init__(self, folder: Path, index: Mapping[str, TensorEntry]) -> None:
        super().__init__(folder)
        self.folder, self.metadata = folder, Metadata({}, storage_data={})
        for name, entry in index.items():
            chunks = [ChunkStorageMetadata(part.offset, part.shape) for part in entry.parts]
            properties = TensorProperties(dtype=entry.dtype)
            self.metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, entry.shape, chunks)
            for part in entry.parts:
                self.metadata.storage_data[MetadataIndex(name, part.offset)] = part.file

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the index says."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies parts of files to their places, file by file."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index], []).append(item)
        for file, items in files.items():
            with safe_open(self.folder / file, framework="pt") as shard:
                for item in items:
                    _read_part(shard, item, planner.resolve_tensor(item).detach())
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_part(shard: Any, item: ReadItem, place: Tensor) -> None:
    """Copies what `item` asks for from an open safetensors file to `place`."""
    name = _name(item.storage_index)
    ends = [start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True)]
    where = tuple(map(slice, item.storage_offsets, ends))
    place.copy_(shard.get_slice(name)[where] if where else shard.get_tensor(name))


# Both -----------------------------------------------------------------------------------------------------------------
def _name(index: MetadataIndex) -> str:
    """A part's name in its file."""
    return part_name(index.fqn, tuple(index.offset or ()))


def _reason(error: CheckpointException, expected: tuple[type[Exception], ...]) -> str:
    """What the system or a file is to blame for, in a few words; empty where the cause is another than `expected`."""
    rank, (cause, _) = min(error.failures.items())
    return f"{cause} (process {rank})" if isinstance(cause, expected) else ""
