"""Bad input through the command: one message that says what, where and what to do; the exit code; nothing half-made."""

from __future__ import annotations

import csv
import json
import re
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aios_edge.bundle.read import open_bundle
from aios_edge.cli import main as cli
from aios_edge.host import inspect_host
from exporters.out_folder import alone_in

pytestmark = pytest.mark.export

PROFILE = """
schema = "1.0"
name = "strict"
title = "this machine, with budgets that nothing keeps"
arch = "{arch}"
precision_preference = ["dynamic-s8", "fp32"]
quantization = "dynamic-s8"
[[providers]]
name = "CPUExecutionProvider"
[budgets]
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and its lines on stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        assert "Traceback" not in self.err
        (line,) = (line for line in self.err.splitlines() if line.startswith("aios-edge: "))
        return line


class Bench:
    """A copy of the workshop that a test may spoil, and the command on it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.out, self.model = folder, folder / "out", folder / "tiny"
        self._patch, self._capture = patch, capture

    def export(self, profile: str = "cloud-cpu", *more: str) -> Ended:
        argv = ["export", str(self.folder / "recipe.toml"), "--profile", profile, "--out", str(self.out), *more]
        self._patch.setattr(sys, "argv", ["aios-edge", *argv])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = self._capture.readouterr()
        assert isinstance(stopped.value.code, int)
        return Ended(stopped.value.code, said.out, said.err)

    def refused(self, profile: str = "cloud-cpu", *more: str) -> Ended:
        """The same, having seen that nothing is left but finished stages and what says why."""
        ended = self.export(profile, *more)
        assert ended.code in (1, 2, 3), ended.err
        left = {path.name for path in self.out.iterdir()} if self.out.exists() else set()
        assert left <= {".cache", "report.json", "report.html"}
        return ended

    def tokenizer(self, change: Callable[[dict[str, Any]], object]) -> None:
        change_json(self.model / "tokenizer.json", change)

    def recipe(self, old: str, new: str) -> None:
        path = self.folder / "recipe.toml"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def rows(self, name: str, change: Callable[[int, str], str]) -> None:
        """Change the texts of a file."""
        path = self.folder / name
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([header, *([change(i, text), label] for i, (text, label) in enumerate(rows))])


@pytest.fixture
def bench(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(Path(shutil.copytree(workshop, tmp_path / "workshop")), monkeypatch, capsys)


@pytest.fixture(scope="module")
def finished(workshop: Path, fine_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the stages of the unspoilt workshop for a profile of this machine's class."""
    import exporters
    from aios_edge.profile_files import check_profile

    folder = tmp_path_factory.mktemp("finished")
    profile = folder / "here.toml"
    profile.write_text(PROFILE.format(arch=inspect_host().arch), encoding="utf-8")
    cache = Path(shutil.copytree(fine_tuned, folder / "cache"))
    exporters.export(workshop / "recipe.toml", [check_profile(profile)], folder / "out", cache=cache)
    return cache


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def exchange(words: dict[str, int], one: str, other: str) -> None:
    words[one], words[other] = words[other], words[one]


def flip(path: Path, name: str, value: float) -> None:
    """Put a number into the first place of a tensor, as damage to the file would."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start = json.loads(data[8 : 8 + length])[name]["data_offsets"][0] + 8 + length
    data[start : start + 4] = struct.pack("<f", value)
    path.write_bytes(data)


# Weights


@pytest.mark.parametrize("keep", [0, 7, 200, -1000], ids=["empty", "no header", "half a header", "short"])
def test_truncated_weights(bench: Bench, keep: int) -> None:
    path = bench.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    ended = bench.refused()
    assert ended.code == 2
    assert "tiny: can't be loaded" in ended.message and "fetch it again" in ended.message


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1.7e38])
def test_weights_that_no_training_leaves_behind(bench: Bench, value: float) -> None:
    flip(bench.model / "model.safetensors", "bert.encoder.layer.1.output.dense.weight", value)
    ended = bench.refused()
    assert ended.code == 2
    assert "1 of 8192 weights in bert.encoder.layer.1.output.dense.weight are NaN, infinite" in ended.message
    assert "fetch or save them again" in ended.message


def test_weights_of_another_shape(bench: Bench) -> None:
    change_json(bench.model / "config.json", lambda config: config.update(intermediate_size=256))
    ended = bench.refused()
    assert ended.code == 2
    assert "lacks weights of its encoder" in ended.message and "belong together" in ended.message


# Tokenizer


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: exchange(d["model"]["vocab"], "[PAD]", "the"),
            "'[PAD]' is number 16 of the tokenizer and 0 in",
        ),
        (lambda d: exchange(d["model"]["vocab"], "[CLS]", "the"), "adds '[CLS]' as number 2, its vocabulary has 16"),
        (lambda d: d["model"]["vocab"].pop("[SEP]"), "has no '[SEP]', which the source's files name as its sep_token"),
        (lambda d: d.update(post_processor=None), "doesn't begin a text with '[CLS]', which the classifier reads"),
        (lambda d: d["model"]["vocab"].update({"[PAD]": 999}), "gives ids up to 999, the model knows 50 tokens"),
    ],
    ids=["padding moved", "template of another vocabulary", "token missing", "no template", "too many"],
)
def test_a_tokenizer_of_another_model(bench: Bench, change: Callable[[dict[str, Any]], object], said: str) -> None:
    names = {"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}, "unk_token": "[UNK]", "mask_token": "[MASK]"}
    change_json(bench.model / "special_tokens_map.json", lambda tokens: tokens.update(names))
    bench.tokenizer(change)
    ended = bench.refused()
    assert ended.code == 2
    assert said in ended.message and "the model was trained with" in ended.message


def test_two_vocabularies_in_one_folder(bench: Bench) -> None:
    words = json.loads((bench.model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    ordered = sorted(words, key=words.__getitem__)
    (bench.model / "vocab.txt").write_text("\n".join([*ordered[:4], *reversed(ordered[4:])]), encoding="utf-8")
    ended = bench.refused()
    assert ended.code == 2
    assert "tokenizer.json and vocab.txt differ in 46 of 50 tokens ('##9' is number 49 in one" in ended.message


def test_numbers_of_special_tokens_that_the_source_names(bench: Bench) -> None:
    added = {"added_tokens_decoder": {"7": {"content": "[UNK]"}}, "unk_token": "[UNK]"}
    change_json(bench.model / "tokenizer_config.json", lambda config: config.update(added))
    assert "'[UNK]' is number 1 of the tokenizer and 7 in tokenizer_config.json" in bench.refused().message


def test_texts_in_another_script_say_how_many_are_unknown(bench: Bench) -> None:
    bench.rows("val.csv", lambda i, text: f"прекрасный фильм №{chr(0x430 + i % 32)}{chr(0x430 + i // 32)}")
    ended = bench.refused()
    assert ended.code == 1
    assert "knows no token of 100.0% of the validation texts" in ended.message
    assert "texts in a language that it was made for" in ended.message


def test_a_tokenizer_that_is_not_json(bench: Bench) -> None:
    (bench.model / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "tokenizer.json can't be read" in bench.refused().message


# Calibration


def test_what_calibrates_and_what_is_unknown_is_said_when_it_is_little(bench: Bench) -> None:
    """Two rows train, one of them without a word; a fifth of what is validated on is unknown; labels are exchanged."""
    lines = ["text,label", "\u200b,negative", "great,positive"]
    (bench.folder / "train.csv").write_text("\n".join(lines), encoding="utf-8")
    bench.rows("val.csv", lambda i, text: f"{text} {'ж ' * 5}")
    bench.recipe("epochs = 3", "epochs = 1")
    bench.recipe("[accuracy]", "[search]\nexhaustive = false\n[accuracy]")
    ended = bench.export("rpi5,jetson-orin-nano")
    warnings = json.loads((bench.out / "report.json").read_bytes())["warnings"]
    assert "8-bit candidates are calibrated with 2 different training texts only" in warnings
    assert any(text.startswith("the tokenizer doesn't know ") for text in warnings)
    assert all(f"  warning: {text}" in ended.err for text in warnings)
    assert ended.code in (0, 3), ended.err  # whatever was learnt, nothing ends in a foreign error
    if ended.code == 3:
        assert not (bench.out / "rpi5").exists()


def test_too_few_texts_for_fixed_ranges_cost_that_candidate_only(bench: Bench) -> None:
    """Unless it is the only one that the profile wants."""
    lines = ["text,label", *["awful,negative", "great,positive"] * 20]
    (bench.folder / "train.csv").write_text("\n".join(lines), encoding="utf-8")
    bench.recipe("epochs = 3", "epochs = 1")
    said = (
        "quantize: has 2 different calibration samples, this quantization needs at least 8. "
        "Give more training rows, or prefer dynamic-s8 in the profile"
    )
    alone = PROFILE.replace('["dynamic-s8", "fp32"]', '["qdq-s8-sym"]').format(arch=inspect_host().arch)
    (bench.folder / "alone.toml").write_text(alone, encoding="utf-8")
    ended = bench.refused(str(bench.folder / "alone.toml"))
    assert (ended.code, ended.message) == (1, f"aios-edge: {said}")
    ended = bench.export("jetson-orin-nano")
    assert ended.code == 0, ended.err
    assert open_bundle(bench.out / "jetson-orin-nano").manifest.provenance.candidate == "fp16"
    report = json.loads((bench.out / "report.json").read_bytes())
    found = {entry["name"]: entry for entry in report["profiles"]["jetson-orin-nano"]["candidates"]}
    assert found.keys() == {"fp16", "fp32", "qdq-s8-sym"}
    assert found["qdq-s8-sym"]["reason"] == found["qdq-s8-sym"]["not_measured"] == f"could not be built: {said}"
    assert found["qdq-s8-sym"]["size_bytes"] is None
    assert "could not be built" in (bench.out / "report.html").read_text(encoding="utf-8")


def test_a_pruned_network_is_built_as_what_there_are_texts_enough_for(bench: Bench) -> None:
    lines = ["text,label", *["awful,negative", "great,positive"] * 20]
    (bench.folder / "train.csv").write_text("\n".join(lines), encoding="utf-8")
    bench.recipe("epochs = 3", "epochs = 1")
    bench.recipe("[accuracy]", "[prune]\nheads = 2\n[distill]\nepochs = 1\n[search]\nexhaustive = false\n[accuracy]")
    wanted = PROFILE.replace('["dynamic-s8", "fp32"]', '["qdq-s8-sym", "fp32"]').format(arch="any")
    (bench.folder / "fixed.toml").write_text(wanted, encoding="utf-8")
    ended = bench.export(str(bench.folder / "fixed.toml"))
    assert ended.code in (0, 3), ended.err  # whatever it has learnt
    report = json.loads((bench.out / "report.json").read_bytes())
    names = [entry["name"] for entry in report["profiles"]["strict"]["candidates"]]
    assert names[0].startswith("l2-h2-") and names[0].endswith("+fp32") and names[1:] == ["fp32", "qdq-s8-sym"]


def test_constant_rows_teach_nothing_and_that_is_said(bench: Bench) -> None:
    bench.rows("train.csv", lambda i, text: "the film")
    bench.recipe("epochs = 3", "epochs = 1")
    ended = bench.export("rpi5")
    warnings = json.loads((bench.out / "report.json").read_bytes())["warnings"]
    assert "8-bit candidates are calibrated with 1 different training texts only" in warnings
    (learnt,) = (text for text in warnings if "no better than a constant" in text and "validation" in text)
    assert f"warning: {learnt}" in (ended.out or ended.err)
    assert ended.code in (0, 3), ended.err


# Profiles


@pytest.mark.parametrize(
    ("budgets", "named"),
    [
        ({"bundle_size_bytes": 1000}, ["bundle_size_bytes"]),
        ({"latency_p95_s": 1e-9}, ["latency_p95_s"]),
        ({"memory_bytes": 1000}, ["memory_bytes"]),
        ({"latency_p95_s": 1e-9, "memory_bytes": 1000}, ["latency_p95_s", "memory_bytes"]),
        (
            {"bundle_size_bytes": 1000, "latency_p95_s": 1e-9, "memory_bytes": 1000},
            ["bundle_size_bytes", "latency_p95_s", "memory_bytes"],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_profile_that_nothing_satisfies_is_told_what_would_have_to_give(
    bench: Bench, finished: Path, budgets: dict[str, float], named: list[str]
) -> None:
    profile = bench.folder / "strict.toml"
    text = PROFILE.format(arch=inspect_host().arch) + "".join(f"{key} = {value}\n" for key, value in budgets.items())
    profile.write_text(text, encoding="utf-8")
    ended = bench.refused(str(profile), "--cache", str(finished))
    assert ended.code == 3
    assert "no candidate keeps its promises; the nearest:" in ended.message
    raised = [f"raise budgets.{name} to" for name in named]
    assert [remedy in ended.message for remedy in raised] == [True] * len(named)
    assert json.loads((bench.out / "report.json").read_bytes())["error"] in ended.message
    profile.write_text(_followed(text, ended.message), encoding="utf-8")
    ended = bench.export(str(profile), "--cache", str(finished))
    assert ended.code == 0  # what is proposed suffices
    assert re.search(r"^Took \d+ s, \d+ MB of memory at most$", ended.out, re.MULTILINE)
    assert open_bundle(bench.out / "strict")


def _followed(text: str, message: str) -> str:
    for name, value in re.findall(r"raise budgets\.(\w+) to ([\d.]*\d)", message):
        text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
    return text


# Two at once


def test_two_exports_at_once_into_one_folder(bench: Bench) -> None:
    with alone_in(bench.out):
        ended = bench.refused()
    assert ended.code == 1
    assert "out: another export writes there. Wait until it has ended" in ended.message
    assert not bench.out.exists()  # it was made for the first, who put nothing into it


def test_a_folder_that_cannot_be_made(bench: Bench) -> None:
    bench.out.write_text("a file", encoding="utf-8")
    assert bench.export().code == 2
    assert bench.out.read_text(encoding="utf-8") == "a file"
