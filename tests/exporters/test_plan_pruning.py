"""What may be pruned for each profile: its own budget, the structure that is asked for and what it runs decide."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from aios_edge.profile import DeviceProfile
from aios_edge.profile_files import load_profile
from exporters import vocabulary
from exporters.bundle import DOCUMENTS_BYTES
from exporters.data import load_data
from exporters.recipe import ExportRecipe, parse_recipe
from exporters.source import locate
from exporters.structure import Structure
from exporters.variants import Pruning, plan_pruning

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("spelling")]


def recipe_of(workshop: Path, **section: int) -> ExportRecipe:
    """Texts of few pieces, so that a budget decides how many more stay."""
    few = [f"film {'ab'[at % 2] * at},{'ab'[at % 2]}" for at in range(1, 150)]
    (workshop / "few.csv").write_text("\n".join(["text,label", *few]) + "\n", encoding="utf-8")
    document = {"model": {"source": "spelling"}, "data": {"train": "few.csv"}, "prune": section}
    return parse_recipe({**document, "finetune": {"max_length": 16}}, folder=workshop)


def prunings(recipe: ExportRecipe, *profiles: DeviceProfile) -> list[Pruning]:
    tokenizer = (Path(recipe.folder) / "spelling/tokenizer.json").read_bytes()
    found = plan_pruning(recipe, locate(recipe), load_data(recipe), tokenizer, profiles)
    return [found[profile.name] for profile in profiles]


def profile_of(budget: int | None, precision: str = "dynamic-s8") -> DeviceProfile:
    profile = load_profile("arm64-gateway")
    budgets = msgspec.structs.replace(profile.budgets, bundle_size_bytes=budget)
    name = f"board-{precision}-{budget}"
    return msgspec.structs.replace(profile, name=name, budgets=budgets, precision_preference=(precision,))


def budget_for(workshop: Path, pruning: Pruning, rung: Structure, pieces: int) -> int:
    """The estimate of a bundle with so many pieces, in the smallest form that the profile gets."""
    cut, shape = replace(rung, vocabulary=pieces), pruning.shape
    tokenizer = (workshop / "spelling/tokenizer.json").read_bytes()
    around = vocabulary.beside_pieces(tokenizer)
    left = around + math.ceil((len(tokenizer) - around) * pieces / shape.whole.vocabulary)
    return min(shape.size_bytes(cut, p.precision, p.rare_row_bits) for p in pruning.plans) + left + DOCUMENTS_BYTES


@pytest.mark.parametrize("precision", ["dynamic-s8", "fp16", "qdq-u8s8"])
def test_a_small_budget_gets_as_many_pieces_as_fit(workshop: Path, precision: str) -> None:
    recipe = recipe_of(workshop)
    (roomy,) = prunings(recipe, profile_of(None, precision))
    whole, third = roomy.shape.whole.vocabulary, roomy.rungs[1]
    wanted = (0, 80, 90, whole)
    small = [profile_of(budget_for(workshop, roomy, third, pieces), precision) for pieces in wanted]
    found = prunings(recipe, *small)
    # Of every letter and what training uses none goes; what others are exported with doesn't matter.
    assert [len(pruning.pieces) for pruning in found] == [77, 80, 90, whole]
    assert [pruning.rungs[1].vocabulary for pruning in found] == [77, 80, 90, whole]
    assert prunings(recipe, small[-1]) == found[-1:] and roomy.pieces == found[-1].pieces


@pytest.mark.usefixtures("lexicon")
@pytest.mark.parametrize("model", ["spelling", "lexicon"])
@pytest.mark.parametrize("compact", [False, True], ids=["as it came", "without blanks"])
def test_a_cut_tokenizer_is_estimated_in_proportion_and_not_low(workshop: Path, model: str, compact: bool) -> None:
    recipe, source = recipe_of(workshop), (workshop / model / "tokenizer.json").read_bytes()
    if compact:
        source = json.dumps(json.loads(source), ensure_ascii=False, separators=(",", ":")).encode()
    (pruning,) = prunings(recipe, profile_of(None))
    words = json.loads(source)["model"]["vocab"]
    whole = replace(pruning.shape.whole, vocabulary=len(words))
    sizes = {"tokenizer": len(source), "beside_pieces": vocabulary.beside_pieces(source)}
    shape = replace(pruning.shape, whole=whole, **sizes)
    counts = vocabulary.used(source, load_data(recipe).by_class, recipe.finetune.max_length)
    for pieces in (80, len(words) - 5):
        cut = replace(whole, vocabulary=pieces)
        found = shape.shipped_bytes(cut, "dynamic-s8") - shape.size_bytes(cut, "dynamic-s8")
        real = len(vocabulary.reduced(source, vocabulary.choose(source, counts, pieces)))
        assert real <= found < len(source)
    assert shape.shipped_bytes(whole, "fp32") == shape.size_bytes(whole, "fp32") + len(source)


def test_the_structure_that_is_asked_for_says_how_many_pieces_fit(workshop: Path) -> None:
    recipe = recipe_of(workshop, ffn=64)
    (roomy,) = prunings(recipe, profile_of(None))
    assert [rung.heads for rung in roomy.rungs] == [4]
    (found,) = prunings(recipe, profile_of(budget_for(workshop, roomy, roomy.rungs[0], 85)))
    assert len(found.pieces) == 85


def test_a_budget_may_be_too_small_for_what_must_stay_of_a_tokenizer(workshop: Path) -> None:
    (found,) = prunings(recipe_of(workshop), profile_of(1))
    assert len(found.pieces) == 77


def test_without_a_wish_or_a_plan_nothing_is_pruned(workshop: Path) -> None:
    plain = msgspec.structs.replace(recipe_of(workshop), prune=None)
    assert plan_pruning(plain, locate(plain), load_data(plain), b"", [profile_of(None)]) == {}
    (found,) = prunings(recipe_of(workshop), profile_of(1, "static-s8"))
    assert found.plans == () and len(found.pieces) == found.shape.whole.vocabulary
