"""The search for a recovery's hyper-parameters: seeded, resumable, never worse than what the recipe says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from aios_edge.errors import MissingExtra
from exporters import recovery_search
from exporters.progress import SilentProgress
from exporters.recipe import DistillSection
from exporters.recovery_search import Chosen
from exporters.training import LossNotFinite

pytestmark = pytest.mark.export
BASE = DistillSection(epochs=6)


class Trainings:
    """Stands for short trainings: what was asked, and an accuracy that has one peak."""

    def __init__(self, *, dies_at: int | None = None, leads_nowhere: tuple[int, ...] = ()) -> None:
        self.asked: list[DistillSection] = []
        self._dies_at, self._leads_nowhere = dies_at, leads_nowhere

    def __call__(self, section: DistillSection, folder: Path) -> float:
        if len(self.asked) == self._dies_at:
            raise KeyboardInterrupt
        self.asked.append(section)
        if len(self.asked) - 1 in self._leads_nowhere:
            folder.mkdir(exist_ok=True)
            (folder / "checkpoint.pt").touch()
            raise LossNotFinite("the loss is nan in epoch 2, batch 1")
        return 1 - abs(section.learning_rate - 6e-4) - 0.1 * abs(section.teacher_weight - 0.7)


def searched(run: Trainings, work: Path, trials: int = 6) -> Chosen:
    work.mkdir(exist_ok=True)
    return recovery_search.search(BASE, trials, run, work, SilentProgress(), seed=3)


def test_the_recipe_s_own_come_first_and_the_best_is_kept(tmp_path: Path) -> None:
    run = Trainings()
    found = searched(run, tmp_path / "a")
    assert len(run.asked) == 6 and all(section.epochs == 2 for section in run.asked)
    first = run.asked[0]
    assert (first.learning_rate, first.teacher_weight) == pytest.approx((BASE.learning_rate, BASE.teacher_weight))
    best = max(run.asked, key=lambda section: Trainings()(section, tmp_path))
    assert found.settings.learning_rate == best.learning_rate and found.settings.epochs == 6
    assert [trial.learning_rate for trial in found.trials] == [section.learning_rate for section in run.asked]
    (kept,) = (trial for trial in found.trials if trial.kept)
    assert kept.learning_rate == best.learning_rate and kept.epochs == 2
    assert kept.validation_accuracy == max(trial.validation_accuracy for trial in found.trials)
    assert recovery_search.load_found(tmp_path / "a") == found


@pytest.mark.parametrize("dies_at", [0, 3])
def test_a_killed_search_goes_on_and_asks_the_same(tmp_path: Path, dies_at: int) -> None:
    whole = Trainings()
    wanted = searched(whole, tmp_path / "whole")
    before, after = Trainings(dies_at=dies_at), Trainings()
    with pytest.raises(KeyboardInterrupt):
        searched(before, tmp_path / "killed")
    assert searched(after, tmp_path / "killed") == wanted
    assert before.asked + after.asked == whole.asked


def test_what_was_drawn_and_leads_nowhere_counts_as_never_right(tmp_path: Path) -> None:
    run = Trainings(leads_nowhere=(2, 3))
    found = searched(run, tmp_path / "a")
    assert len(run.asked) == len(found.trials) == 6
    assert [trial.validation_accuracy == 0 for trial in found.trials] == [at in (2, 3) for at in range(6)]
    assert not found.trials[2].kept and not list((tmp_path / "a").glob("trial-*"))
    before, after = Trainings(leads_nowhere=(2, 3), dies_at=4), Trainings()
    with pytest.raises(KeyboardInterrupt):
        searched(before, tmp_path / "killed")
    assert searched(after, tmp_path / "killed") == found
    assert before.asked + after.asked == run.asked


def test_the_recipe_s_own_settings_must_lead_somewhere(tmp_path: Path) -> None:
    for _ in range(2):  # asked again, it is the same
        run = Trainings(leads_nowhere=(0,))
        with pytest.raises(LossNotFinite):
            searched(run, tmp_path / "a")
        assert run.asked[0].teacher_weight == pytest.approx(BASE.teacher_weight) and len(run.asked) == 1


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"optuna.*aios-edge\[search\]"):
        recovery_search.check_available()
