"""Which rows a stage picks is part of its key: one that would pick others never meets an old result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aios_edge.host import inspect_host
from exporters import ort, stages
from exporters.cache import StageCache, digest_of
from exporters.data import Data, Labelled, load_data
from exporters.plans import Plan
from exporters.progress import SilentProgress
from exporters.quantize import Built
from exporters.recipe import load_recipe
from exporters.source import locate
from exporters.stages import Stages
from exporters.variants import Variants

pytestmark = pytest.mark.export

PLAN = Plan(name="dynamic-s8-e4", precision="dynamic-s8", rare_row_bits=4)


class Keys(StageCache):
    """Builds nothing but what says that a candidate was built."""

    def produce(self, stage: str, ingredients: dict[str, Any], *_: object, **__: object) -> Path:
        folder = self.root / stage / digest_of(stage, ingredients)
        folder.mkdir(parents=True, exist_ok=True)
        built = Built(session=ort.DEFAULT_SPEC, operators={})
        (folder / "candidate.json").write_bytes(msgspec.json.encode(built))
        return folder


@pytest.fixture
def key_of(workshop: Path, tmp_path: Path) -> Callable[[str], str]:
    """The key that a stage has as its code picks rows now."""
    recipe = load_recipe(workshop / "recipe.toml")
    origin, data = locate(recipe), replace(load_data(recipe), unlabelled=("a bright scene",))
    made = Stages(recipe, Keys(tmp_path), inspect_host(), SilentProgress())
    identity = made.identity(origin, data.labels, pair=False)
    encoder = made.encoder(identity, workshop / "tiny")
    variants = Variants(made, data, identity, workshop / "tiny", tmp_path / "tuned")

    def key(stage: str) -> str:
        if stage == "importance":
            return variants._importance().name
        return made.candidate(stage, PLAN, tmp_path / "converted", data, encoder).folder.name

    return key


def first(rows: Labelled, count: int) -> tuple[Any, ...]:
    return rows.texts[:count]


@pytest.mark.parametrize(
    ("stage", "owner", "name", "other"),
    [
        ("quantize", Labelled, "spread", first),
        ("quantize", stages, "picked_texts", lambda train: (train.spread(128), train.texts[:128])),
        ("quantize", Data, "in_use", property(lambda data: data.train.texts)),
        ("importance", Variants, "_importance_rows", lambda variants: variants._data.train),
    ],
    ids=["calibration", "trial", "counted", "importance"],
)
def test_other_rows_are_another_key(
    key_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, stage: str, owner: Any, name: str, other: Any
) -> None:
    before = key_of(stage)
    assert key_of(stage) == before
    monkeypatch.setattr(owner, name, other)
    assert key_of(stage) != before
