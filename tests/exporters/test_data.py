"""Labelled data: every way it can be wrong, and splits that depend on the rows alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_edge.errors import AiosEdgeError, DataError
from aios_edge.golden import MIN_SAMPLES
from exporters.data import TEST_SHARE, VALIDATION_SHARE, Labelled, enough_texts, load_data, split_off, training_leaks
from exporters.read_rows import Columns, Row, read_rows
from exporters.recipe import ExportRecipe, parse_recipe

COLUMNS = Columns(input=("text",), label="label")


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def recipe(folder: Path, **data: object) -> ExportRecipe:
    return parse_recipe({"model": {"source": "m"}, "data": {"train": "train.csv", **data}}, folder=folder)


def held_out(made: ExportRecipe) -> Labelled:
    split = load_data(made).test
    split.release()
    return split.read_once()


def table(count: int, *, start: int = 0) -> str:
    return "text,label\n" + "".join(f"sentence {i},{'ab'[i % 2]}\n" for i in range(start, start + count))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", 'text,label\n"a, b",x\nc,y\n'),
        ("d.tsv", "text\tlabel\na, b\tx\nc\ty\n"),
        ("d.jsonl", '{"text": "a, b", "label": "x"}\n\n{"text": "c", "label": "y"}\n'),
        ("bom.csv", '\ufefftext,label\n"a, b",x\nc,y\n'),
    ],
)
def test_formats_read_alike(tmp_path: Path, name: str, content: str) -> None:
    assert read_rows(write(tmp_path / name, content), COLUMNS).rows == (Row("a, b", "x"), Row("c", "y"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.csv", "txt,label\na,x\n", "did you mean 'txt'? its columns are: txt, label"),
        ("d.csv", "text,label\na,x\n ,y\nb,\n", "2 row(s) have an empty input or label (lines 3, 4)"),
        ("d.csv", "text,label\n", "no rows"),
        ("d.csv", "text,label\na,x\ntoo, many,x\n", "line 3 has more fields than the header"),
        ("d.csv", b"text,label\ngood,x\ncaf\xe9,y\n", "not UTF-8 at byte 21 (line 3)"),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', "line 2 is not JSON"),
        ("d.jsonl", '{"text": "a"}\n', "no column 'label'"),
        ("d.jsonl", "[1]\n", "not a JSON object"),
        ("d.csv", 'text,label\n"open,x\n', "line"),
        ("d.xlsx", "", "unknown format"),
    ],
)
def test_a_bad_file_is_named_with_the_remedy(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path / name, content), COLUMNS)
    assert said in str(caught.value)
    assert name in str(caught.value)
    assert caught.value.exit_code == 1


def test_empty_rows_are_dropped_only_when_asked_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "text,label\na,x\n,y\nb,y\n")
    found = read_rows(path, Columns(input=("text",), label="label", drop_empty=True))
    assert (len(found.rows), found.dropped) == (2, 1)


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,x\nb,x\n")
    with pytest.raises(DataError, match="one class only \\('x', 2 rows\\)"):
        load_data(recipe(tmp_path))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_unseen_in_training_is_refused_before_any_work(tmp_path: Path, split: str) -> None:
    write(tmp_path / "train.csv", table(40))
    write(tmp_path / "other.csv", "text,label\nq,c\nr,a\n")
    with pytest.raises(DataError, match="the label 'c'"):
        load_data(recipe(tmp_path, **{split: "other.csv"}))


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="relative to the recipe"):
        load_data(recipe(tmp_path))


def test_pairs_become_two_texts(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"a": f"p{i}", "b": f"q{i}", "label": i % 2}) for i in range(160))
    write(tmp_path / "train.jsonl", rows)
    data = load_data(
        parse_recipe({"model": {"source": "m"}, "data": {"train": "train.jsonl", "input": ["a", "b"]}}, folder=tmp_path)
    )
    assert data.pair
    assert data.labels == ("0", "1")
    assert all(isinstance(text, tuple) for text in data.train.texts)


def test_the_test_split_can_be_read_once(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", table(100))
    data = load_data(recipe(tmp_path))
    with pytest.raises(AiosEdgeError, match="before the choice"):
        data.test.read_once()
    data.test.release()
    assert data.test.reads == 0
    rows = data.test.read_once()
    assert data.test.reads == 1
    with pytest.raises(AiosEdgeError, match="twice"):
        data.test.read_once()
    texts = [*data.train.texts, *data.validation.texts, *rows.texts]
    assert sorted(texts) == sorted(f"sentence {i}" for i in range(100))
    assert training_leaks(data, rows) == 0


def test_the_order_of_rows_does_not_move_them_between_splits(tmp_path: Path) -> None:
    lines = table(100).splitlines()
    write(tmp_path / "train.csv", "\n".join(lines))
    first = held_out(recipe(tmp_path))
    body = lines[1:]
    random.Random(1).shuffle(body)
    write(tmp_path / "train.csv", "\n".join([lines[0], *body]))
    assert set(held_out(recipe(tmp_path)).texts) == set(first.texts)


def test_leaks_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", table(40))
    write(tmp_path / "test.csv", table(10, start=37))
    write(tmp_path / "val.csv", table(80, start=200))
    data = load_data(recipe(tmp_path, test="test.csv", validation="val.csv"))
    data.test.release()
    assert training_leaks(data, data.test.read_once()) == 3


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.sampled_from("xyz")), min_size=1, max_size=60),
    st.integers(0, 40),
)
def test_a_split_keeps_every_row_and_never_parts_equal_texts(pairs: list[tuple[str, str]], least: int) -> None:
    rows = [Row(text, label) for text, label in pairs]
    kept, held = split_off(rows, 0.3, "test", least=least)
    assert sorted(map(repr, (*kept, *held))) == sorted(map(repr, rows))
    texts = {row.text for row in held}
    assert not {row.text for row in kept} & texts
    own = {row.text: row.label for row in reversed(rows)}  # a text counts for the label it has first
    assert len(texts) >= min(least, len(own) - len(set(own.values())))
    assert {own[row.text] for row in kept} == set(own.values())


@pytest.mark.parametrize("count", [82, 100, 300, 640])
def test_enough_different_rows_are_split_off_for_golden_samples(tmp_path: Path, count: int) -> None:
    write(tmp_path / "train.csv", table(count))
    data = load_data(recipe(tmp_path))
    assert len(set(data.validation.texts)) >= MIN_SAMPLES
    assert not set(data.train.texts) & set(data.validation.texts)
    assert set(data.train.labels) == set(data.validation.labels) == {0, 1}
    assert abs(data.validation.labels.count(0) - data.validation.labels.count(1)) <= 1


def test_rows_that_say_the_same_are_one_golden_sample(tmp_path: Path) -> None:
    doubled = table(200) + "sentence 0,a\nsentence 1,b\n" * 200
    write(tmp_path / "train.csv", doubled)
    assert len(set(load_data(recipe(tmp_path)).validation.texts)) >= MIN_SAMPLES


@pytest.mark.parametrize("count", [40, 81])
def test_too_few_rows_to_hold_golden_samples_out_are_said_before_the_training(tmp_path: Path, count: int) -> None:
    write(tmp_path / "train.csv", table(count))
    with pytest.raises(
        DataError, match=rf"train\.csv: has {count} different texts, too few .* 64 golden samples.*Give more rows \(84 "
    ):
        load_data(recipe(tmp_path))
    write(tmp_path / "test.csv", table(40, start=500))
    write(tmp_path / "train.csv", table(50))
    with pytest.raises(DataError, match=r"has 50 different texts.*Give more rows \(66 "):
        load_data(recipe(tmp_path, test="test.csv"))


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=12), st.booleans())
def test_as_many_texts_as_are_said_to_do_suffice_however_the_labels_are_spread(spread: list[int], split: bool) -> None:
    enough = enough_texts(len(spread), test_is_split_off=split)
    names = [label for label, more in enumerate(spread) for _ in range(1 + more)]
    counts = Counter([*range(len(spread)), *(names * enough)[: enough - len(spread)]])
    rows = [Row(f"{label} {index}", str(label)) for label, count in counts.items() for index in range(count)]
    assert len(rows) == enough
    if split:
        rows = list(split_off(rows, TEST_SHARE, "test")[0])
    held = split_off(rows, VALIDATION_SHARE, "validation", least=MIN_SAMPLES)[1]
    assert len(held) >= MIN_SAMPLES


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_validation_file_with_too_few_different_texts_is_refused(tmp_path: Path, repeats: int) -> None:
    write(tmp_path / "train.csv", table(200))
    rows = table(63, start=500).removeprefix("text,label\n")
    write(tmp_path / "val.csv", "text,label\n" + rows * repeats)
    with pytest.raises(DataError, match=r"val\.csv: has 63 different texts, a bundle takes 64 golden samples"):
        load_data(recipe(tmp_path, validation="val.csv"))
    write(tmp_path / "val.csv", table(64, start=500))
    assert len(load_data(recipe(tmp_path, validation="val.csv")).validation) == 64


def test_an_empty_test_split_is_said_before_the_training(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,x\na,x\nb,y\n")
    write(tmp_path / "val.csv", "text,label\nc,x\nd,y\n")
    with pytest.raises(DataError, match="test split"):
        load_data(recipe(tmp_path, validation="val.csv"))


def test_a_limit_on_rows_keeps_every_class(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", table(100) + "rare,c\n")
    write(tmp_path / "val.csv", table(80, start=200))
    write(tmp_path / "test.csv", table(80, start=400))
    made = parse_recipe(
        {
            "model": {"source": "m"},
            "data": {"train": "train.csv", "validation": "val.csv", "test": "test.csv"},
            "finetune": {"max_rows": 20},
        },
        folder=tmp_path,
    )
    train = load_data(made).train
    assert set(train.labels) == {0, 1, 2}
    assert len(train) <= 21


def test_labels_that_only_look_like_numbers_are_words(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\n" + "".join(f"s {i},{'--1' if i % 2 else '2'}\n" for i in range(160)))
    assert load_data(recipe(tmp_path)).labels == ("--1", "2")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("more.txt", "new one\n\nsentence 1\nnew two\r\nnew one\n"),
        ("more.csv", "id,text\n1,new one\n2,sentence 1\n3,new two\n4,new one\n"),
        ("more.jsonl", '{"text": "new one"}\n{"text": "sentence 1"}\n{"text": "new two"}\n{"text": "new one"}\n'),
    ],
)
def test_unlabelled_texts_are_the_new_ones_each_once(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / "train.csv", table(100))
    write(tmp_path / "test.csv", "text,label\nnew two,a\nold,b\n")
    write(tmp_path / name, content)
    section = {"train": "train.csv", "test": "test.csv", "unlabelled": name}
    data = load_data(parse_recipe({"model": {"source": "m"}, "data": section, "prune": {}}, folder=tmp_path))
    assert data.unlabelled == ("new one", "new two")
    assert f"{name} (2 texts without labels)" in data.origin
    data.test.release()
    assert training_leaks(data, data.test.read_once()) == 1


def test_unlabelled_texts_with_a_wrong_column_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "more.csv", "texts\na\n")
    with pytest.raises(DataError, match="did you mean 'texts'"):
        read_rows(path, Columns(input=("text",), label=None))
    with pytest.raises(DataError, match=r"1 row\(s\) have an empty input \(lines 3\)"):
        read_rows(write(tmp_path / "gap.csv", 'text\na\n""\n'), Columns(input=("text",), label=None))
    with pytest.raises(DataError, match="unknown format"):
        read_rows(write(tmp_path / "rows.txt", "a\n"), COLUMNS)


@pytest.mark.parametrize(("one", "other"), [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_two_splits_from_one_file_are_refused(tmp_path: Path, one: str, other: str) -> None:
    for number, name in enumerate(("train", "validation", "test")):
        write(tmp_path / f"{name}.csv", table(100, start=number * 100))
    write(tmp_path / f"{other}.csv", (tmp_path / f"{one}.csv").read_bytes())
    with pytest.raises(DataError, match=rf"{other}\.csv: {other} has the same rows as {one}.*leave {other} out"):
        load_data(recipe(tmp_path, validation="validation.csv", test="test.csv"))
