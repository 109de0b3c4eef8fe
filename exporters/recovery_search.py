"""Which hyper-parameters recover a pruned network best: a seeded, resumable search by Optuna on short trainings.

A trial trains a third of the epochs and is judged by its accuracy on validation rows, as epochs and candidates are; the
test split has no part in it. One whose loss is not finite counts as never right, unless it is the first, which has the
recipe's own settings: what was drawn nobody can mend. Up to ten trials are a random search: TPE learns from no fewer.
Trials are kept in a journal beside their results, so a killed search goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from aios_edge.errors import MissingExtra
from exporters.progress import Progress
from exporters.recipe import DistillSection
from exporters.training import LossNotFinite

#: A trial trains the epochs divided by this, at least one.
SHORTER = 3
_JOURNAL, _FOUND = "study.journal", "found.json"
_LOGARITHMIC = {"learning_rate": (1e-4, 1e-3), "temperature": (1.0, 6.0)}
_LINEAR = {"teacher_weight": (0.5, 1.0), "state_weight": (0.0, 40.0)}


class ShortTraining(msgspec.Struct, frozen=True, kw_only=True):
    """One trial: what it trained with, and the accuracy on validation rows of its best epoch. The recovery got the
    hyper-parameters of the one that was ``kept``."""

    epochs: int
    learning_rate: float
    temperature: float
    teacher_weight: float
    state_weight: float
    validation_accuracy: float
    kept: bool = False


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """What a recovery trains with, and the trials that found it, in their order; none where the recipe decides."""

    settings: DistillSection
    trials: tuple[ShortTraining, ...] = ()


#: (hyper-parameters, an empty folder) -> accuracy on validation rows.
Trial = Callable[[DistillSection, Path], float]


def check_available() -> None:
    """Raise :class:`MissingExtra` where Optuna isn't installed; before anything is trained."""
    import importlib.util

    if importlib.util.find_spec("optuna") is None:
        raise MissingExtra("optuna", "search", why="[search] trials")


def search(base: DistillSection, trials: int, run: Trial, work: Path, progress: Progress, *, seed: int) -> Chosen:
    """The best of ``trials`` (the first one is ``base`` itself), with the epochs of ``base``; resumes from ``work``.

    Raises :class:`LossNotFinite` for ``base``.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(work / _JOURNAL)))
    study = optuna.create_study(study_name="recovery", storage=storage, direction="maximize", load_if_exists=True)
    if not study.trials:
        study.enqueue_trial({key: getattr(base, key) for key in (*_LOGARITHMIC, *_LINEAR)})
    for lost in study.get_trials(states=(TrialState.RUNNING,)):  # it was killed: ask the same again
        study.tell(lost.number, state=TrialState.FAIL)
        study.enqueue_trial(lost.params)
    short = msgspec.structs.replace(base, epochs=max(1, base.epochs // SHORTER))
    for number in range(len(study.get_trials(states=(TrialState.COMPLETE,))), trials):
        # A seed for each trial, so that a resumed search asks what an undisturbed one would have asked.
        study.sampler = optuna.samplers.TPESampler(seed=seed + number)
        trial = study.ask()
        folder, why = work / f"trial-{number}", ""
        try:
            accuracy = run(msgspec.structs.replace(short, **_suggested(trial)), folder)
        except LossNotFinite as error:
            if number == 0:
                raise
            accuracy, why = 0.0, f", because {error.what}"
        shutil.rmtree(folder, ignore_errors=True)  # its model is as large as the one that comes after
        study.tell(trial, accuracy)
        progress.message(f"trial {number + 1}/{trials}: validation accuracy {accuracy:.4f}{why}")
    found = Chosen(
        settings=msgspec.structs.replace(base, **study.best_params),
        trials=tuple(
            ShortTraining(
                epochs=short.epochs,
                validation_accuracy=done.value,
                kept=done.number == study.best_trial.number,
                **done.params,
            )
            for done in study.get_trials(states=(TrialState.COMPLETE,))
        ),
    )
    (work / _FOUND).write_bytes(msgspec.json.encode(found))
    return found


def _suggested(trial: Any) -> dict[str, float]:
    found = {key: trial.suggest_float(key, *limits, log=True) for key, limits in _LOGARITHMIC.items()}
    return found | {key: trial.suggest_float(key, *limits) for key, limits in _LINEAR.items()}


def load_found(folder: Path) -> Chosen:
    """What a finished search found."""
    return msgspec.json.decode((folder / _FOUND).read_bytes(), type=Chosen)
