"""What is said of data and model though the export goes on."""

from __future__ import annotations

import numpy as np

from aios_edge.profile_files import load_profile
from exporters.data import Data, Labelled, TestSplit
from exporters.doubts import of_answers, of_data, of_pruning, of_search
from exporters.plans import Plan
from exporters.recipe import SearchSection
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


def test_a_candidate_that_no_profile_can_run_is_told() -> None:
    search = SearchSection(candidates=("qdq-u8s8", "qdq-s8-sym"))
    cpu, jetson = load_profile("rpi5"), load_profile("jetson-nano")
    (said,) = of_search(search, [jetson])
    assert "qdq-u8s8: no profile here" in said
    assert of_search(search, [jetson, cpu]) == of_search(SearchSection(), [jetson]) == ()


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


def test_labels_that_look_exchanged_on_few_rows_are_named() -> None:
    rows = labelled(*[0] * 6 + [1] * 7 + [2] * 20)
    constant, said = of_answers("test", np.array([1] * 6 + [0] * 7 + [2] * 20), rows, data(rows, rows))
    assert "no better than a constant" in constant
    assert said == (
        "labels look exchanged, which may be luck: on the test split the model answers "
        "'a' for 'b', 'b' for 'a', on 13 of 13 rows with these answers"
    )
    rows = labelled(*[0] * 7 + [1] * 7 + [2] * 20)  # no luck: that is refused, not warned of
    assert of_answers("test", np.array([1] * 7 + [0] * 7 + [2] * 20), rows, data(rows, rows)) == (
        "the fine-tuned model is no better than a constant: it is right on 0.5882 of the test rows, "
        "always answering 'c' on 0.5882",
    )


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
