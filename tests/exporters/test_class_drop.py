"""A class that is lost is found, and luck is not taken for a loss."""

from __future__ import annotations

import numpy as np
import pytest

from exporters.class_drop import LEVEL, class_drops, class_misses, shared_level, sign_test
from exporters.confusion import MOST_PAIRS, confusion


def answers(truth: np.ndarray, wrong: np.ndarray, classes: int) -> np.ndarray:
    """Logits that are right but for the rows ``wrong``, which get the next label."""
    return np.eye(classes, dtype=np.float32)[np.where(wrong, (truth + 1) % classes, truth)]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"c{index}" for index in range(count))


def test_sign_test_by_hand() -> None:
    assert sign_test(8, 0) == 1 / 256
    assert sign_test(2, 1) == 0.5
    assert sign_test(0, 0) == 1.0


def test_only_classes_that_could_be_significant_share_the_level() -> None:
    assert shared_level([0] * 149 + [9]) == LEVEL  # 150 classes, one of which differs in more than a few rows
    assert shared_level([9, 9, 9]) == LEVEL / 3
    assert shared_level([7, 9, 9]) == LEVEL / 2  # seven of seven are 0.0078: not enough where the level is shared
    assert shared_level([]) == LEVEL


def test_one_ruined_class_of_150_is_named_though_accuracy_stays() -> None:
    truth = np.repeat(np.arange(150), 20)
    right = np.zeros(len(truth), dtype=bool)
    wrong = (truth == 17) & (np.arange(len(truth)) % 20 < 9)
    assert wrong.mean() < 0.01  # within any max_drop
    drops = class_drops(answers(truth, wrong, 150), answers(truth, right, 150), truth, names(150), max_drop=0.01)
    assert [(d.label, d.lost, d.gained, d.rows, d.ruined) for d in drops] == [("c17", 9, 0, 20, True)]
    (miss,) = class_misses(drops, max_drop=0.01)
    assert (miss.promise, miss.reason) == ("class_drop", "loses too much of the class 'c17' (45.0 pt of its 20 rows)")
    assert "c17" in miss.remedy and miss.excess == pytest.approx(0.45 - 0.06)


def test_a_binary_model_that_says_one_label_too_often_is_found() -> None:
    truth = np.arange(1000) % 2
    chance = np.random.default_rng(0)
    before = chance.random(1000) < 0.15
    after = before.copy()
    after[np.flatnonzero((truth == 1) & ~before)[:60]] = True  # 60 positives lost,
    after[np.flatnonzero((truth == 0) & before)[:55]] = False  # 55 negatives gained
    assert after.mean() - before.mean() == pytest.approx(0.005)
    drops = class_drops(answers(truth, after, 2), answers(truth, before, 2), truth, ("bad", "good"), max_drop=0.01)
    assert [(d.label, d.ruined) for d in drops] == [("good", True), ("bad", False)]


def test_a_small_loss_is_no_ruin_however_sure() -> None:
    truth = np.repeat([0, 1], 1000)
    wrong = (truth == 0) & (np.arange(2000) < 50)
    reference = answers(truth, np.zeros(2000, dtype=bool), 2)
    found = class_drops(answers(truth, wrong, 2), reference, truth, names(2), max_drop=0.01)
    assert found[0].p_value < 1e-12 and not found[0].ruined  # 5 pt: a class may lose 6
    assert class_drops(answers(truth, wrong, 2), reference, truth, names(2), max_drop=0.0)[0].ruined is False
    wrong[:70] = True
    assert class_drops(answers(truth, wrong, 2), reference, truth, names(2), max_drop=0.01)[0].ruined


@pytest.mark.parametrize(("classes", "rows", "flips"), [(2, 500, 0.05), (2, 40, 0.1), (150, 20, 0.01), (150, 20, 0.1)])
def test_noise_is_refused_no_more_often_than_the_level_says(classes: int, rows: int, flips: float) -> None:
    """Both models err on as many rows, only not on the same ones."""
    chance = np.random.default_rng(1)
    truth = np.repeat(np.arange(classes), rows)
    trials, refused = 300, 0
    for _ in range(trials):
        before, after = (chance.random(len(truth)) < flips for _ in range(2))
        tables = (answers(truth, wrong, classes) for wrong in (after, before))
        refused += any(d.ruined for d in class_drops(*tables, truth, names(classes), max_drop=0.01))
    assert refused <= 3 * LEVEL * trials


def test_what_is_not_finite_says_nothing_of_classes() -> None:
    logits = np.eye(2, dtype=np.float32)
    assert class_drops(logits * np.nan, logits, (0, 1), ("a", "b"), max_drop=0.01) == ()
    assert class_drops(logits[:, :1], logits, (0, 1), ("a", "b"), max_drop=0.01) == ()


def test_confusion_counts_and_is_bounded() -> None:
    truth = np.array([0, 0, 0, 1, 1, 2])
    own = np.eye(3, dtype=np.float32)[[0, 1, 1, 1, 0, 2]]
    found = confusion("test", own, np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 1, 2]], truth, ("a", "b", "c"))
    assert found.matrix == ((1, 2, 0), (1, 1, 0), (0, 0, 1))
    assert [(p.truth, p.answer, p.rows, p.fp32_rows) for p in found.pairs] == [("a", "b", 2, 1), ("b", "a", 1, 0)]
    assert found.wrong == 3
    many = np.arange(50)
    wide = confusion("test", np.eye(50)[many[::-1]], np.eye(50)[many], many, names(50))
    assert wide.matrix is None and len(wide.pairs) == MOST_PAIRS and wide.wrong == 50
