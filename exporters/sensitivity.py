"""Which products harm the answers most when they are quantized; the worst few stay in float.

Each group (the products of one activation) is quantized alone, and the change of the logits is its harm. Nothing held
out is read: the rows are training texts. Their own margins are wide, a model has learnt them, so texts are spliced: the
first half of one with the second half of another. Such rows are as near to a border as unseen ones or nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from exporters import ort, qdq
from exporters.encode import Sample, length_of
from exporters.evaluate import Logits
from exporters.ranges import Range
from exporters.scheme import Scheme

#: Agreement with fp32 on spliced rows that ends the search, and how many groups may be given up for it. What agrees on
#: 0.98 of spliced rows agreed on 0.998 of real ones (docs/measurements.md).
GOAL = 0.985
MOST = 4
HARM_ROWS = 64
TRIAL_ROWS = 512


def ranked(harm: Mapping[str, float]) -> tuple[str, ...]:
    """The most harmful first, what is not finite before all; by name where equal. Pure."""

    def key(name: str) -> tuple[float, str]:
        return (-harm[name] if np.isfinite(harm[name]) else -np.inf, name)

    return tuple(sorted(harm, key=key))


def harm_of(reference: Logits, logits: Logits) -> float:
    """Mean squared change of [N, labels] logits; what moves all of a row's logits alike moves no answer. Pure."""
    moved = logits.astype(np.float64) - reference
    return float(np.mean((moved - moved.mean(axis=1, keepdims=True)) ** 2))


def agreement_of(reference: Logits, logits: Logits) -> float:
    """Share of rows with the same argmax; 0 where outputs aren't finite. Pure."""
    return float(np.mean(reference.argmax(axis=1) == logits.argmax(axis=1))) if np.isfinite(logits).all() else 0.0


def fewest(order: Sequence[str], agreement: Callable[[tuple[str, ...]], float], least: int = 0) -> tuple[str, ...]:
    """The shortest head of ``order`` (``least`` to :data:`MOST`) that reaches :data:`GOAL` when kept in float; where
    none does, the one that agrees best."""
    seen: list[tuple[float, int]] = []
    for count in range(min(least, len(order)), min(MOST, len(order)) + 1):
        found = agreement(tuple(order[:count]))
        if found >= GOAL:
            return tuple(order[:count])
        seen.append((found, -count))
    return tuple(order[: -max(seen)[1]])


def most_harmful(
    model: Any, ranges: Mapping[str, Range], scheme: Scheme, samples: Sequence[Sample], *, least: int = 0
) -> tuple[str, ...]:
    """The activations of ``ranges`` whose products should stay in float, ``least`` or more; the model is left as it
    is."""
    rows = spliced(samples, TRIAL_ROWS)
    reference = ort.answers(model, rows)

    def answers(names: Iterable[str], count: int) -> Logits:
        trial = type(model)()
        trial.CopyFrom(model)
        qdq.quantize(trial, {name: ranges[name] for name in names}, scheme, "simulated")
        return ort.answers(trial, rows[:count])

    harm = {name: harm_of(reference[:HARM_ROWS], answers((name,), HARM_ROWS)) for name in ranges}

    def agreement(kept: tuple[str, ...]) -> float:
        return agreement_of(reference, answers(ranges.keys() - set(kept), TRIAL_ROWS))

    return fewest(ranked(harm), agreement, least)


def spliced(samples: Sequence[Sample], count: int) -> list[Sample]:
    """``count`` texts, each the first half of one sample and the second half of another. Pure."""
    made: list[Sample] = []
    total = len(samples)
    for index in range(count):
        first = samples[index % total]
        second = samples[(index + total // 2 + index // total) % total]
        head, tail = (length_of(first) + 1) // 2, length_of(second) // 2
        made.append({name: np.concatenate([first[name][:, :head], second[name][:, tail:]], axis=1) for name in first})
    return made
