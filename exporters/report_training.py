"""The report's training curves: the fine-tuning, and the recovery of each pruned network."""

from __future__ import annotations

from collections.abc import Sequence

from exporters.report import ExportReport, Training
from exporters.report_format import folded, percent, table, text
from exporters.report_plots import curve


def training(report: ExportReport) -> str:
    """Fine-tuning first, then the recoveries, each once however many candidates were made of its network."""
    parts = [_finetuning(report)]
    recoveries = {
        c.structure.name: c.recovery
        for profile in report.profiles.values()
        for c in profile.candidates
        if c.structure is not None and c.recovery is not None
    }
    parts += [_recovery(name, recovery) for name, recovery in recoveries.items()]
    return f"<section><h2>Training</h2>{''.join(parts)}</section>"


def _finetuning(report: ExportReport) -> str:
    tuned = report.finetuned
    if not tuned.validation_accuracy:
        return "<p>The source was fine-tuned already.</p>"
    told = (
        f"Method {text(tuned.method)}, {tuned.epochs} epochs, {tuned.trained_parameters:,} trained parameters, "
        f"{text(tuned.precision)}. {_kept(tuned.best_epoch)}"
    )
    return f"<p>{told}</p>{_curves('', tuned.validation_accuracy, tuned.training_loss, tuned.best_epoch)}"


def _recovery(name: str, found: Training) -> str:
    told = (
        f"The pruned network learned the fine-tuned one's answers (distillation): {found.epochs} epochs. "
        f"{_kept(found.best_epoch)} {_trained_with(found)}"
    )
    curves = _curves(f"{name}: ", found.validation_accuracy, found.training_loss, found.best_epoch)
    return f"<h3>Recovery of <code>{text(name)}</code></h3><p>{told}</p>{curves}{_trials(found)}"


def _trained_with(found: Training) -> str:
    had = found.settings
    whose = "as the recipe's <code>[distill]</code> says"
    if found.trials:
        best = f"the best of {len(found.trials)} short trainings"
        whose = f"as in {best} (<code>[search] trials</code>), whatever the recipe's <code>[distill]</code> says"
    return (
        f"Learning rate {had.learning_rate:.3g}, batches of {had.batch_size}, temperature {had.temperature:.3g}, "
        f"teacher_weight {had.teacher_weight:.3g}, state_weight {had.state_weight:.3g}, embeddings "
        f"{'frozen' if had.freeze_embeddings else 'trained along'}: {whose}."
    )


def _trials(found: Training) -> str:
    rows = []
    for number, trial in enumerate(found.trials, start=1):
        mark, kept = (" class='chosen'", "kept") if trial.kept else ("", "")
        figures = (trial.learning_rate, trial.temperature, trial.teacher_weight, trial.state_weight)
        rows.append(
            f"<tr{mark}><td>{number}</td>{''.join(f'<td>{figure:.3g}</td>' for figure in figures)}"
            f"<td>{trial.epochs}</td><td>{percent(trial.validation_accuracy)}</td><td class='text'>{kept}</td></tr>"
        )
    if not rows:
        return ""
    head = ["trial", "learning rate", "temperature", "teacher_weight", "state_weight", "epochs", "accuracy", "|"]
    caption = "Short trainings, judged on validation rows; the first one has the recipe's own"
    return folded("Trials of the recovery", table(head, rows, caption=caption))


def _kept(epoch: int | None) -> str:
    return f"The epoch with the best accuracy on validation was kept: {epoch}."


def _curves(what: str, accuracy: Sequence[float], loss: Sequence[float], best: int | None) -> str:
    drawn = [
        (f"{what}Accuracy on validation rows", "validation accuracy", accuracy, best),
        (f"{what}Mean loss of the training rows", "training loss", loss, None),
    ]
    figures = [
        f"<figure>{curve(values, title=said, y_label=label, best=kept)}<figcaption>{text(said)}</figcaption></figure>"
        if values
        else f"<p class='none'>{text(said)}: not recorded by the version that trained this model.</p>"
        for said, label, values, kept in drawn
    ]
    return f"<div class='plots'>{''.join(figures)}</div>"
