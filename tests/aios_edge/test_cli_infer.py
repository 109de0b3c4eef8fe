"""``aios-edge infer`` as a process: its output, its inputs and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aios_edge.manifest import TextInput


def run(bundle: Any, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aios_edge.cli.main", "infer", str(getattr(bundle, "path", bundle)), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, encoding="utf-8")


def answers(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_is_one_list_in_the_order_of_the_inputs(tiny_bundle: Any) -> None:
    got = answers(run(tiny_bundle, "a good film", "a bad film", "", "--json"))
    assert [answer["input"] for answer in got] == ["a good film", "a bad film", ""]
    assert [answer["label"] for answer in got[:2]] == ["positive", "negative"]
    for answer in got:
        assert set(answer["probabilities"]) == {"negative", "positive"}
        assert answer["score"] == max(answer["probabilities"].values()) == answer["probabilities"][answer["label"]]


def test_lines_of_standard_input(tiny_bundle: Any) -> None:
    done = run(tiny_bundle, stdin="a good film\nä bad film\n")
    assert done.returncode == 0
    assert [line.split("\t")[::2] for line in done.stdout.splitlines()] == [
        ["positive", "a good film"],
        ["negative", "ä bad film"],
    ]
    assert answers(run(tiny_bundle, "--json")) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.csv", 'id,text\n1,"a good, ""very"" good\nfilm"\n2,a bad film\n'),
        ("in.tsv", 'id\ttext\n1\t"a good, ""very"" good\nfilm"\n2\ta bad film\n'),
        ("in.jsonl", '{"text": "a good, \\"very\\" good\\nfilm"}\n\n{"text": "a bad film", "id": 2}\n'),
    ],
)
def test_tables(tiny_bundle: Any, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    got = answers(run(tiny_bundle, "--file", str(tmp_path / name), "--json"))
    assert [answer["input"] for answer in got] == ['a good, "very" good\nfilm', "a bad film"]


@pytest.mark.parametrize("name", ["in.csv", "in.txt", "stdin"])
def test_a_sentence_with_an_odd_line_separator_stays_one_sentence(tiny_bundle: Any, tmp_path: Path, name: str) -> None:
    sentence = "a good\x85film\u2028with\x0ca plot"
    if name == "stdin":
        got = answers(run(tiny_bundle, "--json", stdin=sentence + "\n"))
    else:
        (tmp_path / name).write_text(
            f"{'text' + chr(10) if name.endswith('csv') else ''}{sentence}\n", encoding="utf-8"
        )
        got = answers(run(tiny_bundle, "--file", str(tmp_path / name), "--json"))
    assert [answer["input"] for answer in got] == [sentence]


def test_text_files_and_columns(tiny_bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("good\nbad\n")
    assert len(answers(run(tiny_bundle, "--file", str(tmp_path / "in.txt"), "--json"))) == 2
    (tmp_path / "in.csv").write_text("review\ngood\n")
    arguments = ("--file", str(tmp_path / "in.csv"), "--json")
    assert answers(run(tiny_bundle, *arguments, "--column", "review"))[0]["input"] == "good"
    refused = run(tiny_bundle, *arguments)
    assert refused.returncode == 1 and "column 'text'" in refused.stderr and "review" in refused.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.csv", "text\na good film\na bad film\n"),
        ("in.tsv", "text\na good film\na bad film\n"),
        ("in.jsonl", '{"text": "a good film"}\n{"text": "a bad film"}\n'),
        ("IN.TXT", "a good film\na bad film\n"),
    ],
)
def test_an_input_that_is_a_file_is_read(tiny_bundle: Any, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    got = answers(run(tiny_bundle, "a fine film", str(tmp_path / name), "--json"))
    assert [answer["input"] for answer in got] == ["a fine film", "a good film", "a bad film"]


def test_columns_of_an_input_that_is_a_file(tiny_bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("review\ngood\n")
    arguments = (str(tmp_path / "in.csv"), "--column", "review", "--json")
    assert [answer["input"] for answer in answers(run(tiny_bundle, *arguments))] == ["good"]


@pytest.mark.parametrize("text", ["we saw nowhere.csv", "good " * 100 + ".txt", "notes.md", "fine...", "good"])
def test_an_input_that_only_looks_like_a_file_is_a_text(tiny_bundle: Any, text: str) -> None:
    assert [answer["input"] for answer in answers(run(tiny_bundle, text, "--json"))] == [text]


@pytest.mark.parametrize("name", ["nofile.csv", "NO.TSV", "a/b.jsonl", "nofile.txt", "cat.jpeg", "x" * 5000 + ".csv"])
@pytest.mark.parametrize("more", [(), ("--column", "review")])
def test_the_mistyped_name_of_a_file_is_not_classified(tiny_bundle: Any, name: str, more: tuple[str, ...]) -> None:
    done = run(tiny_bundle, "a good film", name, *more, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{name}: does not exist. To classify such a word, pipe it" in done.stderr
    assert [answer["input"] for answer in answers(run(tiny_bundle, "--json", stdin=name))] == [name]


@pytest.mark.parametrize("name", ["notes.md", "my notes.docx", "in.npy", "PHOTO.JPG", "README"])
def test_an_input_that_is_a_file_of_another_kind_is_refused(tiny_bundle: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("a good film\n")
    done = run(tiny_bundle, "a good film", str(path), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{path}: is a file" in done.stderr and ".csv, .tsv, .jsonl or .txt" in done.stderr
    assert [answer["input"] for answer in answers(run(tiny_bundle, "--json", stdin=str(path)))] == [str(path)]


def test_an_answer_does_not_depend_on_its_neighbours(tiny_bundle: Any) -> None:
    together = answers(run(tiny_bundle, "a good film", "bad " * 40, "--json"))
    assert together[0] == answers(run(tiny_bundle, "a good film", "--json"))[0]


def test_pairs(make_bundle: Any) -> None:
    text = TextInput(tokenizer="tokenizer.json", max_length=64, pad_id=0, pair=True)
    bundle = make_bundle(preprocess=text)
    got = answers(run(bundle, "good\tgreat", "--json"))
    assert got[0]["input"] == ["good", "great"] and got[0]["label"] == "positive"
    refused = run(bundle, "alone")
    assert refused.returncode == 2 and "tab" in refused.stderr


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("in.npy", b"", 2, ".csv, .tsv, .jsonl or .txt"),
        ("in.csv", b"text\ngood\n\xff\n", 1, "line 3 is not UTF-8"),
        ("in.csv", b'text\n"good\n', 1, "line 2"),
        ("in.jsonl", b'{"text": "good"}\n{"text": 3}\n', 1, "line 2"),
        ("in.jsonl", b"[1]\n", 1, "line 1 is not a JSON object"),
        ("in.jsonl", b"{\n", 1, "line 1 is not JSON"),
        ("in.txt", None, 2, "does not exist"),
    ],
)
def test_files_that_cannot_be_used(
    tiny_bundle: Any, tmp_path: Path, name: str, content: bytes | None, code: int, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run(tiny_bundle, "--file", str(tmp_path / name), "--json")
    assert (done.returncode, done.stdout) == (code, "") and says in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_usage_and_a_damaged_bundle(tiny_bundle: Any, tiny_copy: Path, tmp_path: Path) -> None:
    assert run(tiny_bundle, "good", "--file", "x.txt").returncode == 2
    assert run(tiny_bundle, "good", "--column", "x").returncode == 2
    assert run(tmp_path / "nothing", "good").returncode == 2
    unknown = run(tiny_bundle, "good", "--profile", "x86-gatewy")
    assert unknown.returncode == 2 and "x86-gateway" in unknown.stderr
    with (tiny_copy / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    damaged = run(tiny_copy, "good")
    assert damaged.returncode == 3 and "[digest]" in damaged.stderr and damaged.stdout == ""
    document = json.loads(run(tiny_copy, "good", "--json").stdout)
    assert document["check"] == "digest" and "model.onnx" in document["error"]


def test_a_profile_of_another_machine_is_replaced_and_said(make_bundle: Any) -> None:
    done = run(make_bundle(profile="jetson-orin-nano"), "a good film", "--json")
    assert answers(done)[0]["label"] == "positive"
    assert "jetson-orin-nano" in done.stderr and "one CPU thread" in done.stderr
