"""
A look at a data set before a model is loaded. It costs the same for a thousand rows and for a million: the first rows,
what the format says about missing values, and at most one row of a stream, because a stream may not be readable twice.
What is wrong further on is found when the row is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from ..errors import require, shown


ROWS_LOOKED_AT = 16
# Rows that are read at once to find the one with a missing value
ROWS_AT_ONCE = 10_000


@dataclass
class Sample:
    """
    What is known of a data set.

    Args:
        columns (`list[str]`, *optional*):
            Its columns; `None` if they are not known without reading a stream.
        rows (`list[dict]`):
            Some of its rows, of which only the columns that were asked for are sure to be there. Empty if it is empty,
            has none of these columns, or is a stream that was not read.
    """

    columns: list[str] | None
    rows: list[dict[str, Any]]


def sample_of(name: str, dataset: Any, wanted: Sequence[str], read_streams: bool = False) -> Sample:
    """
    Look at a data set.

    Args:
        name (`str`):
            Its name as an argument.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data set.
        wanted (`Sequence[str]`):
            Columns to read. Images in other columns aren't decoded.
        read_streams (`bool`, *optional*, defaults to `False`):
            Whether the first row of a stream is read if its columns are declared. If they aren't, it is always read.

    Raises:
        ValueError: if a row isn't a dict, or one of the columns has a missing value.
    """
    declared = dataset.column_names
    if isinstance(dataset, IterableDataset):
        if declared is not None and not read_streams:
            return Sample(list(declared), [])
        rows = [row for row in [next(iter(dataset), None)] if row is not None]
        return Sample(list(declared or (rows[0] if rows else [])) or None, rows)
    made = dataset.format["type"] == "custom"  # by a function, which may need and make any columns
    if not made:
        known = [column for column in wanted if column in declared]
        for column in known:
            _require_values(name, dataset, column)
        if not known:
            return Sample(list(declared), [])
        dataset = dataset.select_columns(known)
    rows = [dataset[i] for i in range(min(len(dataset), ROWS_LOOKED_AT))]
    for row in rows[:1]:
        require(
            isinstance(row, Mapping),
            f"{name} has the format {dataset.format['type']!r}, whose rows are no dicts but each {shown(row)}. Call "
            f"{name}.with_format(None).",
        )
    return Sample(list(rows[0]) if made and rows else list(declared), rows)


def _require_values(name: str, dataset: Dataset, column: str) -> None:
    """Whether no row has `None` in a column. Arrow counts them without reading the values."""
    if not dataset.data.column(column).null_count:
        return
    values = dataset.select_columns([column]).with_format("arrow")
    for start in range(0, len(values), ROWS_AT_ONCE):
        missing = values[start : start + ROWS_AT_ONCE].column(column).is_null().to_pylist()
        if True in missing:  # otherwise they are in rows that were selected away
            raise ValueError(
                f"{name}: `{column}` of row {start + missing.index(True)} is None. Fill it in, or drop such rows with "
                f"{name}.filter(lambda row: row[{column!r}] is not None)."
            )
