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
from exporters.distill import NO_LABEL, Lesson
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


def apart(student: Any, lesson: Lesson, encoder: Encoder) -> float:
    return float(np.abs(training.torch_logits(student, encoder.samples(TEXTS), encoder) - lesson.logits).mean())


def taught(workshop: Path, encoder: Encoder, work: Path, section: DistillSection) -> tuple[float, float, bool]:
    """How far the student was from its teacher before and after, and whether its tables changed."""
    lesson = distill.ask(model(workshop), encoder.samples(TEXTS), encoder, SilentProgress())
    assert lesson.logits.shape == (len(TEXTS), 2) and lesson.states.shape == (len(TEXTS), 3, 64)
    student = model(workshop)
    for layer in student.bert.encoder.layer:
        layer.output.dense.weight.data *= 0.2
    before, tables = apart(student, lesson, encoder), student.bert.embeddings.word_embeddings.weight.detach().clone()
    rows = Labelled(TEXTS, (NO_LABEL,) * len(TEXTS))
    held_out = Labelled(TEXTS, tuple(int(answer) for answer in lesson.logits.argmax(axis=1)))
    progress = SilentProgress()
    distill.distill(student, section, lesson, (0, 1), rows, held_out, encoder, work, progress, seed=0, threads=1)
    changed = not np.array_equal(student.bert.embeddings.word_embeddings.weight.detach().numpy(), tables.numpy())
    return before, apart(student, lesson, encoder), changed


def test_a_student_comes_closer_without_any_label_and_keeps_its_tables(
    workshop: Path, encoder: Encoder, tmp_path: Path
) -> None:
    before, after, changed = taught(workshop, encoder, tmp_path, SECTION)
    assert after < 0.7 * before and not changed


def test_tables_learn_where_the_recipe_says_so(workshop: Path, encoder: Encoder, tmp_path: Path) -> None:
    section = msgspec.structs.replace(SECTION, freeze_embeddings=False)
    assert taught(workshop, encoder, tmp_path, section)[2]


def test_a_lesson_comes_back_from_disk(workshop: Path, encoder: Encoder, tmp_path: Path) -> None:
    lesson = distill.ask(model(workshop), encoder.samples(TEXTS[:3]), encoder, SilentProgress())
    lesson.save(tmp_path)
    again = Lesson.load(tmp_path)
    np.testing.assert_array_equal(again.logits, lesson.logits)
    np.testing.assert_array_equal(again.states, lesson.states)
