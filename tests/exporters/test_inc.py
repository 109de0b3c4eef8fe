"""neural-compressor's candidates: there, absent or failed, they are in the report; nothing else changes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import exporters
from aios_edge.errors import MissingExtra, PromiseBroken, RuntimeUnavailable
from aios_edge.profile import DeviceProfile
from aios_edge.profile_files import load_profile
from exporters import convert, graph, inc, observe, qdq, steps
from exporters.encode import Sample
from exporters.plans import Plan, plans_for
from exporters.quantize import Tuned
from exporters.recipe import ExportRecipe, SearchSection, load_recipe
from exporters.report import Candidate, ExportReport
from exporters.scheme import Scheme

pytestmark = pytest.mark.export

PRODUCTS = 2 * 6 + 2  # six a layer, pooler and classifier
TokenRows = Callable[[int, int], list[Sample]]

INSTALLED = all(importlib.util.find_spec(name) for name in ("neural_compressor", "torchao", "cpuinfo", "onnxscript"))


def asked_for(workshop: Path) -> ExportRecipe:
    recipe = load_recipe(workshop / "recipe.toml")
    return msgspec.structs.replace(recipe, search=SearchSection(neural_compressor=True))


#: Does as it is told: leaves the model, and of a tuning the trials, that lie beside it; writes down what it was given.
SCRIPT = """
import json, shutil, sys
from pathlib import Path
work, here = Path(sys.argv[1]), Path(__file__).parent
job = json.loads((work / "job.json").read_bytes())
kind = "tuned" if job["promise"] else "static"
with (here / "asked").open("a") as stream:
    print(kind, *sorted(path.name for path in work.iterdir()), file=stream)
shutil.copy(here / f"{kind}.onnx", work / "quantized.onnx")
if kind == "tuned":
    shutil.copy(here / "tuning.json", work)
"""


@dataclass
class Scripted:
    """A process in place of neural-compressor's, and what it was asked for."""

    folder: Path
    fp32: Path
    samples: Sequence[Sample]

    def model(self, kind: str, *, reach: float = 1.0) -> None:
        """What it makes when asked for that kind. With a small ``reach`` activations are cut off, and answers wrong."""
        model, scheme = graph.load(self.fp32), Scheme(static=True)
        graph.split_gemms(model)
        found = observe.ranges_of(model, self.samples, scheme)
        found = {name: replace(entry, low=entry.low * reach, high=entry.high * reach) for name, entry in found.items()}
        qdq.quantize(model, found, scheme, "qdq")
        steps.save(model, self.folder / f"{kind}.onnx")

    def trials(self, *accuracies: float) -> None:
        """What it says of its tuning."""
        told = [
            {"configuration": f"no. {at}", "accuracy": a, "agreement": a, "rows": 9} for at, a in enumerate(accuracies)
        ]
        (self.folder / "tuning.json").write_text(json.dumps(told), encoding="utf-8")

    @property
    def asked(self) -> list[str]:
        """The kinds it was asked for, in order, each with the files that it was given."""
        return (self.folder / "asked").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def made(workshop: Path, fine_tuned: Path, tmp_path_factory: pytest.TempPathFactory, token_rows: TokenRows) -> Scripted:
    """One whose static model is as good as fp32."""
    folder = tmp_path_factory.mktemp("scripted")
    shutil.copytree(fine_tuned, workshop / ".inc-cache")
    (converted,) = (workshop / ".inc-cache" / "convert").glob(f"*/{convert.STANDARD}")
    scripted = Scripted(folder=folder, fp32=converted, samples=token_rows(48, 1))
    for kind in ("static", "tuned"):
        scripted.model(kind)
    return scripted


@pytest.fixture
def scripted(made: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    folder = tmp_path / "worker"
    folder.mkdir()
    for kind in ("static", "tuned"):
        (folder / f"{kind}.onnx").write_bytes((made.folder / f"{kind}.onnx").read_bytes())
    (folder / "worker.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setattr(inc, "WORKER", (str(folder / "worker.py"),))
    monkeypatch.setattr(inc, "_MODULES", ())
    monkeypatch.setattr(inc, "_PACKAGES", ())
    return replace(made, folder=folder)


def preferring(*wanted: str, profile: str = "x86-vnni") -> DeviceProfile:
    """Of a board that isn't here: how fast this machine runs which of them decides nothing."""
    found = load_profile(profile)
    match = msgspec.structs.replace(found.match, device_tree=("no such board",))
    return msgspec.structs.replace(found, precision_preference=wanted, match=match)


def exported(workshop: Path, tmp_path: Path, *wanted: str, profile: str = "x86-vnni") -> ExportReport:
    """With a cache of its own but for what doesn't hang on the worker."""
    cache = tmp_path / "cache"
    if not cache.exists():
        cache.mkdir()
        for stage in ("tokenizer", "finetune", "convert"):
            (cache / stage).symlink_to(workshop / ".inc-cache" / stage)
    return exporters.export(
        workshop / "recipe.toml", [preferring(*wanted, profile=profile)], tmp_path / "out", cache=cache, candidates=True
    )


def by_name(report: ExportReport, profile: str = "x86-vnni") -> dict[str, Candidate]:
    return {candidate.name: candidate for candidate in report.profiles[profile].candidates}


def test_who_asks_and_where() -> None:
    """A switch in the recipe for every profile that runs on the CPU first; TensorRT takes no such zero points."""

    def names(profile: str, *, neural_compressor: bool = False) -> list[str]:
        search = SearchSection(neural_compressor=neural_compressor)
        return [plan.name for plan in plans_for(load_profile(profile), search)]

    assert not {"inc-static-s8", "inc-tuned-s8"} & set(names("x86-vnni"))
    assert names("x86-vnni", neural_compressor=True)[-2:] == ["inc-static-s8", "inc-tuned-s8"]
    # its products saturate in 8 bits
    assert names("x86-gateway", neural_compressor=True)[-2:] == ["inc-static-s8-r7", "inc-tuned-s8-r7"]
    assert names("jetson-orin-nano", neural_compressor=True) == names("jetson-orin-nano")


def test_what_a_profile_prefers_is_not_added_again() -> None:
    plans = plans_for(preferring("tuned-s8", "fp32"), SearchSection(neural_compressor=True))
    assert [(plan.name, plan.precision, plan.tuned) for plan in plans] == [
        ("inc-tuned-s8", "static-s8", True),
        ("fp32", "fp32", False),
        ("inc-static-s8", "static-s8", False),
    ]


def test_a_tuning_that_ends_at_once_is_the_static_candidate_and_says_so(
    workshop: Path, tmp_path: Path, scripted: Scripted
) -> None:
    """It is built once, and takes part once."""
    report = exported(workshop, tmp_path, "static-s8", "tuned-s8")
    assert scripted.asked == ["static calibration.npz job.json"]  # no validation row
    static, tuned = by_name(report).values()
    assert static.name == "inc-static-s8" and static.chosen and static.tuning == () and static.same_model_as is None
    assert (tuned.name, tuned.chosen, tuned.same_model_as) == ("inc-tuned-s8", False, "inc-static-s8")
    assert tuned.reason == "the first configuration kept the promise: the same model as inc-static-s8"
    assert [(trial.configuration, trial.rows, trial.kept) for trial in tuned.tuning] == [(inc.DEFAULT, 200, True)]
    assert tuned.tuning[0].agreement == static.agreement and tuned.tuning[0].accuracy == static.metrics.accuracy
    figures = (
        "precision",
        "size_bytes",
        "metrics",
        "drop",
        "agreement",
        "latency",
        "rss_bytes",
        "operators",
        "eligible",
    )
    assert all(getattr(tuned, figure) == getattr(static, figure) for figure in figures)
    assert static.measuring_bundle == "candidates/x86-vnni/inc-static-s8" and tuned.measuring_bundle is None
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "No other candidate was tried." in text and "the same model as inc-static-s8" in text


def test_who_prefers_the_tuned_one_gets_it(workshop: Path, tmp_path: Path, scripted: Scripted) -> None:
    """The static one is the twin then; alone, the tuned one is a candidate like any other."""
    found = by_name(exported(workshop, tmp_path, "tuned-s8", "static-s8"))
    assert found["inc-tuned-s8"].chosen and found["inc-tuned-s8"].tuning and not found["inc-tuned-s8"].same_model_as
    assert found["inc-static-s8"].same_model_as == "inc-tuned-s8" and not found["inc-static-s8"].tuning
    assert found["inc-static-s8"].reason == "the first configuration kept the promise: the same model as inc-tuned-s8"
    alone = exported(workshop, tmp_path, "tuned-s8")
    (only,) = by_name(alone).values()
    assert only.chosen and only.same_model_as is None and only.tuning[0].kept
    assert len(scripted.asked) == 1 and alone.stages["built"] == ()


def test_where_the_default_loses_too_much_the_others_are_tried(
    workshop: Path, tmp_path: Path, scripted: Scripted
) -> None:
    """Two models then, each judged by its own figures."""
    scripted.model("static", reach=0.02)
    scripted.trials(0.5, 1.0)
    report = exported(workshop, tmp_path, "static-s8", "tuned-s8", profile="x86-gateway")
    given = "answers.npz calibration.npz job.json rows.npz"
    assert scripted.asked == ["static calibration.npz job.json", f"tuned {given}"]
    found = by_name(report, "x86-gateway")
    static, tuned = found["inc-static-s8-r7"], found["inc-tuned-s8-r7"]
    assert tuned.chosen and tuned.same_model_as is None and not static.eligible
    assert static.agreement < 0.9 < tuned.agreement and static.tuning == ()
    assert [trial.kept for trial in tuned.tuning] == [False, False, True]
    assert tuned.tuning[0].configuration == inc.DEFAULT and tuned.tuning[0].agreement == static.agreement
    again = exported(workshop, tmp_path, "static-s8", "tuned-s8", profile="x86-gateway")
    assert again.stages["built"] == () and len(scripted.asked) == 2
    built = [path.parent for path in (tmp_path / "cache" / "quantize").glob("*/candidate.json")]
    assert all(
        not {"job.json", "rows.npz", "quantized.onnx", "tuning.json"} & {f.name for f in b.iterdir()} for b in built
    )


def test_where_nothing_does_better_the_default_is_kept(workshop: Path, tmp_path: Path, scripted: Scripted) -> None:
    scripted.model("static", reach=0.02)
    scripted.trials(0.1, 0.2)
    found = by_name(exported(workshop, tmp_path, "static-s8", "tuned-s8", "fp32"))
    tuned = found["inc-tuned-s8"]
    assert tuned.reason == "no other configuration was more accurate: the same model as inc-static-s8"
    assert not tuned.eligible and [trial.kept for trial in tuned.tuning] == [True, False, False]
    assert found["fp32"].chosen


def test_the_first_that_keeps_the_promise_else_the_most_accurate() -> None:
    def best(*accuracies: float) -> int:
        trials = [Tuned(configuration="c", accuracy=accuracy, agreement=1.0, rows=10) for accuracy in accuracies]
        return inc.best_of(trials, inc.Promise(accuracy=0.95, max_drop=0.02))

    assert best(0.94, 0.96) == 0
    assert best(0.90, 0.93, 0.95) == 1  # exactly max_drop
    assert best(0.90, 0.92, 0.91) == 1
    assert best(0.92, 0.90, 0.92) == 0


def test_not_installed_is_said_with_the_remedy(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inc, "_MODULES", ("no_such_module_of_it",))
    report = exporters.export(asked_for(workshop), ["x86-vnni"], tmp_path / "out", cache=workshop / ".inc-cache")
    profile = report.profiles["x86-vnni"]
    assert profile.bundle == "x86-vnni"
    assert [absent.name for absent in profile.candidates[-2:]] == ["inc-static-s8", "inc-tuned-s8"]
    for absent in profile.candidates[-2:]:
        assert (absent.precision, absent.chosen, absent.size_bytes) == ("static-s8", False, None)
        assert absent.reason.startswith("not available here: ")
        assert "pip install 'aios-edge[neural-compressor]'" in absent.reason
        assert absent.not_measured == absent.reason
    assert "not available here" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_failure_ends_neither_the_export_nor_the_other_one(
    workshop: Path, tmp_path: Path, scripted: Scripted
) -> None:
    """A static model that loses too much, and a tuning that fails."""
    scripted.model("static", reach=0.02)
    (scripted.folder / "tuned.onnx").unlink()
    found = by_name(exported(workshop, tmp_path, "static-s8", "tuned-s8", "fp32"))
    assert found["fp32"].chosen and found["inc-static-s8"].size_bytes
    assert found["inc-tuned-s8"].reason.startswith("could not be built: neural-compressor: failed (FileNotFoundError")


@pytest.mark.parametrize(("preferred", "name"), [("static-s8", "inc-static-s8"), ("tuned-s8", "inc-tuned-s8")])
def test_where_nothing_else_is_preferred_its_absence_is_the_reason(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preferred: str, name: str
) -> None:
    monkeypatch.setattr(inc, "_MODULES", ("no_such_module_of_it",))
    recipe, cache = load_recipe(workshop / "recipe.toml"), workshop / ".inc-cache"
    with pytest.raises(PromiseBroken, match=f"{name} is not available here") as caught:
        exporters.export(recipe, [preferring(preferred)], tmp_path / "out", cache=cache)
    assert "precision_preference" not in str(caught.value)
    assert "not available here" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its extra [pt], neural-compressor can be found and can't run."""
    monkeypatch.setattr(inc, "_MODULES", ("msgspec", "no_such_module_of_it"))
    with pytest.raises(MissingExtra, match="no-such-module-of-it") as caught:
        inc.versions()
    assert caught.value.extra == "neural-compressor"


def test_a_failure_over_there_is_one_error_with_its_last_words(tmp_path: Path) -> None:
    job = inc.Job(model=str(tmp_path / "nothing"), inputs=("input_ids",), levels=127, threads=1)
    row = {"input_ids": np.ones((1, 4), dtype=np.int64)}
    plan = Plan(name="inc-static-s8", precision="static-s8")
    with pytest.raises(RuntimeUnavailable, match="neural-compressor: failed") as caught:
        inc.build(plan, job, [row], tmp_path)
    assert "nothing" in caught.value.what


@pytest.mark.skipif(not INSTALLED, reason="needs the extra neural-compressor")
@pytest.mark.long
@pytest.mark.timeout(900)
def test_its_candidates_take_part_like_any_other(workshop: Path, tmp_path: Path) -> None:
    """All products in 8 bits, weights too; the default keeps the promise, so that both are one model."""
    cache = workshop / ".inc-cache"
    report = exporters.export(asked_for(workshop), ["x86-vnni", "x86-gateway"], tmp_path / "out", cache=cache)
    for profile, suffix in (("x86-vnni", ""), ("x86-gateway", "-r7")):
        found = by_name(report, profile)
        static, tuned = found[f"inc-static-s8{suffix}"], found[f"inc-tuned-s8{suffix}"]
        assert static.agreement is not None and static.agreement > 0.95
        assert static.operators["MatMulIntegerToFloat"] == PRODUCTS
        assert static.latency and static.rss_bytes and static.tuning == ()
        assert tuned.same_model_as == static.name
        assert [(trial.configuration, trial.kept) for trial in tuned.tuning] == [(inc.DEFAULT, True)]
    built = [path.parent for path in (cache / "quantize").glob("*/candidate.json")]
    models = {folder: graph.load(folder / "model.onnx") for folder in built}
    newer = {at: m for at, m in models.items() if {e.version for e in m.opset_import if not e.domain} == {20}}
    assert len(newer) >= 2  # 8 and 7 bits
    left = ["candidate.json", "model.onnx", "model.onnx.data", "seal.json"]
    assert all(sorted(path.name for path in folder.iterdir()) == left for folder in newer)


@pytest.mark.skipif(not INSTALLED, reason="needs the extra neural-compressor")
@pytest.mark.long
@pytest.mark.timeout(900)
def test_its_tuning_goes_on_where_the_default_is_not_enough(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_by = inc.Promise.kept_by
    monkeypatch.setattr(
        inc.Promise, "kept_by", lambda p, trial: trial.configuration != inc.DEFAULT and kept_by(p, trial)
    )
    cache = workshop / ".inc-cache"
    profile = preferring("static-s8", "tuned-s8")
    found = by_name(exporters.export(load_recipe(workshop / "recipe.toml"), [profile], tmp_path / "out", cache=cache))
    static, tuned = found["inc-static-s8"], found["inc-tuned-s8"]
    assert [(trial.configuration, trial.kept) for trial in tuned.tuning] == [
        (inc.DEFAULT, False),
        ("all products, ranges from histograms", True),
    ]
    assert tuned.same_model_as is None and tuned.operators["MatMulIntegerToFloat"] == PRODUCTS
    assert tuned.agreement is not None and tuned.agreement > 0.95 and tuned.latency and static.latency
