"""Table rows in 2 bits a channel: product quantization (Jégou, Douze and Schmid, "Product Quantization for Nearest
Neighbor Search", 2011).

Four neighbouring channels are one byte: the number of one of 256 entries of a book that these channels have for
themselves, found by k-means. A row's length is a scale of its own. Of a normal variable this leaves 0.30 of the values'
size as error, where 4 levels for each channel alone leave 0.34 and 16 leave 0.11.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Channels that share a byte.
TOGETHER = 4
#: Entries of a book: what a byte can number.
ENTRIES = 256
_ROUNDS = 12
_SAMPLE = 8192  # rows that the books are made for: 32 an entry
_ROWS_AT_ONCE = 8192  # bounds the memory beside the table and its codes

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    """Rows in books' entries. ``numbers`` [R, W/4] u8, ``books`` [W/4 x 256, 4] s8, one behind the other; ``rows``
    [R, 1] and ``channels`` [W] scales."""

    numbers: NDArray[np.uint8]
    books: NDArray[np.int8]
    rows: Array
    channels: Array

    @property
    def starts(self) -> NDArray[np.int32]:
        """[W/4]: where each book begins."""
        return np.arange(self.numbers.shape[1], dtype=np.int32) * ENTRIES

    def floats(self) -> Array:
        """[R, W]: what the operators of :mod:`exporters.rare_rows` make of it."""
        entries = self.books[self.numbers + self.starts].reshape(len(self.numbers), -1)
        found: Array = entries.astype(np.float32) * self.rows * self.channels
        return found


def in_codes(table: Array) -> Codes:
    """Rows [R, W], W a multiple of :data:`TOGETHER`. The same for the same rows. Pure."""
    width = table.shape[1]
    channels = channel_sizes(table)
    channels[channels == 0] = 1  # a channel without values has none in its entries either
    picked = np.random.default_rng(0).permutation(len(table))[:_SAMPLE]
    sample = table[picked] / channels
    sample /= _length(sample)
    starts = range(0, width, TOGETHER)
    books = np.stack([_book(np.ascontiguousarray(sample[:, at : at + TOGETHER])) for at in starts])
    steps = np.abs(books).max(axis=1).reshape(width) / np.float32(127)
    steps[steps == 0] = 1
    entries = np.rint(books / steps.reshape(-1, 1, TOGETHER)).astype(np.int8)
    rounded = entries.astype(np.float32) * steps.reshape(-1, 1, TOGETHER)
    numbers = np.empty((len(table), width // TOGETHER), dtype=np.uint8)
    rows = np.empty((len(table), 1), dtype=np.float32)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        part = table[some] / channels
        lengths = _length(part)
        part /= lengths
        for book, at in enumerate(starts):
            numbers[some, book] = _nearest(part[:, at : at + TOGETHER], rounded[book])
        found = rounded[np.arange(len(books)), numbers[some]].reshape(part.shape)
        # The scale that fits the entries best takes away what they have in common with the row's error.
        size = np.square(found).sum(axis=1, keepdims=True)
        size[size == 0] = 1
        rows[some] = (found * part).sum(axis=1, keepdims=True) / size * lengths
        rows[some][(part == 0).all(axis=1)] = 0
    return Codes(numbers=numbers, books=entries.reshape(-1, TOGETHER), rows=rows, channels=steps * channels)


def channel_sizes(table: Array) -> Array:
    """[W]: root mean square of each channel of [R, W], without a second table of squares. Pure."""
    found: Array = np.sqrt(np.einsum("rc,rc->c", table, table) / np.float32(max(1, len(table))))
    return found


def _length(rows: Array) -> Array:
    """[R, 1]: root mean square; 1 for an empty row."""
    found: Array = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
    found[found == 0] = 1
    return found


def _book(points: Array) -> Array:
    """[256, channels]: k-means of [N, channels]. An entry that nobody is nearest to stays where it was."""
    entries = np.zeros((ENTRIES, points.shape[1]), dtype=np.float32)
    entries[: len(points)] = points[:ENTRIES]  # they are in random order
    for _ in range(_ROUNDS):
        nearest = _nearest(points, entries)
        count = np.bincount(nearest, minlength=ENTRIES)
        for channel in range(points.shape[1]):
            total = np.bincount(nearest, weights=points[:, channel], minlength=ENTRIES)
            entries[:, channel] = np.where(count, total / np.maximum(count, 1), entries[:, channel])
    return entries


def _nearest(points: Array, entries: Array) -> NDArray[np.intp]:
    """[N]: the number of the entry with the least squared distance."""
    found: NDArray[np.intp] = (np.square(entries).sum(axis=1) / 2 - points @ entries.T).argmin(axis=1)
    return found
