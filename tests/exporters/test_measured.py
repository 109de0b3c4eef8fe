"""Candidates given out to be measured, measured by the real ``bench``, and brought back: they change the choice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import exporters
from aios_edge.bundle.read import open_bundle
from aios_edge.errors import MeasurementRefused, UsageError
from aios_edge.profile import Budgets, DeviceProfile
from aios_edge.profile_files import load_profile
from device_agent.activation import ActivationRefused, activate
from exporters import brought, trials
from exporters.budget_fit import Whole
from exporters.report import ExportReport
from exporters.structure import Shape, Structure

pytestmark = pytest.mark.export

#: A class of devices that no machine belongs to: its CPU has a flag that doesn't exist.
BOARD = """
schema = "1.0"
name = "board"
title = "a board that was made up"
arch = "any"
precision_preference = ["dynamic-s8", "fp32"]
quantization = "dynamic-s8"
cpu_flags = ["made_up"]
reduce_range = false
[[providers]]
name = "CPUExecutionProvider"
[power]
sources = ["ina3221"]
[budgets]
latency_p95_s = 0.040
memory_bytes = 500_000_000
bundle_size_bytes = 30_000_000
max_drop = 0.02
"""

Bench = Callable[..., Path]


def aios_edge(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aios_edge.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class Export:
    """The first export of the board's profile, all its candidates given out."""

    def __init__(self, folder: Path, recipe: Path, cache: Path, board: str = BOARD) -> None:
        """``cache`` has stages of others, so that not every one trains the same network."""
        self.profile_file = folder / "board.toml"
        self.profile_file.write_text(board, encoding="utf-8")
        self.profile: DeviceProfile = load_profile(str(self.profile_file))
        self.recipe, self.out = recipe, folder / "out"
        shutil.copytree(cache, self.out / ".cache")
        self.report = exporters.export(self.recipe, [self.profile], self.out, candidates=True)

    def again(self, out: Path, *measured: Path) -> ExportReport:
        return exporters.export(self.recipe, [self.profile], out, cache=self.out / ".cache", measured=measured)

    def bench(self, name: str) -> dict[str, Any]:
        """What ``bench --json`` prints here of a candidate."""
        bundle = self.out / "candidates/board" / name
        done = aios_edge("bench", str(bundle), "--profile", str(self.profile_file), "--duration", "0.2", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture(scope="module")
def first(workshop: Path, fine_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export(tmp_path_factory.mktemp("board"), workshop / "recipe.toml", fine_tuned)


@pytest.fixture(scope="module")
def printed(first: Export) -> dict[str, Any]:
    """What ``bench --json`` prints here of each candidate."""
    return {name: first.bench(name) for name in ("dynamic-s8", "fp32")}


def by_the_board(
    document: dict[str, Any], path: Path, *, p50: float = 0.01, p95: float = 0.012, **changes: Any
) -> Path:
    """A measurement as a board would have printed it: its flag, and the latencies that are asked for."""
    document = json.loads(json.dumps(document))
    document["host"]["cpu_flags"].append("made_up")
    document["latency_s"] = {"p50": p50, "p95": p95, "p99": p95}
    document["rss_bytes"] = 90_000_000
    document["measured_on"]["host"] = "a board"
    path.write_text(json.dumps({**document, **changes}), encoding="utf-8")
    return path


@pytest.fixture
def bench(printed: dict[str, Any], tmp_path: Path) -> Bench:
    def write(name: str, *, file: str | None = None, **changes: Any) -> Path:
        return by_the_board(printed[name], tmp_path / (file or f"{name}.json"), **changes)

    return write


def targets(report: ExportReport) -> dict[str, Any]:
    return {candidate.name: candidate.target for candidate in report.profiles["board"].candidates}


def test_without_a_measurement_preference_decides_and_it_is_said(first: Export) -> None:
    profile = first.report.profiles["board"]
    assert profile.chosen == "dynamic-s8"
    bundle = open_bundle(first.out / "board")
    assert set(bundle.contract.unmeasured) >= {"latency_p95_s", "memory_bytes"} and not bundle.contract.measured
    assert bundle.manifest.session.intra_op_threads is None  # nothing was measured there: the profile's number
    assert bundle.manifest.purpose == "serve"


def test_every_candidate_is_given_out_as_a_bundle_that_says_what_it_is_for(first: Export) -> None:
    for candidate in first.report.profiles["board"].candidates:
        assert candidate.measuring_bundle == f"candidates/board/{candidate.name}"
        bundle = open_bundle(first.out / candidate.measuring_bundle)
        assert bundle.manifest.purpose == "measure"
        assert bundle.manifest.provenance.candidate == candidate.name
        accuracy = bundle.contract.promise("accuracy")
        assert accuracy is not None and (accuracy.conditions.method or "").startswith("validation split")
        assert candidate.metrics is not None and accuracy.value == candidate.metrics.accuracy
        assert (candidate.test is not None) == candidate.chosen  # the loser never met the test split


def test_an_agent_measures_such_a_bundle_and_does_not_serve_it(first: Export) -> None:
    folder = first.out / "candidates/board/fp32"
    with pytest.raises(ActivationRefused) as refused:
        activate(folder, first.profile, alone=False)
    assert refused.value.promise == "purpose"
    assert "FOR MEASURING ONLY" in aios_edge("bundle", "show", str(folder)).stdout
    shipped = activate(first.out / "board", msgspec.structs.replace(first.profile), alone=False)
    assert "purpose" in [check.name for check in shipped.report.checks]


def test_what_was_measured_on_the_board_decides(first: Export, bench: Bench, tmp_path: Path) -> None:
    slow, quick = bench("dynamic-s8", p50=0.02, p95=0.022), bench("fp32", p50=0.01, p95=0.012)
    report = first.again(tmp_path / "out", slow, quick)
    profile = report.profiles["board"]
    assert profile.chosen == "fp32"
    assert {candidate.name: candidate.reason for candidate in profile.candidates} == {
        "fp32": "keeps accuracy, size, latency and memory, and is the fastest of those measured on the target",
        "dynamic-s8": "is slower than fp32 on the target (0.50x)",
    }
    built = {entry.split("/")[0] for entry in report.stages["built"]}
    assert built == {"evaluate"}  # the new winner's test rows; all else is kept
    found = targets(report)["dynamic-s8"]
    assert (found.p50, found.p95, found.speedup, found.interleaved) == (0.02, 0.022, 0.5, False)
    assert found.measured_on.host == "a board"
    bundle = open_bundle(tmp_path / "out/board")
    observed = bundle.contract.measured["latency_p95_s"]
    assert (observed.value, observed.conditions.host, observed.conditions.method) == (
        0.012,
        "a board",
        "aios-edge bench",
    )
    assert bundle.contract.measured["memory_bytes"].value == 90_000_000
    assert set(bundle.contract.unmeasured) == {"energy_j_per_inference"}
    session = bundle.manifest.session
    assert (session.intra_op_threads, session.inter_op_threads, session.spinning) == (1, 1, False)
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "measured on target: p50 20" in page and "a board" in page
    assert "measured on target, a board" in aios_edge("bundle", "show", str(bundle.path)).stdout


def test_a_candidate_that_was_not_measured_does_not_beat_one_that_was(
    first: Export, bench: Bench, tmp_path: Path
) -> None:
    report = first.again(tmp_path / "out", bench("fp32"))
    assert report.profiles["board"].chosen == "fp32"
    reasons = {candidate.name: candidate.reason for candidate in report.profiles["board"].candidates}
    assert reasons["dynamic-s8"] == "is unmeasured on target, where fp32 was measured and keeps its promises"
    alone = first.again(tmp_path / "alone", bench("dynamic-s8"))
    (chosen,) = (c for c in alone.profiles["board"].candidates if c.chosen)
    assert chosen.name == "dynamic-s8" and chosen.reason.endswith("; fp32 was not measured there")
    assert chosen.target is not None and chosen.target.speedup is None
    late = first.again(tmp_path / "late", bench("dynamic-s8", p50=0.05, p95=0.06))
    assert late.profiles["board"].chosen == "fp32"
    assert "unmeasured on target" in open_bundle(tmp_path / "late/board").contract.unmeasured["latency_p95_s"]


def test_a_comparison_in_turn_is_the_speed_up(
    first: Export, printed: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    fp32 = printed["fp32"]
    twin = {key: fp32[key] for key in ("bundle", "bundle_id", "candidate", "precision", "model_sha256", "latency_s")}
    compared = {**twin, "providers_active": ["CPUExecutionProvider"], "speedup": 3.0, "rounds": 20}
    report = first.again(tmp_path / "out", bench("dynamic-s8", compared=compared, speedup=3.0))
    found = targets(report)["dynamic-s8"]
    assert (found.speedup, found.interleaved) == (3.0, True)
    other = {**compared, "model_sha256": "0" * 64}
    again = targets(first.again(tmp_path / "other", bench("dynamic-s8", compared=other, speedup=3.0)))["dynamic-s8"]
    assert (again.speedup, again.interleaved) == (None, False)  # in turn with a model that isn't ours


@pytest.mark.parametrize(
    ("check", "says", "changes"),
    [
        ("schema", "is no measurement of schema", {"schema": "7.0"}),
        ("schema", "latencies that can't be", {"p50": 0.0}),
        ("schema", "Object missing required field `host`", {"host": None}),
        ("profile", "was measured for profile 'rpi4', this export is for board", {"profile": "rpi4"}),
        (
            "provider",
            "ran on TensorrtExecutionProvider, not on CPU",
            {"providers_active": ["TensorrtExecutionProvider"]},
        ),
        ("candidate", "measures fp16, which is no candidate", {"candidate": "fp16"}),
        ("model_sha256", "measures another fp32 than this export built", {"model_sha256": "0" * 64}),
        ("conditions", "was measured at 4 x 32, 'board' asks for 1 x 32", {"batch": 4}),
    ],
)
def test_a_measurement_of_something_else_is_refused_by_name(
    first: Export, bench: Bench, tmp_path: Path, check: str, says: str, changes: dict[str, Any]
) -> None:
    path = bench("fp32", **changes)
    if changes.get("host", 1) is None:
        document = json.loads(path.read_text())
        del document["host"]
        path.write_text(json.dumps(document))
    with pytest.raises(MeasurementRefused) as refused:
        first.again(tmp_path / "out", path)
    assert (refused.value.check, refused.value.exit_code) == (check, 2)
    assert says in str(refused.value) and "fp32.json" in str(refused.value)
    assert not (tmp_path / "out/board").exists()


def test_a_host_of_another_class_other_options_and_doubles_are_refused(
    first: Export, printed: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    here = tmp_path / "here.json"
    here.write_text(json.dumps(printed["fp32"]), encoding="utf-8")
    threads = bench("fp32", session={**printed["fp32"]["session"], "intra_op_threads": 2}, file="threads.json")
    for paths, check, says in (
        ([here], "host", "not of profile 'board': the CPU lacks made_up"),
        ([threads], "conditions", "was run with intra_op_threads 2, not 1"),
        ([bench("fp32"), bench("fp32", file="twice.json")], "candidate", "and so does fp32.json"),
        ([tmp_path / "none.json"], "schema", "can't be read"),
    ):
        with pytest.raises(MeasurementRefused) as refused:
            first.again(tmp_path / "out", *paths)
        assert refused.value.check == check and says in str(refused.value)


def test_a_pruned_candidate_that_was_given_out_is_chosen_when_it_was_measured(
    first: Export, workshop: Path, tmp_path: Path
) -> None:
    """Also one that wasn't the first choice of its network."""
    recipe = workshop / "pruned.toml"
    pruning = "[prune]\nheads = 2\nffn = 64\n[distill]\nepochs = 2\nlearning_rate = 1e-3\n"
    recipe.write_text((workshop / "recipe.toml").read_text(encoding="utf-8") + pruning, encoding="utf-8")
    given = Export(tmp_path, recipe, first.out / ".cache")
    wide, narrow = (c.name for c in given.report.profiles["board"].candidates if c.structure)
    assert (wide.endswith("+dynamic-s8-e4"), narrow.endswith("+dynamic-s8-e2")) == (True, True)
    report = given.again(tmp_path / "again", by_the_board(given.bench(narrow), tmp_path / "narrow.json"))
    assert report.profiles["board"].chosen == narrow
    assert {stage.split("/")[0] for stage in report.stages["built"]} <= {"evaluate"}


def test_a_pruned_candidate_that_a_host_of_the_class_gave_out_is_known_again(
    first: Export, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chose how far to prune by its own latency, which doesn't count once there are measurements."""

    def is_fast(rung: Structure, shape: Shape, budgets: Budgets, whole: Whole) -> bool:
        return rung.layers == 1 or whole.p95_s is None

    monkeypatch.setattr(trials, "is_fast", is_fast)
    recipe = workshop / "walk.toml"
    more = "[prune]\n[distill]\nepochs = 2\nlearning_rate = 1e-3\n[search]\nstructures = 1\n"
    recipe.write_text((workshop / "recipe.toml").read_text(encoding="utf-8") + more, encoding="utf-8")
    here = BOARD.replace('["made_up"]', "[]").replace("latency_p95_s = 0.040", "latency_p95_s = 10.0")
    given = Export(tmp_path, recipe, first.out / ".cache", here)
    wide, narrow = (c.name for c in given.report.profiles["board"].candidates if c.structure)
    assert wide.startswith("l1-h1-f64-") and narrow.startswith("l1-h1-f64-")
    report = given.again(tmp_path / "again", by_the_board(given.bench(narrow), tmp_path / "narrow.json"))
    assert [name for name, target in targets(report).items() if target] == [narrow]
    assert [c.name for c in report.profiles["board"].candidates if c.structure] == [wide, narrow]
    assert "distill" not in {stage.split("/")[0] for stage in report.stages["built"]}


def test_how_far_to_prune_is_told_from_the_latency_on_the_board(first: Export, workshop: Path, tmp_path: Path) -> None:
    """What was measured of the whole network there says how narrow one of them must be."""
    recipe = workshop / "slow.toml"
    more = "[prune]\n[distill]\nepochs = 1\nlearning_rate = 1e-3\n[search]\nstructures = 1\n"
    recipe.write_text((workshop / "recipe.toml").read_text(encoding="utf-8") + more, encoding="utf-8")
    given = Export(tmp_path, recipe, first.out / ".cache")
    (wide, *_) = (c.structure for c in given.report.profiles["board"].candidates if c.structure)
    path = by_the_board(given.bench("dynamic-s8"), tmp_path / "slow.json", p50=0.3, p95=0.4)
    report = given.again(tmp_path / "again", path)
    (narrow, *_) = (c.structure for c in report.profiles["board"].candidates if c.structure)
    assert wide and narrow and (narrow.layers, narrow.heads, narrow.ffn) < (wide.layers, wide.heads, wide.ffn)


def test_the_command_takes_measurements_and_gives_candidates_out(first: Export, bench: Bench, tmp_path: Path) -> None:
    common = ("export", str(first.recipe), "--profile", str(first.profile_file), "--cache", str(first.out / ".cache"))
    out = tmp_path / "out"
    quick, slow = bench("dynamic-s8", p50=0.005, p95=0.006), bench("fp32")
    done = aios_edge(*common, "--out", str(out), "--candidates", "--measured", str(quick), "--measured", str(slow))
    assert done.returncode == 0, done.stderr
    assert "2.00x on target" in done.stdout
    assert open_bundle(out / "candidates/board/dynamic-s8").manifest.purpose == "measure"
    refused = aios_edge(*common, "--out", str(out), "--measured", str(bench("fp32", model_sha256="0" * 64)))
    assert refused.returncode == 2 and "[model_sha256]" in refused.stderr


def test_a_measuring_bundle_does_not_meet_somebodys_files(first: Export, tmp_path: Path) -> None:
    (tmp_path / "candidates/board/fp32").mkdir(parents=True)
    (tmp_path / "candidates/board/fp32/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="other things in it"):
        exporters.export(first.recipe, [first.profile], tmp_path, cache=first.out / ".cache", candidates=True)
    named = msgspec.structs.replace(first.profile, name="candidates")
    with pytest.raises(UsageError, match="name of the folder"):
        exporters.export(first.recipe, [named], tmp_path / "x", cache=first.out / ".cache", candidates=True)


def test_nor_does_one_of_a_pruned_network_and_that_shows_before_the_training(
    first: Export, workshop: Path, tmp_path: Path
) -> None:
    recipe = workshop / "clash.toml"
    recipe.write_text((workshop / "recipe.toml").read_text(encoding="utf-8") + "[prune]\nheads = 2\n", encoding="utf-8")
    notes = tmp_path / "candidates/board/l2-h2-f128-v50+dynamic-s8-e4/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(UsageError, match="other things in it"):
        exporters.export(recipe, [first.profile], tmp_path, cache=tmp_path / "cache", candidates=True)
    assert not (tmp_path / "cache/finetune").exists()


def test_the_digest_of_a_model_is_the_same_in_cache_and_bundle(first: Export) -> None:
    from aios_edge.measurement import model_of

    digests = {brought.model_digest(folder.parent) for folder in first.out.glob(".cache/quantize/*/model.onnx")}
    for name in ("dynamic-s8", "fp32"):
        assert model_of(open_bundle(first.out / "candidates/board" / name).manifest) in digests
