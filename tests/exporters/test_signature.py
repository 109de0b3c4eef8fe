"""Encoders of several families convert with optimum's names and axes or without, and answer as torch does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aios_edge.manifest import Precision
from exporters import convert, graph, ort, quantize
from exporters.plans import Plan
from exporters.quantize import Rows
from exporters.signature import signature_of

pytestmark = pytest.mark.export

LAYERS, WORDS = 2, 60
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,  # so that a mask or a position that is lost shows in the answer
}
KINDS: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "roberta": {**SHAPE, "type_vocab_size": 1},
    "xlm-roberta": {**SHAPE, "type_vocab_size": 1},
    "camembert": {**SHAPE, "type_vocab_size": 1},
    "electra": {**SHAPE, "embedding_size": 32},
    "albert": {**SHAPE, "embedding_size": 32},
    "distilbert": {
        "vocab_size": WORDS,
        "dim": 64,
        "n_layers": LAYERS,
        "n_heads": 4,
        "hidden_dim": 128,
        "initializer_range": 0.2,
    },
}


def encoder(kind: str) -> tuple[Any, tuple[str, ...]]:
    """A random model of the type and the inputs that a device would feed it."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, num_labels=3, **KINDS[kind])
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    types = int(getattr(config, "type_vocab_size", 0))
    return model, ("input_ids", "attention_mask", "token_type_ids")[: 3 if types > 1 else 2]


def padded(model: Any, inputs: tuple[str, ...]) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(5, WORDS, (3, 20))
    mask = np.ones_like(ids)
    mask[0, 9:] = mask[2, 15:] = 0
    ids[mask == 0] = model.config.pad_token_id or 0
    filled = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: filled[name] for name in inputs}


@pytest.mark.parametrize("kind", KINDS)
def test_other_encoders_keep_their_answers(kind: str, tmp_path: Path) -> None:
    """Other lengths and batches than the traced ones, with padding; types that fuse are fused, or conversion fails."""
    import torch

    model, inputs = encoder(kind)
    converted = convert.convert(model, inputs, tmp_path)
    assert converted.signature == "optimum"
    assert converted.fused == (kind in convert.FUSED_TYPES) == (kind not in ("albert", "distilbert"))
    batch = padded(model, inputs)
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.numpy()
    assert np.abs(wanted).max() > 0.05
    for name in convert.GRAPHS:
        if (tmp_path / name).is_file():
            session = ort.Session(tmp_path / name, ort.DEFAULT_SPEC)
            assert session.input_names == inputs and session.output_names == ("logits",)
            assert np.allclose(session.run(batch), wanted, atol=1e-5), name
    if converted.fused:
        assert converted.operators["Attention"] == LAYERS


@pytest.mark.parametrize("precision", ["dynamic-s8", "qdq-u8s8"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_products_of_other_encoders_are_known_by_name_to_the_end(
    kind: str, precision: Precision, tmp_path: Path, token_rows: Callable[[int, int], list[dict[str, np.ndarray]]]
) -> None:
    """Or each would be taken for one that stayed in float."""
    model, inputs = encoder(kind)
    convert.save_converted(convert.convert(model, inputs, tmp_path), tmp_path)
    rows = [{name: row[name] for name in inputs} for row in token_rows(8, 1)]
    plan = Plan(name=precision, precision=precision)
    built = quantize.build(plan, tmp_path, Rows(calibration=rows, trial=rows), tmp_path)
    assert sum(built.operators.get(name, 0) for name in graph._INTEGER) > LAYERS


def test_without_optimum_the_graph_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = encoder("bert")
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    assert convert.convert(model, inputs, tmp_path / "with").signature == "optimum"
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx.model_configs", None)
    assert convert.convert(model, inputs, tmp_path / "without").signature == "torch"
    for name in convert.GRAPHS:
        kinds = [
            [node.op_type for node in graph.load(tmp_path / folder / name).graph.node] for folder in ("with", "without")
        ]
        assert kinds[0] == kinds[1], name


def test_a_type_or_an_input_that_optimum_does_not_know_falls_back() -> None:
    from transformers import BertConfig, RobertaConfig

    config = BertConfig()
    config.model_type = "no-such-type"
    assert signature_of(config, ("input_ids", "attention_mask")).origin == "torch"
    three = ("input_ids", "attention_mask", "token_type_ids")
    found = signature_of(RobertaConfig(), three)  # two, says optimum
    assert found.origin == "torch" and tuple(found.inputs) == three
    assert found.axes["token_type_ids"] == {0: "batch_size", 1: "sequence_length"}
