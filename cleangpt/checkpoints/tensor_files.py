"""Full and sharded tensors in safetensors files.

    shard_00000.safetensors …   the tensors that one process wrote, or its slices of them
    index.json                  every tensor by name: dtype, full shape, and which file holds which slice

A single process with full tensors writes and reads them here. With several processes, `dcp.py` plans which process
writes and reads what; importing it takes half as long as importing PyTorch, so it is imported only then.
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
PYTORCH = ("format", "pt")
"""The metadata by which other libraries know a file of PyTorch's tensors."""


DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


Key = TypeVar("Key", bound=Hashable)


class TensorSlice(NamedTuple):
    """A slice of a tensor: its file, its offset in the full tensor, and its shape."""

    file: str
    offset: torch.Size
    shape: torch.Size


class TensorEntry(NamedTuple):
    """A tensor in the index."""

    dtype: torch.dtype
    shape: torch.Size
    slices: list[TensorSlice]


def shard_name(rank: int) -> str:
    """The file name of a process's shard."""
    return f"shard_{rank:05d}.safetensors"


def slice_name(name: str, offset: Sequence[int]) -> str:
    """A slice's key in its file: the tensor's name, followed by the offset unless that is zero."""
    return f"{name}{list(offset)}" if any(offset) else name


# Writing --------------------------------------------------------------------------------------------------------------
def copy_to_host(tensors: Mapping[Key, Tensor], host: dict[Key, Tensor]) -> None:
    """Copies tensors into those of `host`, allocating them if needed, in pinned memory for GPU tensors."""
    for key, tensor in tensors.items():
        if key not in host or host[key].shape != tensor.shape:
            host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host[key].copy_(tensor, non_blocking=tensor.is_cuda)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # which need not be the current one


def write_full_tensors(
    folder: Path, tensors: Mapping[str, Tensor], complete: Callable[[Mapping[str, Any]], None]
) -> str:
    """Writes full tensors from a single process: one shard and the index.

    Args:
        folder: created if missing.
        tensors: by name, full.
        complete: called once the shard is fsynced, with its manifest entry.

    Returns:
        Why writing failed, or an empty string.
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: tuple[str, str] | None = None) -> None:
    """Writes a safetensors file that is as readable as any other new file; safetensors itself makes it private.

    Args:
        path: of the file.
        tensors: by name; on the host, contiguous.
        metadata: a key and its text. Only one, since safetensors writes several in random order.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, None if metadata is None else dict([metadata]))
    path.chmod(mode)


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes and fsyncs a process's shard, unless it is empty; returns its manifest entry."""
    if not tensors:
        return {}
    write_tensors(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return fsync_files([path])


def write_index(folder: Path, index: Mapping[str, TensorEntry]) -> None:
    """Writes index.json."""
    content = {
        name: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": entry.shape,
            "parts": [piece._asdict() for piece in entry.slices],
        }
        for name, entry in index.items()
    }
    write_text(folder / INDEX, json.dumps(content) + "\n")


# Reading --------------------------------------------------------------------------------------------------------------
def read_index(folder: Path) -> dict[str, TensorEntry]:
    """Reads the index.json that `write_index` wrote.

    Raises:
        UserError: the index is missing, not valid JSON, or not what `write_index` writes.
    """
    path = folder / INDEX
    content = read_json(path)

    def to_slice(piece: Mapping[str, Any]) -> TensorSlice:
        return TensorSlice(safe_name(piece["file"], path), torch.Size(piece["offset"]), torch.Size(piece["shape"]))

    with parsing(path):
        return {
            name: TensorEntry(DTYPES[entry["dtype"]], torch.Size(entry["shape"]), list(map(to_slice, entry["parts"])))
            for name, entry in content.items()
        }


def read_full_tensors(folder: Path, index: Mapping[str, TensorEntry], tensors: Mapping[str, Tensor]) -> None:
    """Fills full tensors in place, file by file.

    Raises:
        UserError: a file cannot be read, or has no such tensor, or one of another shape.
    """
    files: dict[str, list[tuple[str, TensorSlice]]] = {}
    try:
        for name, tensor in tensors.items():
            if index[name].shape != tensor.shape:
                raise ValueError(f"{name} is {list(index[name].shape)} there and {list(tensor.shape)} here")
            for piece in index[name].slices:
                files.setdefault(piece.file, []).append((name, piece))
        for file, pieces in files.items():
            with safe_open(folder / file, framework="pt") as shard:
                for name, (_, offset, shape) in pieces:
                    where = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
                    saved, target = shard.get_tensor(slice_name(name, offset)), tensors[name][where]
                    if saved.shape != target.shape:
                        raise ValueError(f"{file} has {list(saved.shape)} of {name}, not {list(target.shape)}")
                    target.copy_(saved)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error
