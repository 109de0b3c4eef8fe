"""Recovery after pruning: the small model learns the answers of the whole one (Hinton et al., "Distilling the Knowledge
in a Neural Network", 2015), and its states behind each layer (as Jiao et al. do in TinyBERT, 2020).

States are compared token by token. Where teacher and student have different vocabularies and so cut texts differently,
only the first token's are: it stands at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.data import Labelled
from exporters.encode import Encoder
from exporters.finetune import Tuned, tuned_of
from exporters.progress import Progress
from exporters.recipe import DistillSection
from exporters.training import Examples, Settings, arithmetic, tensors, train

#: Stands for the label of a text that has none: torch's cross-entropy passes over it.
NO_LABEL = -100


@dataclass(frozen=True)
class Teacher:
    """The whole network and how it reads texts. ``layers``: which of its layers the student has; ``same_pieces``: the
    student reads texts as the same tokens."""

    model: Any
    encoder: Encoder
    layers: Sequence[int]
    same_pieces: bool


def distill(
    student: Any,
    section: DistillSection,
    teacher: Teacher,
    rows: Labelled,
    validation: Labelled,
    encoder: Encoder,
    work: Path,
    progress: Progress,
    *,
    seed: int,
    threads: int | None,
) -> Tuned:
    """Train ``student`` and save its best epoch to ``work/model``. The teacher answers each batch anew, so that of all
    rows only the encoded samples are held, never the teacher's states.

    Labels of ``rows`` may be :data:`NO_LABEL`: then the teacher alone says what is right.

    Loss: ``teacher_weight`` x T² KL(teacher ‖ student) at temperature T + the rest x cross-entropy with the truth +
    ``state_weight`` x the mean squared distance of states. Raises :class:`LossNotFinite` when it is not finite.
    """
    import torch

    functional = torch.nn.functional
    settings = Settings(
        epochs=section.epochs,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        seed=seed,
        threads=threads,
        what="distillation",
        where="[distill]",
    )
    truth, heat = torch.tensor(rows.labels), section.temperature
    examples = Examples(encoder.samples(rows.texts), rows.labels)
    lessons = examples.samples if teacher.same_pieces else teacher.encoder.samples(rows.texts)
    student.config.output_hidden_states = section.state_weight > 0
    teacher.model.eval()

    def loss_of(numbers: list[int], output: Any) -> Any:
        lesson = tensors(teacher.encoder.pad([lessons[number] for number in numbers]))
        with torch.no_grad(), arithmetic():
            told = teacher.model(**lesson, output_hidden_states=True)
        logits = output.logits.float()
        apart = functional.kl_div(
            (logits / heat).log_softmax(-1),
            (told.logits.float() / heat).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        loss = section.teacher_weight * heat**2 * apart
        known = truth[numbers]
        if (known != NO_LABEL).any():
            loss = loss + (1 - section.teacher_weight) * functional.cross_entropy(logits, known, ignore_index=NO_LABEL)
        if section.state_weight:
            mask = lesson["attention_mask"].bool()
            pairs = zip(
                output.hidden_states[1:], (told.hidden_states[layer + 1] for layer in teacher.layers), strict=True
            )
            distances = [
                functional.mse_loss(own[mask].float(), wanted[mask].float())
                if teacher.same_pieces
                else functional.mse_loss(own[:, 0].float(), wanted[:, 0].float())
                for own, wanted in pairs
            ]
            loss = loss + section.state_weight * torch.stack(distances).mean()
        return loss

    if section.freeze_embeddings:
        for parameter in student.base_model.embeddings.parameters():
            parameter.requires_grad = False
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    held_out = Examples(encoder.samples(validation.texts), validation.labels)
    epochs = train(student, trained, settings, examples, held_out, encoder, loss_of, work, progress)
    return tuned_of("distill", epochs, trained)
