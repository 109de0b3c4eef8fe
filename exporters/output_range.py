"""Outputs that no longer mean what fp32's do, whatever the accuracy says: not finite, constant, or far out. Pure.

Accuracy and agreement see the largest logit only. A broken scale shows first in how far logits reach: scores, the
temperature and golden samples stand on their values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporters.evaluate import Logits
from exporters.select import Miss

OUTPUT_RANGE = "output_range"
#: How far beyond fp32's smallest and largest logit one may lie, as a multiple of the distance between the two.
MARGIN = 1.0
#: A label whose logit moves over the rows by less than this share of fp32's movement is constant.
LEAST_SPREAD = 0.01
_REMEDY = "use another precision, and report this model"


def output_misses(logits: Logits, reference: Logits, names: Sequence[str]) -> tuple[Miss, ...]:
    """What is wrong with a candidate's logits [N, C], compared with fp32's answers to the same rows: at most one miss
    of each kind, with label and validation row (from 1)."""
    if logits.shape != reference.shape:
        what = f"gives outputs of shape {list(logits.shape)} instead of {list(reference.shape)}"
        return (_miss(what, float("inf")),)
    finite = np.isfinite(logits)
    if not finite.all():
        row, label = (int(index) for index in np.argwhere(~finite)[0])
        what = f"gives {logits[row, label]} for '{names[label]}' in validation row {row + 1}"
        more = int((~finite).any(axis=1).sum()) - 1
        return (_miss(what + (f" and is not finite in {more} more" if more else ""), float("inf")),)
    return tuple(miss for miss in (_far_out(logits, reference, names), _constant(logits, reference, names)) if miss)


def _far_out(logits: Logits, reference: Logits, names: Sequence[str]) -> Miss | None:
    low, high = float(reference.min()), float(reference.max())
    room = (high - low) * MARGIN
    beyond = np.maximum(logits - high, low - logits)
    row, label = (int(index) for index in np.unravel_index(int(beyond.argmax()), beyond.shape))
    if room <= 0 or beyond[row, label] <= room:
        return None
    value = float(logits[row, label])
    what = f"gives {value:.4g} for '{names[label]}' in validation row {row + 1}, far outside of fp32's {low:.4g} … "
    return _miss(f"{what}{high:.4g}", float(beyond[row, label]) / room - 1)


def _constant(logits: Logits, reference: Logits, names: Sequence[str]) -> Miss | None:
    moved, wanted = np.ptp(logits, axis=0), np.ptp(reference, axis=0)
    still = np.flatnonzero((moved < wanted * LEAST_SPREAD) & (wanted > 0))
    if len(logits) < 2 or not still.size:
        return None
    label = int(still[0])
    more = f" and {still.size - 1} more labels" if still.size > 1 else ""
    what = f"gives a constant {float(logits[0, label]):.4g} for '{names[label]}'{more}, whatever it is asked"
    return _miss(what, float(still.size) / len(names))


def _miss(reason: str, excess: float) -> Miss:
    return Miss(promise=OUTPUT_RANGE, reason=reason, excess=excess, remedy=_REMEDY)
