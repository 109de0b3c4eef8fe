"""Fine-tuning: which parameters a method trains, on what, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from aios_edge.errors import RecipeError
from exporters.data import Labelled
from exporters.encode import Encoder
from exporters.label_order import broken_order
from exporters.progress import Progress
from exporters.recipe import FinetuneSection
from exporters.training import Epoch, Examples, Settings, precision, torch_logits, train

#: Where nothing is said. A head alone takes large steps; whole small encoders take 5e-5 to 1e-4.
LEARNING_RATES = {"full": 5e-5, "last-n": 1e-4, "head": 1e-3}


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """What a training did; ``tuned.json`` beside the model. Accuracies are on validation, per epoch; losses are means
    over the training rows while the epoch ran (empty where an earlier version trained)."""

    method: str
    epochs: int
    best_epoch: int | None
    validation_accuracy: tuple[float, ...]
    precision: str
    trained_parameters: int
    training_loss: tuple[float, ...] = ()


def finetune(
    model: Any,
    section: FinetuneSection,
    rows: Labelled,
    validation: Labelled,
    encoder: Encoder,
    work: Path,
    progress: Progress,
) -> Tuned:
    """Train ``model`` and save its best epoch to ``work/model``; resumes from ``work``'s checkpoint.

    Raises :class:`LossNotFinite`, and :class:`PromiseBroken` (``labels``) where training ends with exchanged ones.
    """
    import torch

    settings = Settings(
        epochs=section.epochs,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate or LEARNING_RATES.get(section.method, 0.0),
        seed=section.seed,
        threads=section.threads,
        what="fine-tuning",
        where="[finetune]",
    )
    if section.method == "none":
        model.save_pretrained(work / "model")
        return Tuned(
            method="none", epochs=0, best_epoch=None, validation_accuracy=(), precision="fp32", trained_parameters=0
        )
    trained = _choose_trained(model, section)
    truth = torch.tensor(rows.labels)

    def loss_of(numbers: list[int], output: Any) -> Any:
        return torch.nn.functional.cross_entropy(output.logits.float(), truth[numbers])

    examples = Examples(encoder.samples(rows.texts), rows.labels)
    held_out = Examples(encoder.samples(validation.texts), validation.labels)
    epochs = train(model, trained, settings, examples, held_out, encoder, loss_of, work, progress)
    tuned = tuned_of(section.method, epochs, trained)
    if tuned.best_epoch != tuned.epochs:  # where labels are exchanged, the epoch that has learnt least is kept
        answer = torch_logits(model, held_out.samples, encoder).argmax(axis=1)
        names = [model.config.id2label[number] for number in range(model.config.num_labels)]
        if problem := broken_order(answer, validation.labels, names, where="validation rows, last epoch"):
            raise problem
    return tuned


def tuned_of(method: str, epochs: Sequence[Epoch], trained: list[Any]) -> Tuned:
    """A training as it is reported."""
    return Tuned(
        method=method,
        epochs=len(epochs),
        best_epoch=int(np.argmax([epoch.accuracy for epoch in epochs])) + 1,
        validation_accuracy=tuple(epoch.accuracy for epoch in epochs),
        training_loss=tuple(epoch.loss for epoch in epochs),
        precision=precision(),
        trained_parameters=sum(parameter.numel() for parameter in trained),
    )


def _choose_trained(model: Any, section: FinetuneSection) -> list[Any]:
    """Freeze what the method leaves alone. A pooler belongs to the head: it only exists to feed it."""
    if section.method != "full":
        for parameter in model.base_model.parameters():
            parameter.requires_grad = False
        unfrozen = [model.base_model.pooler] if getattr(model.base_model, "pooler", None) is not None else []
        if section.method == "last-n":
            layers = encoder_layers(model)
            if section.last_n > len(layers):
                what = f"last_n = {section.last_n}, but the model has {len(layers)} layers"
                raise RecipeError(what, where="[finetune]", remedy="Use a smaller last_n, or method full")
            unfrozen += layers[-section.last_n :]
        for module in unfrozen:
            for parameter in module.parameters():
                parameter.requires_grad = True
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def encoder_layers(model: Any) -> list[Any]:
    """The encoder's layers, first to last, as BERT and DistilBERT name them."""
    base = model.base_model
    for path in (("encoder", "layer"), ("transformer", "layer")):
        stack = getattr(getattr(base, path[0], None), path[1], None)
        if stack is not None:
            return list(stack)
    remedy = "Use method full or head"
    raise RecipeError(f"the layers of a {type(base).__name__} aren't known", where="[finetune]", remedy=remedy)


def save_tuned(tuned: Tuned, work: Path) -> None:
    """Write ``tuned.json``."""
    (work / "tuned.json").write_text(json.dumps(msgspec.to_builtins(tuned), indent=2), encoding="utf-8")


def load_tuned(folder: Path) -> Tuned:
    """Read ``tuned.json``."""
    return msgspec.json.decode((folder / "tuned.json").read_bytes(), type=Tuned)
