"""Records of a dataset, such as images: arrays of one shape, each of which stands at one or more neighbouring tokens.

    train.NAME.bin         the records, one after another, little-endian
    train.NAME_ends.bin    where each ends: the tokens of the split up to and including its last one, int64, ascending

The ends are sorted, so the records of a row are one contiguous slice, found by binary search. In a batch, `NAME` is
`(rows, most, *shape)` and `NAME_ends` is `(rows, most)`, where `most` is the most records in a row of the batch: 0
where no row has any. An end counts the tokens of the row up to the record's last one; 0: there is no record, only
padding. A record that the row cuts off has its end before or behind the row's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cleangpt.data.columns import RESERVED
from cleangpt.data.mapped import little_endian, map_file, read_count
from cleangpt.errors import UserError

ENDS = "_ends"
"""Follows the name of records in the name of the input that says where they end."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """A kind of record: `batch.inputs[name]` and `batch.inputs[name + "_ends"]`, keywords of the model's `forward`."""

    dtype: Literal["uint8", "uint16", "float32"]
    """On disk; uint16 becomes int64 in batches."""
    shape: tuple[int, ...]
    """Of one record, such as (height, width, channels)."""
    tokens: int = 1
    """Number of neighbouring tokens that one record stands at; their ids say nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.dtype not in ("uint8", "uint16", "float32"):
            raise UserError(f"the dtype of records is {self.dtype!r}; allowed: uint8, uint16, float32")
        for size in (*self.shape, self.tokens):
            if type(size) is not int or not 1 <= size <= 2**24:
                raise UserError(
                    f"records of shape {self.shape} at {self.tokens!r} tokens; allowed: whole numbers from 1"
                )

    @property
    def on_disk(self) -> np.dtype[Any]:
        """The dtype on disk, little-endian on every machine."""
        return little_endian(self.dtype)

    @property
    def in_batch(self) -> np.dtype[Any]:
        """The dtype in a batch."""
        return np.dtype("int64" if self.dtype == "uint16" else self.dtype)


@dataclass(frozen=True)
class PlacedRecords:
    """Records among some tokens."""

    values: NDArray[Any]
    """`(records, *shape)`."""
    ends: NDArray[np.int64]
    """The number of tokens up to and including the last one of each `(records,)`, ascending."""

    def moved(self, tokens: int) -> "PlacedRecords":
        """The same records behind as many more tokens."""
        return PlacedRecords(self.values, self.ends + tokens)

    def inputs(self, name: str) -> dict[str, Tensor]:
        """The inputs of a single row, without the dimension of rows."""
        return {name: torch.from_numpy(self.values), f"{name}{ENDS}": torch.from_numpy(self.ends)}

    @staticmethod
    def cat(parts: Sequence["PlacedRecords"]) -> "PlacedRecords":
        """The records of several parts of the same tokens, in order."""
        return PlacedRecords(
            *(np.concatenate(arrays) for arrays in zip(*((p.values, p.ends) for p in parts), strict=True))
        )


class RecordFile:
    """The records of a split, memory-mapped."""

    def __init__(self, kind: Records, values: NDArray[Any], ends: NDArray[np.int64]) -> None:
        self.kind, self._values, self._ends = kind, values.reshape(-1, *kind.shape), ends

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, start: int, length: int) -> PlacedRecords:
        """The records at any of `length` tokens of the split from `start` on, with ends counted from `start`."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, start + length + self.kind.tokens - 1, side="right"))
        values = self._values[first:last].astype(self.kind.in_batch)
        return PlacedRecords(values, self._ends[first:last] - start)


def record_inputs(files: Mapping[str, RecordFile], starts: Sequence[int], length: int) -> dict[str, Tensor]:
    """The inputs of rows of `length` tokens that begin at `starts`: records and their ends, by name."""
    return stack_rows([records_of_row(files, start, length) for start in starts]) if files else {}


def records_of_row(files: Mapping[str, RecordFile], start: int, length: int) -> dict[str, Tensor]:
    """The records of one row and their ends, by name, without the dimension of rows."""
    inputs: dict[str, Tensor] = {}
    for name, file in files.items():
        inputs |= file.read(start, length).inputs(name)
    return inputs


def stack_rows(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The records and ends of single rows as those of a batch, padded with zeros; a row may lack a name."""
    stacked: dict[str, Tensor] = {}
    for name, example in {name: tensor for row in rows for name, tensor in row.items()}.items():
        most = max(len(row[name]) for row in rows if name in row)
        stacked[name] = padded = example.new_zeros(len(rows), most, *example.shape[1:])
        for place, row in enumerate(rows):
            if name in row:
                padded[place, : len(row[name])] = row[name]
    return stacked


def cat_rows(tensors: Sequence[Tensor]) -> Tensor:
    """The rows of several tensors; those with fewer records in a row are padded with zeros."""
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        most = max(tensor.shape[1] for tensor in tensors)
        blanks = [tensor.new_zeros(len(tensor), most - tensor.shape[1], *tensor.shape[2:]) for tensor in tensors]
        tensors = [torch.cat(pair, dim=1) for pair in zip(tensors, blanks, strict=True)]
    return torch.cat(list(tensors))


def shift_ends(inputs: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The inputs of a row that has lost its first `tokens` tokens."""
    return {name: tensor - tokens if name.endswith(ENDS) else tensor for name, tensor in inputs.items()}


# Descriptions and files -----------------------------------------------------------------------------------------------
def check_record_names(records: Mapping[str, Records], columns: Mapping[str, Any]) -> None:
    """Refuses names that are not identifiers, are reserved, or are those of columns.

    Raises:
        UserError: names the first such kind of record.
    """
    for name in records:
        if not name.isidentifier() or name.endswith(ENDS) or {name, name + ENDS} & {*RESERVED, *columns}:
            raise UserError(
                f"records are named {name!r}; allowed: an identifier other than those of columns, and "
                f"{', '.join(RESERVED)}"
            )


def describe_records(records: Mapping[str, Records]) -> dict[str, Any]:
    """The description of records for dataset.json; nothing where there are none."""
    return {"records": {name: asdict(kind) for name, kind in records.items()}} if records else {}


def records_of(description: Mapping[str, Any]) -> dict[str, Records]:
    """The kinds of records that dataset.json describes."""
    records = {name: Records(**entry) for name, entry in description.get("records", {}).items()}
    check_record_names(records, description["columns"])
    return records


def record_files(split: str, name: str) -> tuple[str, str]:
    """The names of the files of records and of their ends."""
    return f"{split}.{name}.bin", f"{split}.{name}{ENDS}.bin"


def open_records(folder: Path, description: Mapping[str, Any], split: str) -> dict[str, RecordFile]:
    """The records of a split."""
    found = {}
    for name, kind in records_of(description).items():
        count = read_count(description["splits"][split]["records"], name)
        files = [folder / file for file in record_files(split, name)]
        values = map_file(files[0], kind.on_disk, count * math.prod(kind.shape), split == "train")
        found[name] = RecordFile(kind, values, map_file(files[1], np.dtype("<i8"), count, split == "train"))
    return found


def no_records(kind: Records) -> RecordFile:
    """The records of a split that has none."""
    return RecordFile(kind, np.zeros(0, kind.on_disk), np.zeros(0, np.int64))


def check_placed(name: str, kind: Records, placed: PlacedRecords, tokens: int) -> None:
    """Checks records that are to stand among `tokens` tokens.

    Raises:
        UserError: their shape, dtype or places are wrong.
    """
    if placed.values.shape != (len(placed.ends), *kind.shape) or placed.values.dtype != np.dtype(kind.dtype):
        raise UserError(
            f"the records {name} are {placed.values.dtype} {placed.values.shape}; allowed: {kind.dtype} "
            f"{(len(placed.ends), *kind.shape)}"
        )
    ends = [0, *placed.ends.tolist()]
    if any(after - before < kind.tokens for before, after in pairwise(ends)) or ends[-1] > tokens:
        raise UserError(
            f"the records {name} end after {ends[1:]} tokens of {tokens}; allowed: in order, each at {kind.tokens}"
        )


def common_records(sources: Mapping[str, Mapping[str, Records]]) -> dict[str, Records]:
    """All kinds of records of the sources of a mixture; a source may lack any.

    Raises:
        UserError: two sources have different records of the same name.
    """
    found: dict[str, tuple[str, Records]] = {}
    for source, records in sources.items():
        for name, kind in records.items():
            first, known = found.setdefault(name, (source, kind))
            if known != kind:
                raise UserError(
                    f"the sources {first} and {source} have different records {name}, {_words(known)} and "
                    f"{_words(kind)}; allowed: the same for all"
                )
    return {name: kind for name, (_, kind) in found.items()}


def _words(kind: Records) -> str:
    return f"{kind.dtype} {kind.shape} at {kind.tokens} tokens"
