"""Pruning: the least important units leave the tensors, the rest stands in for them, and a plain model is left."""

from __future__ import annotations

import copy
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aios_edge.errors import RecipeError
from exporters import convert, prune, training
from exporters.prune import Importance, dispensed_last, most_important, stand_in
from exporters.source import load_torch
from exporters.structure import Structure

pytestmark = pytest.mark.export


@pytest.fixture
def model(workshop: Path) -> Any:
    found = load_torch(workshop / "tiny", labels=("a", "b"))
    for weight in found.parameters():
        weight.data *= 5 if weight.dim() > 1 else 1
    return found


def batches() -> list[tuple[dict[str, Any], Any]]:
    import torch

    random = np.random.default_rng(0)
    found = []
    for _ in range(8):
        ids = random.integers(4, 40, (16, 12))
        mask = np.ones_like(ids)
        mask[::2, 8:] = 0
        inputs = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        found.append((training.tensors(inputs), torch.tensor(random.integers(0, 2, 16))))
    return found


def measured(model: Any) -> Importance:
    import torch

    return prune.importance(model, batches(), torch.nn.functional.cross_entropy)


def logits(model: Any) -> np.ndarray:
    batch = {name: tensor.numpy() for name, tensor in batches()[0][0].items()}
    return training.batch_logits(model, batch)


def test_a_unit_that_gives_nothing_is_the_least_important(model: Any) -> None:
    layers = model.bert.encoder.layer
    layers[0].attention.output.dense.weight.data[:, 16:32] = 0  # the second of four heads
    layers[1].output.dense.weight.data[:, 5] = 0
    found = measured(model)
    assert found.heads[0].argmin() == 1 and found.heads[0, 1] == 0
    assert found.neurons[1].argmin() == 5 and found.neurons[1, 5] == 0
    assert found.heads.shape == (2, 4) and found.neurons.shape == (2, 128)


def test_units_that_give_nothing_can_go_without_a_trace(model: Any) -> None:
    for layer in model.bert.encoder.layer:
        layer.attention.output.dense.weight.data[:, 16:32] = 0
        layer.output.dense.weight.data[:, 64:] = 0
    before = logits(model)
    prune.prune(model, Structure(layers=2, heads=3, ffn=64, vocabulary=46), measured(model))
    np.testing.assert_allclose(logits(model), before, atol=2e-3)
    assert model.config.intermediate_size == 64 and prune.heads_kept(model.config) == 3


def test_what_stays_stands_in_for_what_goes(model: Any) -> None:
    before, found = logits(model), measured(model)
    prune.prune(model, small := Structure(layers=2, heads=2, ffn=64, vocabulary=46), found)
    with_it = np.abs(logits(model) - before).mean()
    blind = load_torch_like(model, before)
    joined, neurons = (np.eye(count, dtype=np.float32) for count in (65, 129))
    nothing = Importance(found.heads, found.neurons, [joined] * 2, [neurons] * 2)
    prune.prune(blind, small, nothing)  # moments of units that have nothing in common: weights only fall out
    assert with_it < 0.8 * np.abs(logits(blind) - before).mean()


def load_torch_like(model: Any, _: np.ndarray) -> Any:
    fresh = load_torch(Path(model.name_or_path), labels=("a", "b"))
    for weight in fresh.parameters():
        weight.data *= 5 if weight.dim() > 1 else 1
    fresh.classifier.load_state_dict(model.classifier.state_dict())
    return fresh


def test_what_is_kept_of_the_moments_prunes_the_same_network(model: Any, tmp_path: Path) -> None:
    import torch

    exact: list[np.ndarray] = []
    means = prune._means

    def noted(sums: list[np.ndarray], tokens: float) -> Any:
        exact.append(np.stack(sums) / tokens)
        return means(sums, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune, "_means", noted)
        found = measured(model)
    found.save(tmp_path)
    again = Importance.load(tmp_path)
    for name, kept, wanted in zip(
        ("joined", "neurons"), (again.joined_moments, again.neuron_moments), exact, strict=True
    ):
        assert {entry.dtype for entry in kept} == {np.dtype(np.float32)}, name
        np.testing.assert_allclose(np.stack(kept), wanted, rtol=1e-6, atol=1e-9)
    other = copy.deepcopy(model)
    small = Structure(layers=2, heads=2, ffn=64, vocabulary=46)
    prune.prune(model, small, again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune, "_exact", lambda entry: entry)
        prune.prune(other, small, Importance(found.heads, found.neurons, *exact))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)


def test_moments_of_all_layers_are_held_once() -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=46, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=512
    )
    wide = BertForSequenceClassification(config)
    tracemalloc.start()
    try:
        prune.importance(wide, batches()[:2], torch.nn.functional.cross_entropy)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.4 * 4 * 513**2 * 8  # sums in float64, and means in float32 of those that are gone from them


def test_least_squares_find_an_exact_stand_in() -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(500, 3))
    rows = np.concatenate([rows, rows @ random.normal(size=(3, 2)) + 0.5], axis=1)  # two depend on the other three
    weight, bias = random.normal(size=(4, 5)), random.normal(size=4)
    whole = np.concatenate([rows, np.ones((500, 1))], axis=1)
    found, shift = stand_in(weight, bias, whole.T @ whole / 500, [0, 1, 2])
    np.testing.assert_allclose(rows[:, :3] @ found.T + shift, rows @ weight.T + bias, atol=0.02)


def test_what_others_say_as_well_is_dispensed_first() -> None:
    random = np.random.default_rng(2)
    rows = random.normal(size=(800, 6))
    rows[:, 4:] = 3 * rows[:, :2] @ random.normal(size=(2, 2))  # the third part repeats the first, louder
    weight = random.normal(size=(5, 6))
    weight[:, 2:4] *= 0.3  # the second says little, but nobody else says it
    moments = np.concatenate([rows, np.ones((800, 1))], axis=1)
    moments = moments.T @ moments / 800
    assert dispensed_last(weight, moments, 3, 3) == [0, 1, 2]
    assert 1 in dispensed_last(weight, moments, 3, 2)
    assert len(dispensed_last(weight, moments, 3, 1)) == 1


def test_the_most_important_come_in_their_own_order() -> None:
    assert most_important([1.0, 5.0, 3.0, 5.0], 2) == [1, 3]
    assert most_important([2.0, 2.0, 2.0], 2) == [0, 1]


def test_a_pruned_model_is_saved_loaded_and_fused_like_any_other(model: Any, tmp_path: Path) -> None:
    prune.prune(model, Structure(layers=1, heads=2, ffn=64, vocabulary=46), measured(model))
    model.save_pretrained(tmp_path / "model")
    again = load_torch(tmp_path / "model")
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-6)
    facts = convert.convert(again, ("input_ids", "attention_mask", "token_type_ids"), tmp_path)
    assert facts.layers == 1 and facts.operators["Attention"] == 1
    with pytest.raises(RecipeError, match="pruned before"):
        prune.shape_of(again)


def test_an_architecture_without_known_layers_is_refused(model: Any) -> None:
    model.bert.encoder.layer = type(model.bert.encoder.layer)([model.bert.pooler])
    with pytest.raises(RecipeError, match="can't be pruned"):
        prune.shape_of(model)
