"""What is said of data and model though the export goes on."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from exporters.data import Data, Labelled, TestSplit
from exporters.doubts import of_answers, of_data, of_pruning, permuted
from exporters.plans import Plan
from exporters.structure import Shape, Structure, ladder
from exporters.tokenizer_fit import Coverage
from exporters.variants import Pruning

LABELS = ("a", "b", "c")
KNOWN = Coverage(unknown=0.0, mute=0.0)


def labelled(*labels: int, start: int = 0) -> Labelled:
    return Labelled(texts=tuple(f"text {start + i}" for i in range(len(labels))), labels=labels)


def data(train: Labelled, validation: Labelled) -> Data:
    return Data(
        labels=LABELS, train=train, validation=validation, test=TestSplit(lambda: train), origin="here", dropped=0
    )


def pruning(layers: int, *plans: Plan) -> Pruning:
    shape = Shape(
        whole=Structure(layers=layers, heads=1, ffn=64, vocabulary=3), hidden=16, positions=8, labels=len(LABELS)
    )
    return Pruning(shape=shape, pieces=(0, 1, 2), rungs=ladder(shape, 3), plans=plans)


def test_a_wish_to_prune_that_nothing_comes_of_is_told() -> None:
    fp32 = Plan(name="fp32", precision="fp32")
    said = of_pruning({"a": pruning(1, fp32), "b": pruning(2, fp32), "c": pruning(2)})
    assert said == (
        "[prune] does nothing for a: of layers = 1, heads = 1, ffn = 64 the search takes nothing away",
        "[prune] does nothing for c: nothing that it prefers can be made of a pruned network",
    )


def test_a_model_no_better_than_a_constant_is_told_from_one_that_is() -> None:
    rows = labelled(0, 0, 0, 1, 1, 2)
    found = data(rows, rows)
    (said,) = of_answers("validation", np.array([0, 1, 0, 0, 1, 1]), rows, found)
    assert said == (
        "the fine-tuned model is no better than a constant: it is right on 0.5000 of the validation rows, "
        "always answering 'a' on 0.5000"
    )
    assert of_answers("test", np.array([0, 0, 0, 0, 1, 1]), rows, found) == ()


def test_exchanged_labels_are_named() -> None:
    truth = np.array([0] * 20 + [1] * 20 + [2] * 20)
    rows = labelled(*truth)
    (constant, said) = of_answers("test", np.array([1] * 20 + [0] * 19 + [2] * 21), rows, data(rows, rows))
    assert "no better than a constant" in constant
    assert (
        said
        == "labels look exchanged: on test rows the model answers 'a' for 'b', 'b' for 'a'; check the data's labels"
    )


@given(st.permutations(range(6)), st.integers(6, 30))
def test_any_exchange_is_found_and_only_that(order: list[int], rows: int) -> None:
    truth = np.repeat(np.arange(6), rows)
    means = {answer: label for label, answer in enumerate(order) if answer != label}
    assert permuted(np.array(order)[truth], truth, 6) == means


@given(st.integers(0, 2**32), st.integers(2, 8))
def test_confusion_is_no_exchange(seed: int, classes: int) -> None:
    chance = np.random.default_rng(seed)
    truth = chance.integers(0, classes, 400)
    wrong = chance.random(400) < 0.45
    answer = np.where(wrong, (truth + 1) % classes, truth)
    assert permuted(answer, truth, classes) == {}
    assert permuted(np.zeros_like(truth), truth, classes) == {}


def test_rows_of_training_in_validation_unknown_tokens_and_little_to_calibrate_with() -> None:
    train, few = labelled(*[0, 1] * 20), Labelled(texts=("same",) * 40, labels=(0, 1) * 20)
    apart = labelled(*[0, 1] * 20, start=100)
    eight = [Plan(name="dynamic-s8", precision="dynamic-s8")]
    assert of_data(data(train, apart), eight, KNOWN) == ()
    assert of_data(data(few, apart), [Plan(name="fp32", precision="fp32")], KNOWN) == ()
    assert of_data(data(few, apart), eight, KNOWN) == (
        "8-bit candidates are calibrated with 1 different training texts only",
    )
    shared = labelled(*[0, 1] * 20, start=30)
    said = of_data(data(train, shared), eight, Coverage(unknown=0.25, mute=0.125))
    assert said == (
        "10 of 40 validation rows have a text that is in the training data too",
        "the tokenizer doesn't know 25.0% of the tokens of the validation texts; of 12.5% of the texts it knows none",
    )
