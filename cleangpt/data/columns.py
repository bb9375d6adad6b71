"""Extra columns of a dataset: one number per token, next to the tokens and their loss mask."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from cleangpt.data.mapped import little_endian
from cleangpt.errors import UserError

RESERVED = ("tokens", "targets", "mask", "cache", "logit_positions")
"""Names that an extra column cannot have, since every dataset or every model's `forward` has them."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """An extra column of a dataset: one number per token, stored, shuffled and mixed like the tokens."""

    dtype: Literal["uint8", "uint16", "int64", "float32"]
    """On disk; integers become int64 in batches."""
    role: Literal["input", "extra"]
    """input: `batch.inputs[name]`, a keyword of the model's `forward`, aligned with the tokens; extra:
    `batch.extras[name]`, for the objective, aligned with the targets."""

    def __post_init__(self) -> None:
        if self.dtype not in ("uint8", "uint16", "int64", "float32"):
            raise UserError(f"a column's dtype is {self.dtype!r}; allowed: uint8, uint16, int64, float32")
        if self.role not in ("input", "extra"):
            raise UserError(f"a column's role is {self.role!r}; allowed: input, extra")

    @property
    def on_disk(self) -> np.dtype[Any]:
        """The dtype on disk, little-endian on every machine."""
        return little_endian(self.dtype)

    @property
    def in_batch(self) -> np.dtype[Any]:
        """The dtype in a batch."""
        return np.dtype("float32" if self.dtype == "float32" else "int64")


def check_column_names(columns: Mapping[str, Column]) -> None:
    """Refuses names that are not identifiers, or are reserved.

    Raises:
        UserError: names the first such column.
    """
    for name in columns:
        if not name.isidentifier() or name in RESERVED:
            raise UserError(f"a column is named {name!r}; allowed: an identifier other than {', '.join(RESERVED)}")


def describe_columns(columns: Mapping[str, Column]) -> dict[str, Any]:
    """The description of columns for dataset.json."""
    return {name: asdict(column) for name, column in columns.items()}
