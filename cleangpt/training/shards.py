"""Tensors cut over many processes, in safetensors files: storage for `torch.distributed.checkpoint`.

    shard_00000.safetensors …   the tensors that one process wrote, or its parts of them
    index.json                  every tensor by name: dtype, shape, and which file has which part

PyTorch plans who writes what and what each reads back; here is only how it is written and read. Its own storage
pickles its index; nothing here is unpickled.
"""

import json
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from cleangpt.errors import blaming
from cleangpt.files import flush, plain_name, read_json, write_text

INDEX = "index.json"
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


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
        self.shard = folder / f"shard_{rank:05d}.safetensors"

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes and flushes this process's file; the results carry its entry for the manifest."""
        parts = {_part_name(item.index): _on_host(planner, item) for item in plan.items}
        if parts:
            save_file(parts, self.shard)
        entry = flush([self.shard]) if parts else {}
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, parts[_part_name(item.index)].nbytes, entry) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Runs on the main process when all have written."""
        entries: dict[str, Any] = {}
        files: dict[MetadataIndex, str] = {}
        for result in chain.from_iterable(results):
            entries |= result.storage_data
            (files[result.index],) = result.storage_data
        _write_index(self.folder / INDEX, metadata, files)
        self.complete(entries)


class ShardReader(FileSystemReader):
    """Reads the parts that a process needs from the files that have them; `metadata` is from `read_index`."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.folder, self.metadata = folder, metadata

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


def read_index(folder: Path) -> Metadata:
    """What `ShardWriter` said of the tensors in `folder`: all are `TensorStorageMetadata`.

    Raises:
        UserError: the index is missing or not valid JSON.
    """
    metadata = Metadata({}, storage_data={})
    content = read_json(folder / INDEX)
    with blaming(folder / INDEX):
        for name, entry in content.items():
            tensor = TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[entry["dtype"]]), torch.Size(entry["shape"]), []
            )
            for part in entry["parts"]:
                chunk = ChunkStorageMetadata(torch.Size(part["offset"]), torch.Size(part["shape"]))
                tensor.chunks.append(chunk)
                file = plain_name(part["file"], folder / INDEX)
                metadata.storage_data[MetadataIndex(name, chunk.offsets)] = file
            metadata.state_dict_metadata[name] = tensor
    return metadata


def _write_index(path: Path, metadata: Metadata, files: Mapping[MetadataIndex, str]) -> None:
    """The opposite of `read_index`; `files` says which file has a part."""
    index = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        parts = [{"file": files[MetadataIndex(name, chunk.offsets)], "offset": chunk.offsets, "shape": chunk.sizes}
                 for chunk in entry.chunks]  # fmt: skip
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        index[name] = {"dtype": dtype, "shape": entry.size, "parts": parts}
    write_text(path, json.dumps(index) + "\n")


def _on_host(planner: SavePlanner, item: WriteItem) -> Tensor:
    """The part that an item of a plan stands for."""
    part = planner.resolve_data(item)
    assert isinstance(part, Tensor)
    return part.detach().cpu().contiguous()


def _read_part(shard: Any, item: ReadItem, place: Tensor) -> None:
    """Copies what `item` asks for from an open safetensors file to `place`."""
    name = _part_name(item.storage_index)
    ends = [start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True)]
    where = tuple(map(slice, item.storage_offsets, ends))
    place.copy_(shard.get_slice(name)[where] if where else shard.get_tensor(name))


def _part_name(index: MetadataIndex) -> str:
    """A part's name in its file: that of the tensor and, unless it is at the tensor's start, where it begins."""
    offset = list(index.offset or ())
    return f"{index.fqn}{offset}" if any(offset) else index.fqn
