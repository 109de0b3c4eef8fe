"""Which weights a method trains, and what method ``none`` asks of its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aios_edge.errors import DataError, RecipeError
from exporters.bundle import Identity, draft, text_input
from exporters.data import Labelled
from exporters.encode import Encoder
from exporters.finetune import Tuned, finetune, load_tuned
from exporters.progress import SilentProgress
from exporters.recipe import FinetuneSection
from exporters.source import Source, load_torch, own_labels

pytestmark = pytest.mark.export
NAMES = ("negative", "positive")
ROWS = Labelled(texts=("great film", "awful film") * 8, labels=(1, 0) * 8)


def tune(workshop: Path, work: Path, **section: Any) -> tuple[Tuned, set[str]]:
    """What was done, and the names of the parameters that moved."""
    text = text_input(max_length=32, pad_id=0, pair=False)
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    identity = Identity(
        name="n", version="1.0.0", task="text-classification", labels=NAMES, inputs=inputs, text=text, licence="x"
    )
    model = load_torch(workshop / "tiny", labels=NAMES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encoder = Encoder(draft(identity), workshop / "tiny")
    chosen = FinetuneSection(threads=1, epochs=1, batch_size=4, learning_rate=0.01, **section)
    tuned = finetune(model, chosen, ROWS, ROWS, encoder, work, SilentProgress())
    after = load_torch(work / "model").state_dict()
    return tuned, {name for name, value in after.items() if not value.equal(before[name])}


@pytest.mark.parametrize(
    ("section", "moved", "still"),
    [
        ({"method": "head"}, "classifier.", "encoder."),
        ({"method": "last-n", "last_n": 1}, "encoder.layer.1.", "encoder.layer.0."),
        ({"method": "full"}, "embeddings.word_embeddings", "nothing is still"),
        ({"method": "none"}, "", "."),
    ],
)
def test_a_method_trains_what_it_says(
    workshop: Path, tmp_path: Path, section: dict[str, Any], moved: str, still: str
) -> None:
    tuned, changed = tune(workshop, tmp_path, **section)
    assert tuned.method == section["method"]
    assert not [name for name in changed if still in name]
    assert bool(tuned.trained_parameters) == bool(changed) == bool(moved)
    assert not moved or [name for name in changed if moved in name]


def test_more_layers_than_there_are_is_refused(workshop: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the model has 2 layers"):
        tune(workshop, tmp_path, method="last-n", last_n=3)


def source(**config: Any) -> Source:
    return Source(folder=Path(), name="s", digest="", config=config)


def test_method_none_needs_a_trained_head_with_the_same_labels() -> None:
    head = {"architectures": ["BertForSequenceClassification"]}
    assert own_labels(source(**head, id2label={"0": "b", "1": "a"}), ("a", "b")) == ("b", "a")
    assert own_labels(source(**head, id2label={"0": "LABEL_0", "1": "LABEL_1"}), ("a", "b")) == ("a", "b")
    with pytest.raises(DataError, match="are not the model's own x, y"):
        own_labels(source(**head, id2label={"0": "x", "1": "y"}), ("a", "b"))
    with pytest.raises(RecipeError, match="no trained head"):
        own_labels(source(architectures=["BertModel"]), ("a", "b"))


def test_what_an_earlier_version_trained_is_still_read(tmp_path: Path) -> None:
    older = {"method": "full", "epochs": 1, "best_epoch": 1, "validation_accuracy": [0.9], "precision": "fp32"}
    (tmp_path / "tuned.json").write_text(json.dumps({**older, "trained_parameters": 3}))
    assert load_tuned(tmp_path).training_loss == ()
