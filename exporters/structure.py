"""How far to prune: the sizes of a network, the ladder of smaller ones, and which rung to try next. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from aios_edge.errors import RecipeError
from exporters import rare_rows
from exporters.recipe import PruneSection

#: Shares of layers, of each layer's heads and of its neurons, mildest first. A quarter of the products is better spent
#: on a third of the heads than on a quarter.
LADDER = (
    (Fraction(1), Fraction(1, 2), Fraction(1, 2)),
    (Fraction(1), Fraction(1, 3), Fraction(1, 3)),
    (Fraction(1), Fraction(1, 3), Fraction(5, 24)),
    (Fraction(1), Fraction(1, 6), Fraction(1, 6)),
    (Fraction(2, 3), Fraction(1, 6), Fraction(1, 6)),
    (Fraction(1, 2), Fraction(1, 6), Fraction(1, 6)),
)
_FIRST = 1  # see :func:`beginning`
#: Neurons come in these: onnxruntime's int8 kernels work on 64 columns at a time.
_NEURONS = 64


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Bytes that a precision takes for a weight of a product, for an entry of a table, for what comes by channel (bias
    or norm, with scale and zero point where weights have them), and for a layer's nodes with their names."""

    weight: int
    entry: int
    channel: int
    nodes: int


_IN_8_BITS = _Stored(weight=1, entry=1, channel=9, nodes=8_000)
#: What a pruned network may be built as.
_STORED = {
    "fp32": _Stored(weight=4, entry=4, channel=4, nodes=8_000),
    "fp16": _Stored(weight=2, entry=2, channel=2, nodes=30_000),  # not fused
    "qdq-s8-sym": _Stored(weight=1, entry=4, channel=9, nodes=30_000),  # its tables stay in float
    "dynamic-s8": _IN_8_BITS,
    "qdq-u8s8": _IN_8_BITS,
}


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What a network has: the same heads and neurons (``ffn``) in every layer; ``vocabulary`` counts pieces."""

    layers: int
    heads: int
    ffn: int
    vocabulary: int

    @property
    def name(self) -> str:
        """As it stands before a candidate's precision: ``l6-h4-f512-v10000``."""
        return f"l{self.layers}-h{self.heads}-f{self.ffn}-v{self.vocabulary}"

    def candidate(self, plan: str) -> str:
        """What a candidate of such a network is called."""
        return f"{self.name}+{plan}"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A whole network: its structure and what pruning leaves alone (``hidden`` is the width between layers).
    ``in_use``: how many of its pieces the texts have, None where nobody counted. ``tokenizer``: bytes of its
    tokenizer.json, of which ``beside_pieces`` don't go with the pieces."""

    whole: Structure
    hidden: int
    positions: int
    labels: int
    in_use: int | None = None
    tokenizer: int = 0
    beside_pieces: int = 0

    def products(self, structure: Structure) -> int:
        """Weights that are multiplied with every token; with them, time goes."""
        return structure.layers * (4 * self.hidden * self._joined(structure) + 2 * self.hidden * structure.ffn)

    def size_bytes(self, structure: Structure, precision: str, rare_row_bits: int = 8) -> int:
        """An estimate of a candidate's model files, high rather than low."""
        stored, hidden = _STORED[precision], self.hidden
        weights = self.products(structure) + hidden**2 + hidden * self.labels  # pooler, head
        channels = structure.layers * (3 * self._joined(structure) + 6 * hidden + structure.ffn)
        channels += 6 * hidden + self.labels  # around the tables, of pooler and head
        tables = self.positions * (hidden * stored.entry + 8)  # 8: their numbers
        if rare_row_bits < 8 and rare_rows.can_split(hidden, rare_row_bits):
            rows, in_use = structure.vocabulary, self.whole.vocabulary if self.in_use is None else self.in_use
            fine = min(rows, in_use, rare_rows.most_fine(rows))
            tables += rare_rows.size_bytes(rows, fine, hidden, rare_row_bits)
        else:
            tables += structure.vocabulary * hidden * stored.entry
        nodes = (structure.layers + 2) * stored.nodes
        return weights * stored.weight + channels * stored.channel + tables + nodes

    def shipped_bytes(self, structure: Structure, precision: str, rare_row_bits: int = 8) -> int:
        """The same with its tokenizer, which shrinks with the pieces; those that stay are shorter than most."""
        pieces = (self.tokenizer - self.beside_pieces) * structure.vocabulary
        tokenizer = self.beside_pieces + math.ceil(pieces / self.whole.vocabulary)
        return self.size_bytes(structure, precision, rare_row_bits) + tokenizer

    def pieces_within(self, shipped_bytes: int, structure: Structure, precision: str, rare_row_bits: int = 8) -> int:
        """How large a vocabulary of a network of this structure fits so much, by the same estimate."""

        def estimate(pieces: int) -> int:
            return self.shipped_bytes(replace(structure, vocabulary=pieces), precision, rare_row_bits)

        return max(0, bisect_right(range(self.whole.vocabulary + 1), shipped_bytes, key=estimate) - 1)

    def _joined(self, structure: Structure) -> int:
        """The width that a layer's heads have together."""
        return self.hidden * structure.heads // self.whole.heads


def ladder(shape: Shape, vocabulary: int) -> tuple[Structure, ...]:
    """Smaller networks, mildest first, all with this vocabulary; each has less to multiply than the one before."""
    whole = shape.whole
    found: list[Structure] = []
    for depth, heads, ffn in LADDER:
        rung = Structure(
            layers=max(1, math.ceil(whole.layers * depth)),
            heads=max(1, round(whole.heads * heads)),
            ffn=min(whole.ffn, max(_NEURONS, round(whole.ffn * ffn / _NEURONS) * _NEURONS)),
            vocabulary=vocabulary,
        )
        if shape.products(rung) < shape.products((whole, *found)[-1]):
            found.append(rung)
    return tuple(found)


def asked_for(section: PruneSection, shape: Shape, vocabulary: int) -> Structure:
    """The structure that a recipe spells out; raises :class:`RecipeError` where the network hasn't as much to keep."""
    whole = shape.whole
    for key in ("layers", "heads", "ffn"):
        asked, there = getattr(section, key), getattr(whole, key)
        if asked is not None and asked > there:
            remedy = f"{key} is what each layer keeps" if key != "layers" else "layers is how many are kept"
            raise RecipeError(f"{key} = {asked}, but the model has {there}", where="[prune]", remedy=remedy)
    return Structure(
        layers=section.layers or whole.layers,
        heads=section.heads or whole.heads,
        ffn=section.ffn or whole.ffn,
        vocabulary=vocabulary,
    )


def beginning(rungs: Sequence[Structure]) -> int:
    """The place of the rung to begin with where the budget asks for no narrower one."""
    return min(_FIRST, len(rungs) - 1)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a rung. ``costly``: larger or slower than the budget allows, which a narrower one may mend;
    ``inaccurate``: what a wider one may."""

    costly: bool
    inaccurate: bool

    @property
    def kept(self) -> bool:
        """Whether it kept its promises."""
        return not self.costly and not self.inaccurate


def following(rungs: Sequence[Structure], tried: Mapping[Structure, Outcome], fits: Sequence[bool]) -> Structure | None:
    """The rung to train next, or None. The first is a third of the width, or the widest narrower one that ``fits`` the
    budget. After one that kept its promises or was only costly comes the next narrower, after one that was only
    inaccurate the next wider that fits. One that was both ends the search: narrower it loses more, wider it costs more.
    """
    if not rungs:
        return None
    end = len(rungs) - 1
    start = next((index for index, fit in enumerate(fits) if fit), end)
    if not tried:
        return rungs[max(start, beginning(rungs))]
    places = {rungs.index(rung): outcome for rung, outcome in tried.items()}
    narrower = [place + 1 for place, outcome in places.items() if outcome.costly or not outcome.inaccurate]
    wider = [place - 1 for place, outcome in places.items() if outcome.inaccurate]
    first, last = max([start, *narrower]), min([end, *wider])  # what is left between those tried
    if first > last:
        return None
    return rungs[first if narrower else last]
