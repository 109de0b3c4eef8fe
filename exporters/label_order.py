"""Whether labels are exchanged: a model's answers stand, steadily, for other labels than their own. Pure.

So it is where a model was fine-tuned elsewhere with its labels in another order, or where two files name classes
differently. Every candidate agrees with such a model, so nothing else notices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from aios_edge.errors import PromiseBroken

#: An answer stands for another label when that is the truth of so many of its rows, of which there are so many.
_MEANS_ANOTHER, _ROWS_OF_ANOTHER = 2 / 3, 5
#: What is less probable is no luck. Classes that a model can't tell apart get each other's answers by the toss of a
#: coin: the chance of each answer's rows is a binomial tail, and that of a cycle their product. Two such classes are
#: refused once in 2,700 times at most, whatever their numbers of rows; 14 rows, all exchanged, are enough.
LUCK = 1e-4
_NAMED = 5
_REMEDY = (
    "Nothing was shipped. Check the order of the labels in the model's config.json (id2label), and that training and "
    "held-out files mean the same by each label"
)


@dataclass(frozen=True)
class Exchange:
    """Labels that are exchanged among each other. ``means``: answer -> the label that it stands for, which is the truth
    of ``other`` of the ``rows`` with these answers; ``luck``: how probable that is where no answer says anything."""

    means: Mapping[int, int]
    rows: int
    other: int
    luck: float

    def told(self, names: Sequence[str]) -> str:
        """In words."""
        pairs = [f"'{names[a]}' for '{names[b]}'" for a, b in sorted(self.means.items())]
        more = " …" if len(pairs) > _NAMED else ""
        return f"{', '.join(pairs[:_NAMED])}{more}, on {self.other} of {self.rows} rows with these answers"


def exchanges(answer: ArrayLike, truth: ArrayLike, classes: int) -> tuple[Exchange, ...]:
    """Each cycle of exchanged labels; mostly none."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (np.asarray(answer), np.asarray(truth)), 1)
    means = table.argmax(axis=1)
    left = {
        a: int(means[a])
        for a in range(classes)
        if means[a] != a and table[a, means[a]] >= max(_ROWS_OF_ANOTHER, _MEANS_ANOTHER * table[a].sum())
    }
    while set(left) != set(left.values()):  # what isn't part of a cycle is only confused
        both = set(left) & set(left.values())
        left = {a: b for a, b in left.items() if a in both and b in both}
    found = []
    while left:
        cycle: dict[int, int] = {}
        at = next(iter(left))
        while at not in cycle:
            cycle[at] = left.pop(at)
            at = cycle[at]
        found.append(
            Exchange(
                means=cycle,
                rows=int(sum(table[a].sum() for a in cycle)),
                other=int(sum(table[a, b] for a, b in cycle.items())),
                luck=math.prod(_tail(int(table[a, b]), int(table[a, b] + table[a, a])) for a, b in cycle.items()),
            )
        )
    return tuple(found)


def broken_order(answer: ArrayLike, truth: ArrayLike, names: Sequence[str], *, where: str) -> PromiseBroken | None:
    """The error (``labels``) to raise where labels are exchanged and it can't be luck."""
    sure = [found.told(names) for found in exchanges(answer, truth, len(names)) if found.luck <= LUCK]
    if not sure:
        return None
    return PromiseBroken(
        "labels", f"labels are exchanged: the model answers {'; '.join(sure)}", where=where, remedy=_REMEDY
    )


def _tail(least: int, tosses: int) -> float:
    """How often a fair coin shows heads so often at least."""
    chance: float = math.comb(tosses, least) / 2**tosses
    total = chance
    for heads in range(least, tosses):
        chance *= (tosses - heads) / (heads + 1)
        total += chance
    return total
