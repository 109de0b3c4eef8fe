"""What model card and SBOM are written from: the same facts, so that they can't disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aios_edge.bundle.layout import MODEL_CARD, SBOM
from aios_edge.contract import Contract
from aios_edge.manifest import Manifest
from exporters.calibration import Calibration
from exporters.class_drop import ClassDrop
from exporters.data import Data
from exporters.evaluate import Metrics, Quality
from exporters.finetune import Tuned
from exporters.recipe import ExportRecipe
from exporters.recovery_search import Chosen
from exporters.source import Source
from exporters.structure import Structure

_SPLIT_OFF = "split off the training file"
_NORMAL_95 = 1.959964  # the 0.975 quantile of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Split:
    """Labelled rows: ``file`` is a name, never a path; ``digest`` stands for texts, labels and their order."""

    name: str
    file: str
    rows: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is known of a shipped model when its bundle is written.

    Only what the same inputs give again: no time, no path, no measured latency, so that a bundle can be reproduced.
    ``structure``: what was pruned (None: nothing), ``recovered`` the training after it, and ``recovery`` what that was
    trained with. ``rare_row_bits``: of embeddings of words that the training data use least or not at all (8: as the
    others). ``quality``, ``class_drops``, ``baseline`` (fine-tuned fp32) and ``majority_accuracy`` are the test
    split's.
    """

    manifest: Manifest
    contract: Contract
    recipe: ExportRecipe
    source: Source
    tuned: Tuned
    structure: Structure | None
    recovered: Tuned
    recovery: Chosen | None
    rare_row_bits: int
    splits: tuple[Split, ...]
    quality: Quality
    class_drops: tuple[ClassDrop, ...]
    calibration: Calibration
    baseline: Metrics
    majority_accuracy: float

    @property
    def metrics(self) -> Metrics:
        """The shipped model's figures on the test split; what has none is never shipped."""
        assert self.quality.metrics is not None
        return self.quality.metrics


def splits_of(recipe: ExportRecipe, data: Data, *, test_rows: int, test_digest: str) -> tuple[Split, ...]:
    """The three splits by name and digest."""
    named = {"training": recipe.data.train, "validation": recipe.data.validation, "test": recipe.data.test}
    files = {name: Path(file).name if file else _SPLIT_OFF for name, file in named.items()}
    counted = {
        "training": (len(data.train), data.train.digest()),
        "validation": (len(data.validation), data.validation.digest()),
        "test": (test_rows, test_digest),
    }
    return tuple(Split(name=n, file=files[n], rows=rows, digest=digest) for n, (rows, digest) in counted.items())


def share_interval(share: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in so many rows (Wilson, 1927): honest near 0 and 1 and for few rows."""
    square = _NORMAL_95**2
    middle = (share + square / (2 * rows)) / (1 + square / rows)
    half = _NORMAL_95 / (1 + square / rows) * math.sqrt(share * (1 - share) / rows + square / (4 * rows**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def documents(facts: Facts, files: Mapping[str, Path | bytes]) -> dict[str, bytes]:
    """Model card and SBOM, the latter with the digests of ``files`` and of the card."""
    from exporters.model_card import model_card
    from exporters.sbom import sbom

    card = model_card(facts).encode()
    return {MODEL_CARD: card, SBOM: sbom(facts, {**files, MODEL_CARD: card})}
