"""Reading rows of csv, tsv and jsonl files, with errors that name file, line and remedy; texts without labels may also
stand in a txt file, one a line."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios_edge.errors import DataError
from aios_edge.golden import RawInput

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MAX_FIELD_CHARS = 10_000_000
_LINES_NAMED = 10


@dataclass(frozen=True)
class Row:
    """One sample; its label is empty where none was asked for."""

    text: RawInput
    label: str


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. ``input`` has one name, or two for pairs; ``label`` None: the rows have none."""

    input: tuple[str, ...]
    label: str | None
    drop_empty: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of one file, and how many empty ones were dropped."""

    rows: tuple[Row, ...]
    dropped: int = 0


def read_rows(path: Path, columns: Columns) -> Table:
    """All rows of a file; raises :class:`DataError` for a missing column, bad encoding, or empty rows.

    Empty rows are an error unless ``drop_empty``: silently fewer rows are silently another data set.
    """
    text = _decode(path)
    if path.suffix.lower() in _DELIMITERS:
        records = _delimited(text, path, columns)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        records = _json_lines(text, path, columns)
    elif path.suffix.lower() == ".txt" and columns.label is None and len(columns.input) == 1:
        records = ((line, (row.strip(),), "") for line, row in enumerate(text.split("\n"), start=1) if row.strip())
    else:
        remedy = "Use .csv, .tsv or .jsonl"
        raise DataError(f"has an unknown format '{path.suffix}'", where=str(path), remedy=remedy)
    rows: list[Row] = []
    empty: list[int] = []
    for line, parts, label in records:
        if (not label and columns.label is not None) or not all(parts):
            empty.append(line)
            continue
        rows.append(Row(text=parts[0] if len(parts) == 1 else (parts[0], parts[1]), label=label))
    if empty and not columns.drop_empty:
        lines = ", ".join(map(str, empty[:_LINES_NAMED])) + (" …" if len(empty) > _LINES_NAMED else "")
        raise DataError(
            f"{len(empty)} row(s) have an empty input{' or label' if columns.label else ''} (lines {lines})",
            where=str(path),
            remedy="Fill or remove them, or set drop_empty = true in [data]",
        )
    if not rows:
        raise DataError("has no rows", where=str(path), remedy="Give a file with rows")
    return Table(rows=tuple(rows), dropped=len(empty))


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        remedy = "Paths in a recipe are relative to the recipe"
        raise DataError(f"can't be read ({error.strerror})", where=str(path), remedy=remedy) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"is not UTF-8 at byte {error.start} (line {line})",
            where=str(path),
            remedy="Save it as UTF-8, e.g. iconv -f latin1 -t utf-8",
        ) from error


def _delimited(text: str, path: Path, columns: Columns) -> Iterator[tuple[int, tuple[str, ...], str]]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[path.suffix.lower()], strict=True)
    try:
        _check_columns(list(reader.fieldnames or ()), path, columns)
        for record in reader:
            if None in record:  # the fields beyond the header's
                what = f"line {reader.line_num} has more fields than the header"
                raise DataError(what, where=str(path), remedy="Put quotes around texts that hold the delimiter")
            parts = tuple((record[name] or "").strip() for name in columns.input)
            yield reader.line_num, parts, (record[columns.label] or "").strip() if columns.label else ""
    except csv.Error as error:
        remedy = "Check its quotes and delimiter"
        raise DataError(f"line {reader.line_num}: {error}", where=str(path), remedy=remedy) from error


def _json_lines(text: str, path: Path, columns: Columns) -> Iterator[tuple[int, tuple[str, ...], str]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except ValueError as error:
            raise DataError(f"line {line} is not JSON ({error})", where=str(path)) from error
        if not isinstance(record, dict):
            raise DataError(f"line {line} is not a JSON object", where=str(path))
        _check_columns(list(record), path, columns, line=line)
        yield line, tuple(_text(record[name]) for name in columns.input), _label(record, columns)


def _label(record: dict[str, Any], columns: Columns) -> str:
    return _text(record[columns.label]) if columns.label is not None else ""


def _text(value: Any) -> str:
    if value is None:
        return ""
    return (value if isinstance(value, str) else json.dumps(value)).strip()


def _check_columns(found: list[str], path: Path, columns: Columns, *, line: int | None = None) -> None:
    for name in filter(None, (*columns.input, columns.label)):
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'? " if near else ""
            where = f"{path}, line {line}" if line else str(path)
            raise DataError(
                f"has no column '{name}'; {hint}its columns are: {', '.join(found) or 'none'}",
                where=where,
                remedy="Name the columns with input and label in [data]",
            )
