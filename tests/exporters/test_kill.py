"""SIGKILL at every stage: nothing half-written is taken for a result, and the same command ends with the same bundles.

The profiles are not of the class of a machine that runs tests, so no clock has a say in what ships.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aios_edge.bundle.read import open_bundle

pytestmark = [pytest.mark.export, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PROFILES = ("rpi5", "jetson-orin-nano")
#: Of a network that is pruned out of the fine-tuned one, whose stages are whole by then.
PRUNED_STAGES = ("own tokenizer", "importance", "recovery", "recovered")
PRUNED_RECIPE = """
[model]
source = "spelling"
[data]
train = "train.csv"
validation = "val.csv"
test = "test.csv"
[finetune]
epochs = 3
learning_rate = 0.002
max_length = 64
threads = 1
[accuracy]
max_drop = 0.05
[search]
exhaustive = false
[prune]
vocabulary = 98
heads = 2
ffn = 64
[distill]
epochs = 2
learning_rate = 1e-3
freeze_embeddings = false
"""
STAGES = ("source", "epoch", "best", "convert", "quantize", "evaluate", "measure", "test", "bundle", "second", "report")

#: Reads a line each with a stage to be killed at and the arguments of the command; answers with how it ended. Heavy
#: imports are made once, and every command is a process of its own.
ZYGOTE = """
import json, os, signal, sys, traceback
import onnx, onnxruntime, onnxruntime.quantization, onnxruntime.transformers.optimizer, torch, transformers
from onnxruntime.transformers import float16
from transformers import AutoModelForSequenceClassification
import aios_edge.bundle.write, exporters.pipeline
from aios_edge.cli.main import main
from exporters import distill, evaluate, graph, measure, ort, progress, prune, report_page, ship, source, training
from exporters import vocabulary

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(owner, name, call=1, *, after=False):
    real, calls = getattr(owner, name), []
    def patched(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            die()
        found = real(*args, **kwargs)
        if len(calls) == call:
            die()
        return found
    setattr(owner, name, patched)

def within(owner, name, hook):
    real = getattr(owner, name)
    def patched(*args, **kwargs):
        hook()
        return real(*args, **kwargs)
    setattr(owner, name, patched)

HOOKS = {
    "none": lambda: None,
    "source": lambda: at_call(source, "tokenizer_json"),
    "epoch": lambda: at_call(progress.LineProgress, "update", 25),             # of 19 steps an epoch
    "best": lambda: at_call(training, "_save_checkpoint"),                     # the model is saved, its epoch not
    "convert": lambda: at_call(ort, "fuse_bert", after=True),
    "quantize": lambda: at_call(graph, "save", after=True),
    "evaluate": lambda: at_call(evaluate, "answers", after=True),
    "measure": lambda: at_call(measure, "weigh"),
    "test": lambda: at_call(ship, "quality"),
    "bundle": lambda: at_call(aios_edge.bundle.write, "open_bundle"),          # whole, but not in its place
    "second": lambda: at_call(aios_edge.bundle.write, "write_file", 4 + 1 + 3),  # in the middle of the second bundle
    "report": lambda: at_call(report_page, "page"),
    "own tokenizer": lambda: at_call(vocabulary, "reduced", after=True),
    "importance": lambda: at_call(prune.Importance, "save", after=True),
    "recovery": lambda: within(distill, "train", lambda: at_call(training, "_save_checkpoint", 2)),
    "recovered": lambda: at_call(distill, "distill", after=True),
}

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        where = os.open(asked["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(where, 1), os.dup2(where, 2)
        sys.argv = ["aios-edge", *asked["arguments"]]
        code = 99
        try:
            HOOKS[asked["stage"]]()
            main()
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)  # never into the loop, which is the parent's
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Exports:
    """Starts exports of a recipe, each in its own process, killed at a stage or not."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._log = folder, folder / "log.txt"
        self._zygote = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def run(self, out: Path, stage: str = "none", *, recipe: str = "recipe.toml") -> int:
        profiles = PROFILES if recipe == "recipe.toml" else PROFILES[:1]
        arguments = ["export", str(self._folder / recipe), "--profile", ",".join(profiles), "--out", str(out)]
        assert self._zygote.stdin is not None and self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps({"stage": stage, "arguments": arguments, "log": str(self._log)}) + "\n")
        self._zygote.stdin.flush()
        return int(self._zygote.stdout.readline() or "99")

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def end(self) -> None:
        assert self._zygote.stdin is not None
        self._zygote.stdin.close()
        try:
            self._zygote.wait(timeout=60)
        finally:
            self._zygote.kill()


@pytest.fixture(scope="module")
def exports(workshop: Path, spelling: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    folder = Path(shutil.copytree(workshop, tmp_path_factory.mktemp("kill") / "workshop"))
    (folder / "pruned.toml").write_text(PRUNED_RECIPE, encoding="utf-8")
    started = Exports(folder)
    yield started
    started.end()


@pytest.fixture(scope="module")
def undisturbed(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert exports.run(out) == 0, exports.said
    return result(out)


@pytest.fixture(scope="module")
def pruned(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an undisturbed export of a pruned network ended."""
    out = tmp_path_factory.mktemp("pruned")
    assert exports.run(out, recipe="pruned.toml") == 0, exports.said
    assert result(out)["profiles"][PROFILES[0]]["chosen"] == "l2-h2-f64-v98+dynamic-s8-e4"
    return out


def result(out: Path) -> dict[str, Any]:
    """All that an export found out and made, but what a clock or a scale said."""
    report = json.loads((out / "report.json").read_bytes())
    clocked = ("latency", "latency_s", "speedup", "rss_bytes", "max_batch_size", "bundle_size_bytes")
    for profile in report["profiles"].values():
        for candidate in profile["candidates"]:
            for figures in filter(None, (candidate, candidate["pruned"])):
                for name in clocked:
                    figures.pop(name, None)
    for name, profile in report["profiles"].items():
        assert open_bundle(out / name).bundle_id == profile["bundle_id"]
    kept = {name: report[name] for name in ("finetuned", "labels", "profiles", "warnings")}
    return {**kept, "test": report["baseline"]["test"], "parity": report["baseline"]["parity"]}


def visible(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if not path.name.startswith(".")}


def test_killed_at_every_stage_in_turn_an_export_ends_as_if_undisturbed(
    exports: Exports, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    for stage in STAGES:
        assert exports.run(tmp_path, stage) == -signal.SIGKILL, f"{stage}: {exports.said}"
        for name in visible(tmp_path):
            assert stage in ("second", "report") and open_bundle(tmp_path / name)
    assert exports.run(tmp_path) == 0, exports.said
    assert "damaged" not in exports.said
    assert result(tmp_path) == undisturbed
    assert visible(tmp_path) == {*PROFILES, "report.json", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} - visible(tmp_path) == {".cache"}
    assert not list(tmp_path.rglob("*.part"))
    assert exports.run(tmp_path) == 0, exports.said
    assert json.loads((tmp_path / "report.json").read_bytes())["stages"]["built"] == []


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_killed_once_an_export_ends_as_if_undisturbed(
    exports: Exports, undisturbed: dict[str, Any], tmp_path: Path, stage: str
) -> None:
    assert exports.run(tmp_path, stage) == -signal.SIGKILL, exports.said
    assert exports.run(tmp_path) == 0, exports.said
    assert result(tmp_path) == undisturbed
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.long
def test_killed_at_every_stage_of_pruning_in_turn_an_export_ends_as_if_undisturbed(
    exports: Exports, pruned: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer", "finetune"):  # of the whole network; the test above kills these
        shutil.copytree(pruned / ".cache" / name, tmp_path / ".cache" / name)
    own = next(path for path in (tmp_path / ".cache/tokenizer").glob("*/tokenizer.json") if has_pieces(path, 98))
    shutil.rmtree(own.parent)
    for stage in PRUNED_STAGES:
        assert exports.run(tmp_path, stage, recipe="pruned.toml") == -signal.SIGKILL, f"{stage}: {exports.said}"
        assert not visible(tmp_path)
    assert exports.run(tmp_path, recipe="pruned.toml") == 0, exports.said
    assert "damaged" not in exports.said
    assert result(tmp_path) == result(pruned)
    assert not list(tmp_path.rglob("*.part"))
    assert exports.run(tmp_path, recipe="pruned.toml") == 0, exports.said
    assert json.loads((tmp_path / "report.json").read_bytes())["stages"]["built"] == []


@pytest.mark.long
@pytest.mark.parametrize("stage", PRUNED_STAGES)
def test_killed_once_an_export_of_a_pruned_network_ends_as_if_undisturbed(
    exports: Exports, pruned: Path, tmp_path: Path, stage: str
) -> None:
    assert exports.run(tmp_path, stage, recipe="pruned.toml") == -signal.SIGKILL, exports.said
    assert exports.run(tmp_path, recipe="pruned.toml") == 0, exports.said
    assert result(tmp_path) == result(pruned)
    assert not list(tmp_path.rglob("*.part"))


def has_pieces(tokenizer: Path, count: int) -> bool:
    return len(json.loads(tokenizer.read_bytes())["model"]["vocab"]) == count
