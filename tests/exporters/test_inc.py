"""neural-compressor's candidate: there, absent or failed, it is in the report; nothing else changes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
import numpy as np
import pytest

import exporters
from aios_edge.errors import MissingExtra, PromiseBroken, RuntimeUnavailable
from aios_edge.profile_files import load_profile
from exporters import graph, inc, quantize
from exporters.plans import STATIC, Plan, plans_for
from exporters.recipe import ExportRecipe, SearchSection, load_recipe

pytestmark = pytest.mark.export

INSTALLED = all(importlib.util.find_spec(name) for name in ("neural_compressor", "torchao", "cpuinfo", "onnxscript"))


def asked_for(workshop: Path) -> ExportRecipe:
    recipe = load_recipe(workshop / "recipe.toml")
    return msgspec.structs.replace(recipe, search=SearchSection(neural_compressor=True))


def test_who_asks_and_where() -> None:
    """A switch in the recipe for every profile that runs on the CPU first; TensorRT takes no such zero points."""

    def names(profile: str, *, neural_compressor: bool = False) -> list[str]:
        search = SearchSection(neural_compressor=neural_compressor)
        return [plan.name for plan in plans_for(load_profile(profile), search)]

    assert "inc-static-s8" not in names("x86-vnni")
    assert names("x86-vnni", neural_compressor=True)[-1] == "inc-static-s8"
    assert names("x86-gateway", neural_compressor=True)[-1] == "inc-static-s8-r7"  # its products saturate in 8 bits
    assert names("jetson-orin-nano", neural_compressor=True) == names("jetson-orin-nano")


def test_not_installed_is_said_with_the_remedy(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inc, "_MODULES", ("no_such_module_of_it",))
    report = exporters.export(asked_for(workshop), ["x86-vnni"], tmp_path / "out", cache=workshop / ".inc-cache")
    profile = report.profiles["x86-vnni"]
    assert profile.bundle == "x86-vnni"
    last = profile.candidates[-1]
    assert (last.name, last.precision, last.chosen, last.size_bytes) == ("inc-static-s8", "static-s8", False, None)
    assert last.reason.startswith("not available here: ")
    assert "pip install 'aios-edge[neural-compressor]'" in last.reason
    assert last.not_measured == last.reason
    assert "not available here" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_where_nothing_else_is_preferred_its_absence_is_the_reason(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inc, "_MODULES", ("no_such_module_of_it",))
    recipe = load_recipe(workshop / "recipe.toml")
    only = msgspec.structs.replace(load_profile("x86-vnni"), precision_preference=(STATIC,))
    with pytest.raises(PromiseBroken, match="inc-static-s8 is not available here") as caught:
        exporters.export(recipe, [only], tmp_path / "out", cache=workshop / ".inc-cache")
    assert "precision_preference" not in str(caught.value)
    assert "not available here" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its extra [pt], neural-compressor can be found and can't run."""
    monkeypatch.setattr(inc, "_MODULES", ("msgspec", "no_such_module_of_it"))
    with pytest.raises(MissingExtra, match="no-such-module-of-it") as caught:
        inc.versions()
    assert caught.value.extra == "neural-compressor"


def test_a_failure_over_there_is_one_error_with_its_last_words(tmp_path: Path) -> None:
    job = inc.Job(
        model=str(tmp_path / "nothing"), inputs=("input_ids",), accuracy=1.0, max_drop=0.0, levels=127, threads=1
    )
    row = {"input_ids": np.ones((1, 4), dtype=np.int64)}
    plan = Plan(name="inc-static-s8", precision="static-s8")
    with pytest.raises(RuntimeUnavailable, match="neural-compressor: failed") as caught:
        inc.build(plan, job, [row], inc.Rows(samples=[row], labels=[0], reference=[0]), tmp_path)
    assert "nothing" in caught.value.what


@pytest.mark.skipif(not INSTALLED, reason="needs the extra neural-compressor")
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_tuned_candidate_takes_part_like_any_other(workshop: Path, tmp_path: Path) -> None:
    """All products in 8 bits, weights too; its trials are in the report."""
    cache = workshop / ".inc-cache"
    report = exporters.export(asked_for(workshop), ["x86-vnni", "x86-gateway"], tmp_path / "out", cache=cache)
    for profile, name in (("x86-vnni", "inc-static-s8"), ("x86-gateway", "inc-static-s8-r7")):
        found = next(c for c in report.profiles[profile].candidates if c.name == name)
        assert found.agreement is not None and found.agreement > 0.95
        assert found.operators["MatMulIntegerToFloat"] == 2 * 6 + 2  # six a layer, pooler and classifier
        assert [trial.kept for trial in found.tuning] == [True]
        assert found.tuning[0].configuration == "all products, ranges from extremes"
        assert found.latency and found.rss_bytes
    built = [path.parent for path in (cache / "quantize").glob("*/candidate.json")]
    folder = next(folder for folder in built if quantize.load_built(folder).tuning)
    left = ["candidate.json", "model.onnx", "model.onnx.data", "seal.json"]
    assert sorted(path.name for path in folder.iterdir()) == left
    model = graph.load(folder / "model.onnx")
    assert {entry.version for entry in model.opset_import if not entry.domain} == {20}
