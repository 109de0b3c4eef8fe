"""Out of memory: really, in a process that may not have more; and by the kernel's hand. Then how much was held."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aios_edge.cli import main as cli
from aios_edge.errors import AiosEdgeError, DataError, RecipeError, ResourceError, RuntimeUnavailable
from aios_edge.manifest import SessionSpec
from exporters import measure, memory, ort
from exporters.cache import StageCache

pytestmark = pytest.mark.export

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

#: The command in a process that gets so many bytes of address space on top of what it has when the training starts.
MORE = 250_000_000
LIMITED = f"""
import resource
import torch, transformers
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
from exporters import progress

stage = progress.LineProgress.stage
def limited(self, name, detail=""):
    stage(self, name, detail)
    if name == "finetune":
        most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + {MORE}
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
progress.LineProgress.stage = limited
from aios_edge.cli.main import main
main()
"""


@pytest.mark.long
def test_a_training_without_memory_says_so_and_what_needs_less(workshop: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(workshop, tmp_path / "workshop"))
    recipe = (folder / "recipe.toml").read_text(encoding="utf-8").replace("batch_size = 32", "batch_size = 1000")
    (folder / "recipe.toml").write_text(recipe.replace("max_length = 32", "max_length = 128"), encoding="utf-8")
    header, *rows = (folder / "train.csv").read_text(encoding="utf-8").splitlines()
    (folder / "train.csv").write_text("\n".join([header, *(" the" * 110 + row for row in rows)]), encoding="utf-8")
    command = ("export", str(folder / "recipe.toml"), "--profile", "rpi5", "--out", str(folder / "out"))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("aios-edge: "))
    assert re.search(r"stage finetune: out of memory; it asked for \d+ MB more, and had held \d+ MB at most", line)
    assert "Lower batch_size or max_length" in line and "finished stages are kept" in line
    assert [path.name for path in (folder / "out").iterdir()] == [".cache"]


def by_numpy(_: Path) -> None:
    np.empty(10**15)


def by_torch(_: Path) -> None:
    import torch

    torch.empty(10**13)


def by_onnxruntime(work: Path) -> None:
    """A graph that wants 40 TB."""
    import onnx
    from onnx import TensorProto, helper

    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [10**7, 10**6])
    node = helper.make_node("Expand", ["x", "shape"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])
    found = helper.make_model(helper.make_graph([node], "g", [x], [y], [shape]), ir_version=9)
    found.opset_import[0].version = 17
    onnx.save(found, str(work / "huge.onnx"))
    ort.Session(work / "huge.onnx", ort.DEFAULT_SPEC).run({"x": np.ones((1, 1), dtype=np.float32)})


def wrapped(_: Path) -> None:
    try:
        np.empty(10**15)
    except MemoryError as error:
        raise RecipeError("can't be loaded", where="tiny") from error


@pytest.mark.parametrize("build", [by_numpy, by_torch, by_onnxruntime, wrapped])
def test_each_library_that_has_no_memory_is_understood(tmp_path: Path, build: Callable[[Path], None]) -> None:
    with pytest.raises(
        ResourceError, match=r"stage convert: out of memory; it .*had held \d+ MB at most.*a machine with"
    ):
        StageCache(tmp_path).produce("convert", {}, build)


@pytest.mark.parametrize(
    ("stage", "less"),
    [
        ("distill", "Lower batch_size in [distill], or max_length in [finetune], then run"),
        ("search", "Lower batch_size in [distill], or max_length in [finetune], or set trials = 0 in [search], then"),
        ("importance", "Lower max_length in [finetune], or take a source model whose layers are narrower, then run"),
        ("convert", "Close other programs, or export on a machine with more memory, then run"),
    ],
)
def test_each_stage_says_what_makes_it_need_less(tmp_path: Path, stage: str, less: str) -> None:
    with pytest.raises(ResourceError, match=re.escape(less)):
        StageCache(tmp_path).produce(stage, {}, by_numpy)


def test_other_errors_of_a_stage_are_ours_too_and_their_traceback_is_kept(tmp_path: Path) -> None:
    def dies(_: Path) -> None:
        raise IndexError("list index out of range")

    def refuses(_: Path) -> None:
        raise DataError("is empty", where="train.csv")

    with pytest.raises(
        AiosEdgeError, match=r"stage verify: ended with IndexError \(list index out of range\)"
    ) as caught:
        StageCache(tmp_path).produce("verify", {}, dies)
    kept = Path(str(caught.value.remedy).removeprefix("Please report it with "))
    assert "in dies" in kept.read_text(encoding="utf-8")
    with pytest.raises(DataError):
        StageCache(tmp_path).produce("verify", {}, refuses)
    whole = StageCache(tmp_path).produce("verify", {}, lambda work: None)
    assert [path.name for path in whole.iterdir()] == ["seal.json"]


def test_a_command_without_memory_outside_of_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path
) -> None:
    from exporters import pipeline

    monkeypatch.setattr(pipeline, "load_data", lambda recipe: np.empty(10**15))
    argv = ["aios-edge", "export", str(workshop / "recipe.toml"), "--profile", "rpi5", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "aios-edge: export: out of memory; it asked for" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        ("kill -9 $$", ResourceError, "raw.onnx was killed, as the kernel does when memory runs out"),
        ("echo 'MemoryError: std::bad_alloc' >&2; exit 1", ResourceError, "out of memory"),
        ("kill -SEGV $$", RuntimeUnavailable, "ended by SIGSEGV"),
        ("echo 'ValueError: no' >&2; exit 1", RuntimeUnavailable, "ValueError: no"),
    ],
)
def test_a_process_that_weighs_a_model_and_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: type[AiosEdgeError], said: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(kind, match=said):
        measure.weigh(tmp_path / "raw.onnx", SessionSpec(), 32)


def test_the_peak_of_a_process_is_its_own_and_not_that_of_who_started_it() -> None:
    """The kernel's ru_maxrss is inherited over exec; a small child of a large process would be as large."""
    script = "from exporters.memory import peak_rss_bytes; print(peak_rss_bytes())"
    held = np.ones(50_000_000)
    child = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert 1e6 < int(child.stdout) < 100e6 < held.nbytes < memory.peak_rss_bytes()
    assert memory.peak_rss_bytes(Path("/nowhere")) > held.nbytes  # the kernel's, where there is no /proc
