"""Rows of parquet files: only the columns that are asked for, each converted by itself.

for row in read_rows(Path("web.parquet"), "text", more=()):
    row.values["text"], row.number          # or a BadDocument where the file is damaged

A value that Python cannot hold (a date beyond the year 9999, an unknown time zone) is missing from its row and named in
`row.lost`; the row stays. A damaged row group costs its own rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

from tnllm.data.compressed import open_stored
from tnllm.data.documents import BadDocument, UnreadableFile
from tnllm.errors import optional_import

_BATCH_ROWS, _BATCH_BYTES = 1024, 64 << 20


@dataclass(frozen=True)
class Row:
    """One row, counted from 1; `share` of the file's rows have been read with it.

    `values` are what JSON can hold; `lost` names the columns of the other values, and why.
    """

    number: int
    share: float
    values: dict[str, Any]
    lost: dict[str, str] = field(default_factory=dict)


def read_rows(path: Path, needed: str | None = None, more: Sequence[str] | None = None) -> Iterator[Row | BadDocument]:
    """Every row with the column `needed` and those of `more` that exist (None: all columns).

    Dates, times and durations (in seconds) become text and numbers, decimals text, NaN and infinities null. A file without
    the column `needed` gives one BadDocument. Raises UnreadableFile for a file that is not parquet.
    """
    pyarrow = _pyarrow()
    with open_stored(path) as raw:
        try:
            file = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)
            names = file.schema_arrow.names
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            what = "is encrypted, or damaged" if _is_encrypted(error) else "is not a complete parquet file"
            raise UnreadableFile(f"{path} {what}: {_cause(error)}") from None
        if needed is not None and names.count(needed) != 1:
            count = "no column" if needed not in names else "more than one column"
            yield BadDocument(
                str(path), f"{count} {needed!r} (columns: {', '.join(names[:8]) or 'none'}; choose one of them)"
            )
            return
        wanted = names if more is None else dict.fromkeys((needed, *more))
        columns = [name for name in wanted if name is not None and name in names]
        first = 1
        for group in range(file.num_row_groups):
            yield from _read_group(pyarrow, file, path, group, first, columns, needed)
            first += file.metadata.row_group(group).num_rows


def _pyarrow() -> ModuleType:
    with optional_import("data", "pyarrow"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow


def _cause(error: BaseException) -> str:
    # A failing disk sets errno, and that error is passed on.
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return (str(error) or type(error).__name__).splitlines()[0]


def _is_encrypted(error: BaseException) -> bool:
    return "crypt" in str(error).lower()


def _read_group(
    pyarrow: ModuleType, file: Any, path: Path, group: int, first: int, columns: Sequence[str], needed: str | None
) -> Iterator[Row | BadDocument]:
    """The rows of one row group, which begins with row `first`; where it is damaged, one BadDocument for the rest of it.

    Where damage is in other columns than `needed`, these columns are lost from there on, and the rows stay.
    """
    about = file.metadata.row_group(group)
    start, end = first, first + about.num_rows
    size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)))

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        return file.iter_batches(size, row_groups=[group], columns=columns)

    def is_readable(column: str) -> bool:
        try:
            return sum(batch.num_rows for batch in batches([column])) == about.num_rows
        except unreadable:
            return False

    unreadable = (pyarrow.ArrowException, OSError, ValueError)
    reader, reading = batches(columns), list(columns)
    while first < end:
        try:
            batch = next(reader, None)
            if batch is None:
                raise ValueError("it holds fewer rows than it says")
        except unreadable as error:
            cause = _cause(error)
            readable = list(filter(is_readable, reading))
            if needed in readable and readable != reading:
                reader, reading = islice(batches(readable), (first - start) // size, None), readable
                continue
            is_damage = not (isinstance(error, NotImplementedError) or _is_encrypted(error))
            why = "the file is damaged" if is_damage else "encrypted, or not supported"
            yield BadDocument(f"{path}:{first}", f"{why}; rows {first} to {end - 1} are lost: {cause}", True)
            return
        lost = {column: "in a damaged part of the file" for column in columns if column not in reading}
        yield from _rows(pyarrow, batch, first, file.metadata.num_rows, columns, lost)
        first += batch.num_rows


def _rows(
    pyarrow: ModuleType, batch: Any, first: int, total: int, columns: Sequence[str], lost: dict[str, str]
) -> Iterator[Row]:
    rows = [Row(first + index, (first + index) / total, {}, dict(lost)) for index in range(batch.num_rows)]
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name not in columns:
            continue
        held = _python_values(pyarrow, column)
        for index, row in enumerate(rows):
            value, why = held[index]
            if name in row.values or name in row.lost:
                why = "a second column of this name"
            if why:
                row.lost[name] = why
            else:
                row.values[name] = value
    yield from rows


def _python_values(pyarrow: ModuleType, column: Any) -> list[tuple[Any, str]]:
    """Each value as JSON can hold it and "", or None and why it cannot be held."""
    types = pyarrow.types
    is_plain = any(test(column.type) for test in (types.is_boolean, types.is_integer, types.is_null))
    # What pyarrow raises for values that Python has no form for, such as the KeyError of an unknown time zone.
    not_held = (ArithmeticError, ValueError, TypeError, LookupError, ImportError, pyarrow.ArrowException)
    try:
        values = column.to_pylist()
        if is_plain or (types.is_string(column.type) or types.is_large_string(column.type)):
            return [(value, "") for value in values]
        return [(_plain(value), "") for value in values]
    except not_held:
        pass
    held: list[tuple[Any, str]] = []
    for scalar in column:
        try:
            held.append((_plain(scalar.as_py()), ""))
        except UnicodeDecodeError:
            held.append((None, f"a {column.type} that is not UTF-8"))
        except not_held:
            held.append((None, f"a {column.type} that JSON or Python cannot hold"))
    return held


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it. Raises TypeError or ValueError if it cannot."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    raise TypeError(f"a {type(value).__name__}")
