"""Labels that are exchanged, in the middle of whole exports: nothing ships where it can't be luck."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

import exporters
from aios_edge.cli.main import main
from aios_edge.errors import PromiseBroken
from exporters import measure, quantize
from exporters.report import ExportReport

pytestmark = pytest.mark.export
RPI5 = "rpi5"


def export(desk: Path) -> ExportReport:
    return exporters.export(desk / "recipe.toml", [RPI5], desk / "out", cache=desk / "cache")


def shipped(desk: Path) -> list[str]:
    return [path.name for path in (desk / "out").glob("*") if path.is_dir()]


@pytest.fixture(scope="module")
def finished(workshop: Path, fine_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    desk = Path(shutil.copytree(workshop, tmp_path_factory.mktemp("finished") / "desk"))
    shutil.copytree(fine_tuned, desk / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_BUDGET_S", 0.0)
        export(desk)
    shutil.rmtree(desk / "out")
    return desk


@pytest.fixture
def desk(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workshop and of the stages of its finished export, which a test may spoil."""
    monkeypatch.setattr(measure, "_BUDGET_S", 0.0)  # no figure of a clock matters here
    return Path(shutil.copytree(finished, tmp_path / "desk"))


def exchange_labels(path: Path) -> None:
    other = {"negative": "positive", "positive": "negative"}
    with path.open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *([text, other[label]] for text, label in rows)])


EXCHANGED = "the model answers 'negative' for 'positive', 'positive' for 'negative'"


def test_labels_that_are_exchanged_in_the_test_split(desk: Path) -> None:
    exchange_labels(desk / "test.csv")
    with pytest.raises(PromiseBroken, match=f"test rows: labels are exchanged: {EXCHANGED}") as caught:
        export(desk)
    assert (caught.value.promise, caught.value.exit_code, shipped(desk)) == ("labels", 3, [])
    assert EXCHANGED in json.loads((desk / "out" / "report.json").read_bytes())["error"]
    assert "labels are exchanged" in (desk / "out" / "report.html").read_text(encoding="utf-8")


def test_labels_that_look_exchanged_on_too_few_rows_are_a_warning(desk: Path) -> None:
    path = desk / "test.csv"
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:11]), encoding="utf-8")
    exchange_labels(path)
    constant, exchanged = export(desk).warnings
    assert constant.startswith("the fine-tuned model is no better than a constant: it is right on 0.0")
    assert exchanged.startswith(f"labels look exchanged, which may be luck: on the test split {EXCHANGED}, on 10 of 10")
    assert "labels look exchanged" in (desk / "out" / "report.html").read_text(encoding="utf-8")
    assert shipped(desk) == [RPI5]


def test_labels_that_are_exchanged_in_the_validation_split(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The epoch that learnt least is the best on such rows, and answers all alike; the last one tells."""
    exchange_labels(desk / "val.csv")
    where = ["--profile", RPI5, "--out", str(desk / "out"), "--cache", str(desk / "cache")]
    monkeypatch.setattr(sys, "argv", ["aios-edge", "export", str(desk / "recipe.toml"), *where])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3
    assert f"[labels] validation rows, last epoch: labels are exchanged: {EXCHANGED}" in capsys.readouterr().err
    assert shipped(desk) == []


def test_a_model_that_was_fine_tuned_with_its_labels_in_another_order(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained, and every candidate agrees with it; no candidate is built."""
    shutil.rmtree(desk / "tiny")
    (trained,) = (desk / "cache").glob("finetune/*/model")
    shutil.copytree(trained, desk / "tiny")
    shutil.copy(next((desk / "cache").glob("tokenizer/*/tokenizer.json")), desk / "tiny")
    recipe = desk / "recipe.toml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace('method = "full"', 'method = "none"'), "utf-8")
    path = desk / "tiny/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.setattr(quantize, "build", lambda *_: pytest.fail("a candidate was built"))
    for names in (("positive", "negative"), ("LABEL_0", "LABEL_1")):
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {name: number for number, name in enumerate(names)}
        path.write_text(json.dumps(config), encoding="utf-8")
        if names[0] == "LABEL_0":  # nothing says what they are: the data's, by alphabet
            for name in ("train.csv", "val.csv", "test.csv"):
                exchange_labels(desk / name)
        with pytest.raises(PromiseBroken, match="validation rows: labels are exchanged: the model answers") as caught:
            export(desk)
        assert "'negative' for 'positive'" in str(caught.value) and "on 200 of 200 rows" in str(caught.value)
        assert (caught.value.promise, shipped(desk)) == ("labels", [])
