"""The groups that harm the answers most are found on training rows and left in float, and no more than needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from exporters import convert, graph, observe, ort, sensitivity
from exporters.equalize import products
from exporters.ranges import Range
from exporters.scheme import Scheme
from exporters.source import load_torch

pytestmark = pytest.mark.export
TokenRows = Callable[[int, int], list[dict[str, np.ndarray]]]
S8 = Scheme(static=True, symmetric=True)


def test_the_most_harmful_comes_first_and_what_is_not_finite_before_it() -> None:
    assert sensitivity.ranked({"a": 1.0, "b": 3.0, "d": float("nan"), "c": 3.0}) == ("d", "b", "c", "a")


def test_a_shift_of_all_logits_is_no_harm() -> None:
    reference = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    assert sensitivity.harm_of(reference, reference + 7) == pytest.approx(0, abs=1e-9)
    assert sensitivity.harm_of(reference, reference * 2) > 0.1
    assert sensitivity.agreement_of(reference, np.full_like(reference, np.nan)) == 0


@pytest.mark.parametrize(
    ("agreements", "kept"),
    [
        ([1.0, 1.0], 0),
        ([0.5, 0.7, 0.995, 1.0], 2),
        ([0.5, 0.9, 0.8, 0.9, 0.7, 1.0], 1),  # none within MOST: the best, and the shortest of the best
        ([0.5, 0.4, 0.3, 0.2, 0.1], 0),
    ],
)
def test_no_more_is_kept_than_the_goal_needs(agreements: list[float], kept: int) -> None:
    order = ("a", "b", "c", "d", "e", "f")
    assert sensitivity.fewest(order, lambda names: agreements[len(names)]) == order[:kept]
    assert sensitivity.fewest(order, lambda names: agreements[len(names)], least=1) == order[: max(1, kept)]


def test_spliced_rows_are_made_of_two_texts(token_rows: TokenRows) -> None:
    rows = token_rows(5, 1)
    made = sensitivity.spliced(rows, 12)
    assert len(made) == 12
    for index, row in enumerate(made):
        ids = row["input_ids"][0].tolist()
        first = rows[index % 5]["input_ids"][0].tolist()
        head = (len(first) + 1) // 2
        assert ids[:head] == first[:head]
        assert any(other["input_ids"][0].tolist()[len(other["input_ids"][0]) // 2 :] == ids[head:] for other in rows)
        assert {array.shape for array in row.values()} == {(1, len(ids))}
    assert len({row["input_ids"].tobytes() for row in made}) == 12
    (alone,) = sensitivity.spliced(rows[:1], 1)
    assert alone["input_ids"].tolist() == rows[0]["input_ids"].tolist()


def test_a_group_that_ruins_the_answers_stays_in_float(workshop: Path, token_rows: TokenRows, tmp_path: Path) -> None:
    tiny = load_torch(workshop / "tiny", labels=("negative", "positive"))
    for weight in tiny.parameters():
        weight.data *= 4 if weight.dim() > 1 else 1  # else all texts get about the same answer
    convert.convert(tiny, ("input_ids", "attention_mask", "token_type_ids"), tmp_path)
    model, rows = graph.load(tmp_path / convert.STANDARD), token_rows(24, 1)
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("classifier.bias"))
    typical = np.median(ort.answers(model, rows), axis=0)
    bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) - typical).astype(np.float32), bias.name))
    found = observe.ranges_of(model, rows, S8)
    assert found.keys() == products(model).keys()
    ruined = list(found)[2]
    found[ruined] = Range(low=-1e4, high=1e4, method="wrong")
    before = model.SerializeToString()
    kept = sensitivity.most_harmful(model, found, S8, rows)
    assert kept and kept[0] == ruined and len(kept) <= sensitivity.MOST
    assert model.SerializeToString() == before
