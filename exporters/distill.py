"""Recovery after pruning: the small model learns the answers of the whole one (Hinton et al., "Distilling the Knowledge
in a Neural Network", 2015), and the state of its first token behind each layer (as Sanh et al. do in DistilBERT, 2019).

The first token stands at the same place however a text is cut into pieces, so teacher and student may have different
vocabularies. The teacher answers each row once, before the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.data import Labelled
from exporters.encode import Encoder, Sample
from exporters.finetune import Tuned, tuned_of
from exporters.progress import Progress
from exporters.recipe import DistillSection
from exporters.training import Examples, Settings, by_length, tensors, train

_BATCH = 64
#: Stands for the label of a text that has none: torch's cross-entropy passes over it.
NO_LABEL = -100


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of each row: ``logits`` [N, labels], and ``states`` [N, layers + 1, width] of the first
    token before the first layer and behind each."""

    logits: NDArray[np.float32]
    states: NDArray[np.float16]

    def save(self, folder: Path) -> None:
        """Write ``lesson.npz``."""
        np.savez(folder / "lesson.npz", logits=self.logits, states=self.states)

    @staticmethod
    def load(folder: Path) -> Lesson:
        """Read ``lesson.npz``."""
        with np.load(folder / "lesson.npz", allow_pickle=False) as arrays:
            return Lesson(arrays["logits"], arrays["states"])


def ask(teacher: Any, samples: Sequence[Sample], encoder: Encoder, progress: Progress) -> Lesson:
    """The teacher's answers to all rows."""
    import torch

    teacher.eval()
    logits: list[Any] = [None] * len(samples)
    states: list[Any] = [None] * len(samples)
    done = 0
    for rows in by_length(samples, _BATCH):
        with torch.inference_mode():
            output = teacher(**tensors(encoder.pad([samples[i] for i in rows])), output_hidden_states=True)
        first = torch.stack([state[:, 0] for state in output.hidden_states], dim=1)
        for place, row in enumerate(rows):
            logits[row] = output.logits[place].float().numpy()
            states[row] = first[place].half().numpy()
        done += len(rows)
        progress.update(done, len(samples))
    return Lesson(np.stack(logits), np.stack(states))


def distill(
    student: Any,
    section: DistillSection,
    lesson: Lesson,
    layers: Sequence[int],
    rows: Labelled,
    validation: Labelled,
    encoder: Encoder,
    work: Path,
    progress: Progress,
    *,
    seed: int,
    threads: int | None,
) -> Tuned:
    """Train ``student``, whose layers are the teacher's ``layers``, and save its best epoch to ``work/model``.

    Labels of ``rows`` may be :data:`NO_LABEL`: then the teacher alone says what is right.

    Loss: ``teacher_weight`` x T² KL(teacher ‖ student) at temperature T + the rest x cross-entropy with the truth +
    ``state_weight`` x the mean squared distance of the first token's states. Raises :class:`AiosEdgeError` when it is
    not finite.
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
    wanted = torch.from_numpy(lesson.logits)
    states = torch.from_numpy(lesson.states[:, [0, *(layer + 1 for layer in layers)]])
    student.config.output_hidden_states = section.state_weight > 0

    def loss_of(numbers: list[int], output: Any) -> Any:
        logits = output.logits.float()
        apart = functional.kl_div(
            (logits / heat).log_softmax(-1),
            (wanted[numbers] / heat).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        loss = section.teacher_weight * heat**2 * apart
        known = truth[numbers]
        if (known != NO_LABEL).any():
            loss = loss + (1 - section.teacher_weight) * functional.cross_entropy(logits, known, ignore_index=NO_LABEL)
        if section.state_weight:
            own = torch.stack([state[:, 0] for state in output.hidden_states], dim=1).float()
            loss = loss + section.state_weight * functional.mse_loss(own, states[numbers].float())
        return loss

    if section.freeze_embeddings:
        for parameter in student.base_model.embeddings.parameters():
            parameter.requires_grad = False
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    examples = Examples(encoder.samples(rows.texts), rows.labels)
    held_out = Examples(encoder.samples(validation.texts), validation.labels)
    epochs = train(student, trained, settings, examples, held_out, encoder, loss_of, work, progress)
    return tuned_of("distill", epochs, trained)
