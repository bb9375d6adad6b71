"""Tensors in safetensors files, whole or in the parts that processes had of them.

    shard_00000.safetensors …   the tensors that one process wrote, or its parts of them
    index.json                  every tensor by name: dtype, shape, and which file has which part

A process that has whole tensors writes and reads them here. Where several have parts of one, `dcp.py` plans who writes
what and what each reads back; it takes half as long to load as PyTorch, so that it is loaded only there.
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cleangpt.errors import UserError, parsing
from cleangpt.files import fsync_files, read_json, safe_name, write_text

INDEX = "index.json"


DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


Key = TypeVar("Key", bound=Hashable)


class TensorSlice(NamedTuple):
    """A box of a tensor: the file that has it, where it begins and how large it is."""

    file: str
    offset: torch.Size
    shape: torch.Size


class TensorEntry(NamedTuple):
    """What the index says of a tensor."""

    dtype: torch.dtype
    shape: torch.Size
    parts: list[TensorSlice]


def shard_name(rank: int) -> str:
    """The file of a process."""
    return f"shard_{rank:05d}.safetensors"


def part_name(name: str, offset: Sequence[int]) -> str:
    """A part's name in its file: that of the tensor and, unless it is at the tensor's start, where it begins."""
    return f"{name}{list(offset)}" if any(offset) else name


# Writing --------------------------------------------------------------------------------------------------------------
def copy_to_host(parts: Mapping[Key, Tensor], host: dict[Key, Tensor]) -> None:
    """Copies tensors into those of `host`, or into new ones there; the memory of a device's is pinned."""
    for key, part in parts.items():
        if key not in host or host[key].shape != part.shape:
            host[key] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        host[key].copy_(part, non_blocking=part.is_cuda)
    if any(part.is_cuda for part in parts.values()):
        torch.cuda.synchronize()


def write_whole(folder: Path, tensors: Mapping[str, Tensor], complete: Callable[[Mapping[str, Any]], None]) -> str:
    """Writes the file of the one process there is, and the index.

    Args:
        folder: where; made where it is missing.
        tensors: whole.
        complete: called when the file is on the disk, with its entry for a manifest.

    Returns:
        Why that could not be, in a few words; empty where it could.
    """
    file = shard_name(0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entry = write_shard(folder / file, tensors)
        write_index(folder, {
            name: TensorEntry(
                tensor.dtype, tensor.shape, [TensorSlice(file, torch.Size([0] * tensor.dim()), tensor.shape)]
            )
            for name, tensor in tensors.items()
        })  # fmt: skip
        complete(entry)
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def write_shard(path: Path, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes a process's file, unless it has nothing to write, and flushes it; returns its entry for a manifest."""
    if not parts:
        return {}
    save_file({name: part.detach().cpu().contiguous() for name, part in parts.items()}, path)
    return fsync_files([path])


def write_index(folder: Path, index: Mapping[str, TensorEntry]) -> None:
    """The opposite of `read_index`."""
    content = {
        name: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": entry.shape,
            "parts": [part._asdict() for part in entry.parts],
        }
        for name, entry in index.items()
    }
    write_text(folder / INDEX, json.dumps(content) + "\n")


# Reading --------------------------------------------------------------------------------------------------------------
def read_index(folder: Path) -> dict[str, TensorEntry]:
    """What `write_index` said of the tensors in `folder`.

    Raises:
        UserError: the index is missing, not valid JSON, or not what `write_index` writes.
    """
    content = read_json(folder / INDEX)
    with parsing(folder / INDEX):
        return {
            name: TensorEntry(
                DTYPES[entry["dtype"]],
                torch.Size(entry["shape"]),
                [
                    TensorSlice(
                        safe_name(part["file"], folder / INDEX), torch.Size(part["offset"]), torch.Size(part["shape"])
                    )
                    for part in entry["parts"]
                ],
            )
            for name, entry in content.items()
        }


def read_whole(folder: Path, index: Mapping[str, TensorEntry], tensors: Mapping[str, Tensor]) -> None:
    """Fills whole tensors, file by file."""
    files: dict[str, list[tuple[str, TensorSlice]]] = {}
    try:
        for name, tensor in tensors.items():
            if index[name].shape != tensor.shape:
                raise ValueError(f"{name} is {list(index[name].shape)} there and {list(tensor.shape)} here")
            for part in index[name].parts:
                files.setdefault(part.file, []).append((name, part))
        for file, parts in files.items():
            with safe_open(folder / file, framework="pt") as shard:
                for name, part in parts:
                    box = tuple(slice(start, start + size) for start, size in zip(part.offset, part.shape, strict=True))
                    saved, place = shard.get_tensor(part_name(name, part.offset)), tensors[name][box]
                    if saved.shape != place.shape:
                        raise ValueError(f"{file} has {list(saved.shape)} of {name}, not {list(place.shape)}")
                    place.copy_(saved)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error
