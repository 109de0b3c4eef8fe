"""Text classification: what the tokenizer is asked, how texts are padded, and what a natural request may hold."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_edge.errors import BundleRefused, RequestError
from aios_edge.golden import read_golden
from aios_edge.manifest import Softmax, TensorSpec, TextInput
from aios_edge.oip.datatypes import Tensor
from aios_edge.tasks import TASKS, Task, task_for
from aios_edge.tasks.text_classification import softmax


@pytest.fixture(scope="module")
def task(tiny_bundle: Any) -> Task:
    return task_for(tiny_bundle.manifest, tiny_bundle.path)


def changed(bundle: Any, **fields: Any) -> Task:
    return task_for(msgspec.structs.replace(bundle.manifest, **fields), bundle.path)


def texts(*items: bytes) -> Tensor:
    array = np.empty(len(items), dtype=np.object_)
    array[:] = items
    return Tensor("BYTES", array)


def test_encoding_gives_the_recorded_tensors(tiny_bundle: Any, task: Task) -> None:
    golden = read_golden(tiny_bundle.file("golden.npz"))
    for index, raw in enumerate(golden.raw):
        encoded = task.encode([raw])
        expected = golden.sample(index)
        assert list(encoded) == [spec.name for spec in tiny_bundle.manifest.inputs]
        for name, array in expected.items():
            assert encoded[name].dtype == np.int64 and encoded[name].tolist() == array.tolist()


def test_a_batch_is_padded_to_its_longest(tiny_bundle: Any, task: Task) -> None:
    batch = task.encode(["good", "the film was good", ""])
    assert batch["input_ids"].shape == (3, 6)
    assert task.lengths(batch) == (3, 6, 2)
    assert batch["input_ids"][0, 3:].tolist() == [tiny_bundle.manifest.preprocess.pad_id] * 3
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0, 0]
    for row, text in enumerate(["good", "the film was good", ""]):
        alone = task.encode([text])["input_ids"][0]
        assert batch["input_ids"][row, : len(alone)].tolist() == alone.tolist()


def test_lengths_without_a_mask(tiny_bundle: Any) -> None:
    ids_only = changed(tiny_bundle, inputs=tiny_bundle.manifest.inputs[:1])
    batch = ids_only.encode(["good", "the film was good"])
    assert list(batch) == ["input_ids"] and ids_only.lengths(batch) == (3, 6)


def test_long_texts_are_cut_and_keep_their_special_tokens(tiny_bundle: Any, task: Task) -> None:
    ids = task.encode(["good " * 500])["input_ids"]
    assert ids.shape == (1, tiny_bundle.manifest.preprocess.max_length)
    assert ids[0, 0] == 2 and ids[0, -1] == 3


def test_pairs(tiny_bundle: Any) -> None:
    types = TensorSpec(name="token_type_ids", datatype="INT64", shape=(-1, -1))
    pairs = changed(
        tiny_bundle,
        preprocess=TextInput(tokenizer="tokenizer.json", max_length=64, pad_id=0, pair=True),
        inputs=(*tiny_bundle.manifest.inputs, types),
    )
    assert pairs.natural_names == ("text", "text_pair")
    assert pairs.raw_tensors({"text_pair": texts(b"bad"), "text": texts(b"good")}) == (("good", "bad"),)
    encoded = pairs.encode([("good", "bad")])
    assert encoded["input_ids"].shape == encoded["token_type_ids"].shape == (1, 5)
    for inputs in ({"text": texts(b"a")}, {"text": texts(b"a", b"b"), "text_pair": texts(b"a")}):
        with pytest.raises(RequestError):
            pairs.raw_tensors(inputs)
    with pytest.raises(RequestError, match="a pair of texts"):
        pairs.encode(["alone"])


def test_natural_tensors(task: Task) -> None:
    assert task.raw_tensors({"input_ids": Tensor("INT64", np.zeros((1, 1), dtype=np.int64))}) is None
    assert task.raw_tensors({"text": texts(b"", "ä".encode())}) == ("", "ä")
    assert task.raw_tensors({"text": texts()}) == ()
    column = texts(b"a", b"b")
    assert task.raw_tensors({"text": Tensor("BYTES", column.array.reshape(2, 1))}) == ("a", "b")


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"text": texts(b"\xff\xfe")}, "element 0 is not UTF-8"),
        ({"text": Tensor("FP32", np.zeros(1, dtype=np.float32))}, "not BYTES"),
        ({"text": Tensor("BYTES", texts(b"a", b"b").array.reshape(1, 2))}, "shape"),
        ({"text": Tensor("BYTES", texts(b"a").array.reshape(()))}, "shape"),
        ({"text": texts(b"a"), "input_ids": texts(b"a")}, "natural input"),
        ({"text_pair": texts(b"a")}, "natural input"),
    ],
)
def test_natural_tensors_that_cannot_be_used(task: Task, inputs: dict[str, Tensor], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        task.raw_tensors(inputs)
    assert caught.value.http_status == 400


def test_predictions_and_their_tensors(task: Task) -> None:
    predictions = task.decode({"logits": np.array([[0.0, 2.0], [3.0, 1.0]], dtype=np.float32)})
    assert [p.label for p in predictions] == ["positive", "negative"]
    assert predictions[0].score == max(predictions[0].probabilities) == pytest.approx(1 / (1 + math.exp(-2)))
    tensors = task.prediction_tensors(predictions)
    assert {name: (t.datatype, t.array.shape) for name, t in tensors.items()} == {
        "label": ("BYTES", (2,)),
        "score": ("FP32", (2,)),
        "probabilities": ("FP32", (2, 2)),
    }
    assert [spec.name for spec in task.natural_outputs] == list(tensors)
    assert tensors["label"].array.tolist() == [b"positive", b"negative"]


def test_temperature_flattens(tiny_bundle: Any, task: Task) -> None:
    logits = {"logits": np.array([[0.0, 2.0]], dtype=np.float32)}
    warm = changed(tiny_bundle, postprocess=Softmax(temperature=2.0))
    assert warm.decode(logits)[0].score == pytest.approx(1 / (1 + math.exp(-1)))
    assert warm.decode(logits)[0].score < task.decode(logits)[0].score


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_no_number_has_no_class(task: Task, value: float) -> None:
    with pytest.raises(BundleRefused, match="NaN"):
        task.decode({"logits": np.array([[0.0, value]])})
    known, unknown = task.decode({"logits": np.array([[0.0, 1.0], [0.0, value]])}, finite=False)
    assert known.label == "positive" and unknown.label == ""
    assert all(math.isnan(number) for number in (unknown.score, *unknown.probabilities))


@pytest.mark.parametrize("outputs", [{}, {"logits": np.zeros((1, 3))}, {"logits": np.zeros(2)}])
def test_an_output_that_contradicts_the_labels_is_the_bundles_fault(task: Task, outputs: Any) -> None:
    with pytest.raises(BundleRefused, match=r"not \[N, 2\]"):
        task.decode(outputs)


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=6))
def test_softmax_never_overflows(logits: list[float]) -> None:
    values = softmax(np.array([logits], dtype=np.float32), 0.1)
    assert np.isfinite(values).all() and values.sum() == pytest.approx(1.0)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=80))
def test_any_text_can_be_encoded(task: Task, text: str) -> None:
    encoded = task.encode([text])
    assert encoded["input_ids"].shape[1] == task.lengths(encoded)[0] >= 2


def test_what_is_no_tokenizer_or_no_known_task_is_refused(tiny_bundle: Any, tmp_path: Any) -> None:
    with pytest.raises(BundleRefused, match=r"\[task\].*unknown"):
        changed(tiny_bundle, task="object-detection")
    with pytest.raises(BundleRefused, match="pixel_values"):
        changed(tiny_bundle, inputs=(TensorSpec(name="pixel_values", datatype="FP32", shape=(-1,)),))
    for content in (b"{}", b"\xff", None):
        if content is not None:
            (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(BundleRefused, match=r"\[tokenizer\]"):
            task_for(tiny_bundle.manifest, tmp_path)
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    assert set(TASKS) == {"text-classification"}


def test_without_tokenizers_the_extra_is_named_and_no_hub_client_is_loaded(tiny_bundle: Any) -> None:
    code = """
import sys
if sys.argv[2] == "without":
    sys.modules["tokenizers"] = None
from aios_edge.bundle.read import open_bundle
from aios_edge.errors import MissingExtra
from aios_edge.tasks import task_for
bundle = open_bundle(sys.argv[1])
try:
    task_for(bundle.manifest, bundle.path).encode(["good"])
except MissingExtra as error:
    print(error)
assert not {"huggingface_hub", "transformers", "torch"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, str(tiny_bundle.path)]
    without = subprocess.run([*command, "without"], capture_output=True, text=True, check=True)
    assert "pip install 'aios-edge[text]'" in without.stdout
    assert subprocess.run([*command, "with"], capture_output=True, text=True, check=True).stdout == ""
