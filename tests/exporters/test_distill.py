"""Distillation: the student learns its teacher's answers, also of texts without labels, and leaves its tables alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from exporters import distill, training
from exporters.bundle import Identity, draft, text_input
from exporters.data import Labelled
from exporters.distill import NO_LABEL, Teacher
from exporters.encode import Encoder
from exporters.progress import SilentProgress
from exporters.recipe import DistillSection
from exporters.source import load_torch

pytestmark = pytest.mark.export
TEXTS = tuple(f"the film was {word} and {other}" for word in ("great", "dull", "fine", "sad") for other in range(6))
SECTION = DistillSection(epochs=8, learning_rate=1e-3, batch_size=8)


@pytest.fixture
def encoder(workshop: Path) -> Encoder:
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    text = text_input(max_length=32, pad_id=0, pair=False)
    identity = Identity(
        name="t", version="1", task="text-classification", labels=("a", "b"), inputs=inputs, text=text, licence="MIT"
    )
    return Encoder(draft(identity), workshop / "tiny")


def model(workshop: Path) -> Any:
    import torch

    torch.manual_seed(3)
    found = load_torch(workshop / "tiny", labels=("a", "b"))
    for weight in found.parameters():
        weight.data *= 6 if weight.dim() > 1 else 1
    return found


def apart(student: Any, teacher: Any, encoder: Encoder) -> float:
    """Of their answers, in the mean."""
    samples = encoder.samples(TEXTS)
    found = training.torch_logits(student, samples, encoder) - training.torch_logits(teacher, samples, encoder)
    return float(np.abs(found).mean())


def taught(
    workshop: Path, encoder: Encoder, work: Path, section: DistillSection, *, same_pieces: bool = True
) -> tuple[Any, Any, float, float]:
    """Student and teacher, and how far apart they were before and after."""
    teacher, student = model(workshop), model(workshop)
    for layer in student.bert.encoder.layer:
        layer.output.dense.weight.data *= 0.2
    before = apart(student, teacher, encoder)
    rows = Labelled(TEXTS, (NO_LABEL,) * len(TEXTS))
    answers = training.torch_logits(teacher, encoder.samples(TEXTS), encoder).argmax(axis=1)
    held_out = Labelled(TEXTS, tuple(int(answer) for answer in answers))
    told = Teacher(model=teacher, encoder=encoder, layers=(0, 1), same_pieces=same_pieces)
    progress = SilentProgress()
    distill.distill(student, section, told, rows, held_out, encoder, work, progress, seed=0, threads=1)
    return student, teacher, before, apart(student, teacher, encoder)


def table(network: Any) -> Any:
    return network.bert.embeddings.word_embeddings.weight.detach().numpy()


def states_apart(student: Any, teacher: Any, encoder: Encoder) -> tuple[float, float]:
    """Mean squared distance behind the layers: of the first token, and of the others."""
    import torch

    batch = training.tensors(encoder.pad(encoder.samples(TEXTS)))
    mask = batch["attention_mask"].bool()
    mask[:, 0] = False
    student.eval()
    with torch.inference_mode():
        own = student(**batch, output_hidden_states=True).hidden_states[1:]
        told = teacher(**batch, output_hidden_states=True).hidden_states[1:]
    pairs = list(zip(own, told, strict=True))
    first = np.mean([float((a[:, 0] - b[:, 0]).square().mean()) for a, b in pairs])
    return float(first), float(np.mean([float((a[mask] - b[mask]).square().mean()) for a, b in pairs]))


def test_a_student_comes_closer_without_any_label_and_keeps_its_tables(
    workshop: Path, encoder: Encoder, tmp_path: Path
) -> None:
    student, teacher, before, after = taught(workshop, encoder, tmp_path, SECTION)
    assert after < 0.7 * before and np.array_equal(table(student), table(teacher))
    assert not teacher.training


def test_tables_learn_where_the_recipe_says_so(workshop: Path, encoder: Encoder, tmp_path: Path) -> None:
    section = msgspec.structs.replace(SECTION, freeze_embeddings=False)
    student, teacher, _, _ = taught(workshop, encoder, tmp_path, section)
    assert not np.array_equal(table(student), table(teacher))


def test_every_token_is_compared_where_both_read_the_same(workshop: Path, encoder: Encoder, tmp_path: Path) -> None:
    section = msgspec.structs.replace(SECTION, state_weight=5.0, teacher_weight=0.0)
    found = {}
    for same in (True, False):
        student, teacher, _, _ = taught(workshop, encoder, tmp_path / str(same), section, same_pieces=same)
        found[same] = states_apart(student, teacher, encoder)
    assert found[True][1] < 0.7 * found[False][1]  # of the other tokens only who saw them knows
    assert found[False][0] < 1.5 * found[True][0]
