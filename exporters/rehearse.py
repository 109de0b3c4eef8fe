"""Before bundles are written: their files, loaded anew, answer as they did when the figures were made.

Everything said of a candidate was found out with a tokenizer and a session that were loaded long ago, or lies in the
cache. What ships are files. This is where both meet, whatever the steps between did.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aios_edge.errors import PromiseBroken
from exporters import ort
from exporters.contest import Contest
from exporters.encode import Sample, length_of
from exporters.golden_samples import margins_of, pick
from exporters.stages import Stages
from exporters.trials import Common

#: Largest difference of a logit, relative to the largest: the same machine computes the same.
TOLERANCE = 1e-4
_REMEDY = (
    "Nothing was shipped. Run the same command again: what is damaged is built again; if it stays, delete the cache"
)


def rehearse(contests: Sequence[Contest], common: Common, stages: Stages) -> None:
    """Raise :class:`PromiseBroken` (``tokenizer`` or ``golden``) where the files don't do what the figures say."""
    held_out = common.data.validation
    for contest in contests:
        winner, variant = contest.winner, contest.winner.variant
        where = f"profile {contest.profile.name}"
        samples = variant.encoder.samples(held_out.texts)
        fresh = stages.encoder(variant.identity, variant.tokenizer).samples(held_out.texts)
        for row, (seen, wanted) in enumerate(zip(fresh, samples, strict=True), start=1):
            if not _same(seen, wanted):
                what = (
                    f"the tokenizer that would ship splits validation row {row} otherwise than the one that was "
                    "evaluated"
                )
                raise PromiseBroken("tokenizer", what, where=where, remedy=_REMEDY)
        session = ort.Session(winner.made.model, winner.made.built.session)
        for row in pick(held_out, [length_of(sample) for sample in samples], margins_of(winner.logits)):
            answer, wanted_answer = session.run(samples[row])[0], winner.logits[row]
            scale = max(1.0, float(np.abs(wanted_answer).max()))
            if answer.shape != wanted_answer.shape or not np.abs(answer - wanted_answer).max() <= TOLERANCE * scale:
                what = (
                    f"{winner.made.name} as it would ship doesn't answer validation row {row + 1} as it was evaluated"
                )
                raise PromiseBroken("golden", what, where=where, remedy=_REMEDY)


def _same(one: Sample, other: Sample) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
