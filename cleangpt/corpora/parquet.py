"""Parquet files, row by row."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cleangpt.corpora.compression import check_uncompressed
from cleangpt.errors import UserError, nearest, require


def parquet_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[dict[str, Any], str, int]]:
    """The columns of each row of a Parquet file, its location for messages, and the bytes read so far (estimated).

    Those that are `optional` are read if the file has them. Objects in lists, such as messages and tools, come without
    the fields that are null: a column gives each of its objects the fields of all of them.

    Raises:
        UserError: a column is missing, or the file is compressed or damaged.
    """
    check_uncompressed(path)
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    row, size = 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            rows = file.metadata.num_rows
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise UserError(f"{path} has no column {column!r}{nearest(column, file.schema_arrow.names)}")
            wanted = [*columns, *(column for column in optional if column in file.schema_arrow.names)]
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for cells in batch.to_pylist():
                    row += 1
                    entry = {name: _without_nulls(cell) for name, cell in cells.items()}
                    yield entry, f"{path}, row {row:,}", size * row // rows
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {row:,}: not valid UTF-8: {error.reason}") from None
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system; a damaged page is an OSError, too
            raise UserError(f"{path}: {os.strerror(error.errno)}") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not an intact Parquet file: {reason}") from None
    if row != rows:
        raise UserError(f"{path} is not an intact Parquet file: {row:,} of its {rows:,} rows can be read")


def _without_nulls(value: Any) -> Any:
    """A value, whose objects have no field that is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value
