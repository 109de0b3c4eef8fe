"""Which class a candidate loses while its accuracy stays: paired, class by class, and not by chance. Pure.

A model that answers one of 150 classes wrongly loses less than a point of accuracy. So each class is judged alone: of
its rows, how many does only fp32 answer rightly (``lost``), and how many only the candidate (``gained``)? Where both
are as good, a row that differs is lost or gained like a coin's toss: the exact sign test, one-sided (McNemar, 1947).
Among many classes some look bad by luck, so the level is shared out among them; Tarone's way ("A modified Bonferroni
method for discrete data", Biometrics 46, 1990) counts only those classes whose differing rows are numerous enough to
be significant at all, which keeps the test sharp where most classes have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from exporters.evaluate import Logits
from exporters.select import Miss

CLASS_DROP = "class_drop"
#: A class may lose the share of its rows that the whole may lose (``max_drop``), and this much more.
MAX_CLASS_DROP = 0.05
#: How often a candidate that is as good as fp32 in every class is refused all the same, at most.
LEVEL = 0.01
_NAMED = 3


class ClassDrop(msgspec.Struct, frozen=True, kw_only=True):
    """One class's recall lost against fp32 (below 0: a gain) on one split.

    ``lost`` and ``gained`` count rows that only fp32, only the candidate answers rightly; ``p_value`` says how often
    chance alone loses at least as many. ``ruined``: more than may be lost, and not by chance.
    """

    label: str
    rows: int
    lost: int
    gained: int
    drop: float
    p_value: float
    ruined: bool


def class_drops(
    logits: Logits, reference: Logits, labels: Sequence[int], names: Sequence[str], *, max_drop: float
) -> tuple[ClassDrop, ...]:
    """The classes in which ``logits`` and ``reference`` (fp32's, [N, C]) are right on different rows, worst first.

    Empty where the outputs are not finite: nothing can be said of classes then.
    """
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        return ()
    truth = np.asarray(labels)
    before, after = reference.argmax(axis=1) == truth, logits.argmax(axis=1) == truth
    count = len(names)
    rows = np.bincount(truth, minlength=count)
    lost = np.bincount(truth[before & ~after], minlength=count)
    gained = np.bincount(truth[after & ~before], minlength=count)
    level = shared_level([int(differing) for differing in lost + gained])
    found = []
    for index in map(int, np.flatnonzero(lost + gained)):
        worse, better = int(lost[index]), int(gained[index])
        drop, p_value = (worse - better) / int(rows[index]), sign_test(worse, better)
        ruined = drop > max_drop + MAX_CLASS_DROP + 1e-12 and p_value <= level
        found.append(
            ClassDrop(
                label=names[index],
                rows=int(rows[index]),
                lost=worse,
                gained=better,
                drop=drop,
                p_value=p_value,
                ruined=ruined,
            )
        )
    return tuple(sorted(found, key=lambda entry: (-entry.drop, entry.p_value, entry.label)))


def sign_test(lost: int, gained: int) -> float:
    """How often a fair coin, tossed once for each differing row, shows ``lost`` or more losses."""
    tosses = lost + gained
    return math.ldexp(sum(math.comb(tosses, losses) for losses in range(lost, tosses + 1)), -tosses)


def shared_level(differing: Sequence[int], level: float = LEVEL) -> float:
    """The level for each class, so that all together err no more often than ``level`` (Tarone, 1990).

    ``differing`` counts each class's rows that are lost or gained. With ``n`` of them no p-value is below 0.5 ** n: for
    the smallest k such that no more than k classes can reach level / k at all, each is tested at level / k.
    """
    for sharing in range(1, len(differing) + 1):
        if sum(0.5**count <= level / sharing for count in differing) <= sharing:
            return level / sharing
    return level


def class_misses(drops: Sequence[ClassDrop], *, max_drop: float) -> tuple[Miss, ...]:
    """The broken rule, its classes named; empty where no class is ruined."""
    ruined = [entry for entry in drops if entry.ruined]
    if not ruined:
        return ()
    more = f" and {len(ruined) - _NAMED} more classes" if len(ruined) > _NAMED else ""
    named = ", ".join(f"'{d.label}' ({d.drop * 100:.1f} pt of its {d.rows} rows)" for d in ruined[:_NAMED])
    worst = ruined[0].drop
    return (
        Miss(
            promise=CLASS_DROP,
            reason=f"loses too much of the class {named}{more}",
            excess=worst - max_drop - MAX_CLASS_DROP,
            remedy=f"give more training rows of '{ruined[0].label}' or use another precision",
        ),
    )
