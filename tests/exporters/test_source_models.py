"""Source models that are unusual or damaged: each either works or is refused in words, never by a foreign traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import exporters
from aios_edge.bundle.read import open_bundle
from aios_edge.errors import RecipeError
from aios_edge.profile_files import load_profile
from exporters import convert, source
from exporters.recipe import load_recipe

pytestmark = pytest.mark.export
LABELS = ("negative", "positive")


@pytest.fixture
def tiny(workshop: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(workshop / "tiny", tmp_path / "tiny"))


def rename_weights(folder: Path, old: str, new: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    found = load_file(path)
    save_file({name.replace(old, new): tensor for name, tensor in found.items()}, path, metadata={"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_encoder_weights_that_are_not_there_are_never_replaced_by_random_ones(tiny: Path) -> None:
    rename_weights(tiny, "bert.encoder.layer.1", "bert.encoder.layer.7")
    with pytest.raises(RecipeError, match=r"lacks weights of its encoder \(bert\.encoder\.layer\.1"):
        source.load_torch(tiny, labels=LABELS)


def test_encoder_weights_of_another_shape_are_refused(tiny: Path) -> None:
    set_config(tiny, vocab_size=1000)
    with pytest.raises(RecipeError, match="word_embeddings"):
        source.load_torch(tiny, labels=LABELS)


def test_a_head_and_a_pooler_may_be_new_for_fine_tuning_only(tiny: Path) -> None:
    rename_weights(tiny, "classifier", "other")
    rename_weights(tiny, "pooler", "other_pooler")
    source.load_torch(tiny, labels=LABELS)
    source.load_torch(tiny, labels=(*LABELS, "neutral"))
    with pytest.raises(RecipeError, match=r"lacks weights.*classifier"):
        source.load_torch(tiny)


def test_damaged_weights_are_one_clear_error(tiny: Path) -> None:
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RecipeError, match="can't be loaded"):
        source.load_torch(tiny, labels=LABELS)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(workshop: Path, tiny: Path, tmp_path: Path) -> None:
    for name in ("recipe.toml", "train.csv", "val.csv", "test.csv"):
        shutil.copy(workshop / name, tmp_path)
    path = tiny / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    count = len(document["model"]["vocab"])
    document["model"]["vocab"]["unheard"] = count
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"gives ids up to {count}, the model knows {count} tokens"):
        exporters.export(tmp_path / "recipe.toml", [load_profile("cloud-cpu")], tmp_path / "out")


def test_an_encoder_without_gelu_is_not_a_lost_fusion(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_act="relu", **shape)).eval()
    facts = convert.convert(model, ("input_ids", "attention_mask", "token_type_ids"), tmp_path)
    assert facts.operators["Attention"] == 2


def test_a_roberta_of_few_positions_is_exported_whole(workshop: Path, tmp_path: Path) -> None:
    """No token types, positions counted from the padding id, unfused, shorter than the usual shapes to time."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    for name in ("recipe.toml", "train.csv", "val.csv", "test.csv"):
        shutil.copy(workshop / name, tmp_path)
    vocabulary = json.loads((workshop / "tiny/config.json").read_text(encoding="utf-8"))["vocab_size"]
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    config = RobertaConfig(
        vocab_size=vocabulary, max_position_embeddings=26, type_vocab_size=1, pad_token_id=0, **shape
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "tiny")
    shutil.copy(workshop / "tiny/tokenizer.json", tmp_path / "tiny")
    report = exporters.export(load_recipe(tmp_path / "recipe.toml"), [load_profile("rpi5")], tmp_path / "out")
    candidates = report.profiles["rpi5"].candidates
    assert [c.agreement is not None and c.agreement > 0.95 for c in candidates] == [True, True]
    assert candidates[0].operators["DynamicQuantizeMatMul"] >= 4
    assert [(t.batch, t.length) for t in candidates[0].latency] == [(1, 24)]
    assert candidates[0].latency_s is None  # not of 32 tokens, so not measured
    manifest = open_bundle(tmp_path / "out" / "rpi5").manifest
    assert [spec.name for spec in manifest.inputs] == ["input_ids", "attention_mask"]
    assert manifest.preprocess.max_length == 24
