"""Embedding tables by use: rows that training looked up in 8 bits, all other rows in 4 or 2.

Most of a vocabulary never occurs in the data of one task, yet a device may meet any word. A table is split in two: the
rows in use keep 8 bits with a scale per channel; the others get 4 bits with a scale per row and channel, two entries a
byte, or 2 bits (:mod:`exporters.product_codes`). Each id has a place in both halves, and row 0 of each is nothing, so
the two lookups are added.

All in standard operators of opset 17. In 4 bits a byte ``16 a + b`` holds an entry of the left half of the channels and
one of the right half: shifted left by 4 bits it is ``16 b``; as it is, it is ``16 a`` with a known rest, which ``a`` is
chosen to make up for. So nothing is masked, and one scale serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters import product_codes

#: At most this share of the rows keeps 8 bits, those that occur most often: a large table shrinks whatever the data.
MOST_FINE = 0.25
#: But so many always may: a vocabulary that was cut holds little else than words in use, and by a quarter of what is
#: left words would lose the 8 bits that they had before. A quarter of BERT's 30,522 is less than this.
ALWAYS_FINE = 8192
#: Scales that are tried for each row of 4 bits, as shares of the one that clips nothing.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_MIDDLE = 7.5  # of 16 levels
_ROWS_AT_ONCE = 8192  # bounds the memory beside a table, which may be gigabytes

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Nibbles:
    """Rows in 4 bits. ``packed`` [R, W/2] u8, ``rows`` [R, 1] and ``channels`` [W] scales, ``middle`` [W]."""

    packed: NDArray[np.uint8]
    rows: Array
    channels: Array
    middle: Array

    def floats(self) -> Array:
        """[R, W]: what the operators of :func:`lookup` make of it."""
        steps = np.concatenate([self.packed, self.packed << 4], axis=1).astype(np.float32)
        found: Array = (steps - self.middle) * self.rows * self.channels
        return found


def fine_rows(counts: NDArray[np.intp], rows: int) -> NDArray[np.intp]:
    """The ids below ``rows`` that keep 8 bits, in order: those that occur, at most :func:`most_fine` of them. Pure."""
    counts = np.pad(counts[:rows], (0, max(0, rows - len(counts))))
    ordered = np.argsort(-counts, kind="stable")[: most_fine(rows)]
    return np.sort(ordered[counts[ordered] > 0])


def most_fine(rows: int) -> int:
    """How many rows of a table of so many keep 8 bits at most."""
    return max(ALWAYS_FINE, int(rows * MOST_FINE))


def in_s8(table: Array) -> tuple[NDArray[np.int8], Array]:
    """Rows [R, W] in 8 bits and the scale of each channel [W]. Pure."""
    reach = np.maximum(table.max(axis=0, initial=0), -table.min(axis=0, initial=0))
    scale = reach.astype(np.float32) / np.float32(127)
    scale[scale == 0] = 1
    entries = np.empty(table.shape, dtype=np.int8)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        entries[part] = np.rint(table[part] / scale)
    return entries, scale


def in_nibbles(table: Array) -> Nibbles:
    """Rows [R, W] in 4 bits, W even. Each row's scale is that of :data:`CLIPS` with the least squared error. Pure."""
    channels = product_codes.channel_sizes(table)  # 0 where a channel is, and so it stays
    middle = np.full(table.shape[1], 16 * _MIDDLE, dtype=np.float32)
    middle[: len(middle) // 2] += _MIDDLE  # the rest below the left half's entries, on average
    parts = list(_chunks(table, channels, middle))
    packed, rows = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Nibbles(packed=packed, rows=rows, channels=channels, middle=middle)


def _chunks(table: Array, channels: Array, middle: Array) -> Iterator[tuple[NDArray[np.uint8], Array]]:
    alive: Array = np.where(channels == 0, np.float32(1), channels)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        part = table[start : start + _ROWS_AT_ONCE] / alive
        reach = np.abs(part).max(axis=1, keepdims=True) / (16 * _MIDDLE)
        reach[reach == 0] = 1
        least = np.full((len(part), 1), np.inf, dtype=np.float32)
        packed = np.zeros((len(part), part.shape[1] // 2), dtype=np.uint8)
        rows = np.zeros_like(reach)
        for clip in CLIPS:
            found = _packed(part, reach * clip, middle)
            steps = np.concatenate([found, found << 4], axis=1).astype(np.float32) - middle
            # The scale that fits the steps best takes away what rounding has in common.
            scale = (steps * part).sum(axis=1, keepdims=True) / np.square(steps).sum(axis=1, keepdims=True)
            error = np.square((steps * scale - part) * channels).sum(axis=1, keepdims=True)
            better = error < least
            least, rows = np.where(better, error, least), np.where(better, scale, rows)
            packed = np.where(better, found, packed)
        yield packed, rows


def _packed(part: Array, scale: Array, middle: Array) -> NDArray[np.uint8]:
    """``part`` [R, W] in sixteenths of a step, ``scale`` [R, 1] each."""
    steps = part / scale + middle
    left, right = np.split(steps, 2, axis=1)
    low = np.clip(np.rint(right / 16), 0, 15)
    high = np.clip(np.rint((left - low) / 16), 0, 15)
    packed: NDArray[np.uint8] = (16 * high + low).astype(np.uint8)
    return packed


def size_bytes(rows: int, fine: int, width: int, bits: int) -> int:
    """What :func:`lookup` stores of a table of which so many rows keep 8 bits: entries, scales, maps, books. Pure."""
    halves = (fine, rows - fine)
    maps = rows * sum(_place_type(count).itemsize for count in halves)
    books = width * product_codes.ENTRIES if bits == 2 else 0
    scales = 4 * (rows - fine) + 3 * 4 * width  # of rows; of channels, each half's and the middle
    return fine * width + (rows - fine) * width * bits // 8 + maps + books + scales + 2 * width


def can_split(width: int, bits: int) -> bool:
    """Whether rows this wide can be had in so few bits."""
    return width % (product_codes.TOGETHER if bits == 2 else 2) == 0


def lookup(
    name: str, ids: str, output: str, table: Array, fine: NDArray[np.intp], bits: int
) -> tuple[list[Any], list[Any]]:
    """Nodes and initializers that look ``ids`` up in ``table`` [V, W] and leave ``output`` [..., W].

    ``fine``: the rows in 8 bits; the others get ``bits``, 4 or 2, and there must be some. ``name`` is the table's,
    whose constants are named after it. W must be such that :func:`can_split`.
    """
    from onnx import TensorProto, numpy_helper

    rest = np.setdiff1d(np.arange(len(table)), fine)
    entries, scale = in_s8(table[fine])
    constants, steps = _in_two_bits(table[rest]) if bits == 2 else _in_four_bits(table[rest])
    constants |= {
        "fine": _behind_nothing(entries),
        "fine/scale": scale,
        "fine/rows": _places(fine, len(table)),
        "coarse/rows": _places(rest, len(table)),
    }
    node = _Nodes(name, ids, output, frozenset(constants))
    nodes = [
        *node.row("coarse"),
        *(node(operator, inputs, made, **attributes) for operator, inputs, made, attributes in steps),
        node("Gather", ("coarse/row_scales", "coarse/row"), "coarse/row_scale"),
        node("Mul", ("coarse/steps", "coarse/row_scale"), "coarse/scaled"),
        node("Mul", ("coarse/scaled", "coarse/scale"), "coarse/found"),
        *node.row("fine"),
        node("Cast", ("fine/raw",), "fine/steps", to=TensorProto.FLOAT),
        node("Mul", ("fine/steps", "fine/scale"), "fine/found"),
        node("Add", ("coarse/found", "fine/found"), ""),
    ]
    initializers = [numpy_helper.from_array(array, f"{name}/{entry}") for entry, array in constants.items()]
    return nodes, initializers


@dataclass(frozen=True)
class _Nodes:
    """Makes nodes; a constant belongs to the table ``name``, everything else to the lookup that leaves ``output``."""

    name: str
    ids: str
    output: str
    constants: frozenset[str]

    def __call__(self, operator: str, inputs: tuple[str, ...], made: str, **attributes: Any) -> Any:
        from onnx import helper

        names = [f"{self.name}/{entry}" if entry in self.constants else f"{self.output}/{entry}" for entry in inputs]
        names = [self.ids if entry == "ids" else full for entry, full in zip(inputs, names, strict=True)]
        full = f"{self.output}/{made}" if made else self.output
        return helper.make_node(operator, names, [full], name=full, **attributes)

    def row(self, half: str) -> list[Any]:
        """Each id's row of a half."""
        from onnx import TensorProto

        return [
            self("Gather", (f"{half}/rows", "ids"), f"{half}/place"),
            self("Cast", (f"{half}/place",), f"{half}/row", to=TensorProto.INT32),
            self("Gather", (half, f"{half}/row"), f"{half}/raw"),
        ]


#: Operator, inputs, what it makes, attributes.
_Step = tuple[str, tuple[str, ...], str, dict[str, Any]]


def _in_four_bits(table: Array) -> tuple[dict[str, NDArray[Any]], list[_Step]]:
    """The coarse half's constants, and the way from its raw bytes to steps."""
    from onnx import TensorProto

    found = in_nibbles(table)
    constants = {
        "coarse": _behind_nothing(found.packed),
        "coarse/scale": found.channels,
        "coarse/row_scales": _behind_nothing(found.rows),
        "coarse/middle": found.middle,
        "bits": np.asarray(4, dtype=np.uint8),
    }
    steps: list[_Step] = [
        ("BitShift", ("coarse/raw", "bits"), "coarse/right", {"direction": "LEFT"}),
        ("Concat", ("coarse/raw", "coarse/right"), "coarse/both", {"axis": -1}),
        ("Cast", ("coarse/both",), "coarse/float", {"to": TensorProto.FLOAT}),
        ("Sub", ("coarse/float", "coarse/middle"), "coarse/steps", {}),
    ]
    return constants, steps


def _in_two_bits(table: Array) -> tuple[dict[str, NDArray[Any]], list[_Step]]:
    """The same with books."""
    from onnx import TensorProto

    found = product_codes.in_codes(table)
    constants = {
        "coarse": _behind_nothing(found.numbers),
        "coarse/scale": found.channels,
        "coarse/row_scales": _behind_nothing(found.rows),
        "coarse/starts": found.starts,
        "coarse/books": found.books,
        "coarse/width": np.asarray([table.shape[1]], dtype=np.int64),
    }
    steps: list[_Step] = [
        ("Cast", ("coarse/raw",), "coarse/number", {"to": TensorProto.INT32}),
        ("Add", ("coarse/number", "coarse/starts"), "coarse/entry", {}),
        ("Gather", ("coarse/books", "coarse/entry"), "coarse/entries", {}),
        ("Shape", ("ids",), "coarse/places", {}),
        ("Concat", ("coarse/places", "coarse/width"), "coarse/shape", {"axis": 0}),
        ("Reshape", ("coarse/entries", "coarse/shape"), "coarse/joined", {}),
        ("Cast", ("coarse/joined",), "coarse/steps", {"to": TensorProto.FLOAT}),
    ]
    return constants, steps


def _behind_nothing(rows: NDArray[Any]) -> NDArray[Any]:
    """A row of zeros, then ``rows``: what an id that isn't here finds. (In fewer bits its row scale is 0.)"""
    return np.concatenate([np.zeros_like(rows, shape=(1, *rows.shape[1:])), rows])


def _places(ids: NDArray[np.intp], count: int) -> NDArray[Any]:
    """[count]: where each id stands behind row 0; 0 where it doesn't."""
    places = np.zeros(count, dtype=_place_type(len(ids)))
    places[ids] = np.arange(1, len(ids) + 1)
    return places


def _place_type(rows: int) -> np.dtype[Any]:
    return np.dtype(np.int16 if rows <= np.iinfo(np.int16).max else np.int32)
