"""A tiny BERT made in code and sentences that it learns in seconds: the whole workshop without a download."""

from __future__ import annotations

import csv
import itertools
import os
import random
import shutil
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

GOOD = ("great", "lovely", "fine", "warm", "bright", "happy")
BAD = ("awful", "dull", "cold", "broken", "sad", "poor")
FILLER = ("the", "film", "was", "a", "story", "and", "very", "plot", "scene", "actor", "ending", "music", "it", "is")

RECIPE = """
[model]
source = "tiny"
task = "text-classification"
[data]
train = "train.csv"
validation = "val.csv"
test = "test.csv"
[finetune]
method = "full"
epochs = 3
learning_rate = 0.002
batch_size = 32
max_length = 32
threads = 1
[accuracy]
max_drop = 0.02
[export]
name = "tiny-mood"
version = "0.1.0"
licence = "Apache-2.0"
"""


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    chance = random.Random(seed)
    rows = []
    for index in range(count):
        label = ("negative", "positive")[index % 2]
        words = chance.choices(FILLER, k=chance.randint(3, 20)) + chance.choices(GOOD if index % 2 else BAD, k=2)
        chance.shuffle(words)
        rows.append((f"{' '.join(words)} {seed} {index}", label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


def make_model(folder: Path, *, layers: int = 2, letters: Sequence[str] = "") -> None:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER, *(str(d) for d in range(10))]
    words += [f"##{d}" for d in range(10)]
    words = list(dict.fromkeys([*words, *letters, *(f"##{letter}" for letter in letters)]))
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(7)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            hidden_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=128,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.toml, the tiny model and its three splits."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "tiny")
    write_csv(folder / "train.csv", sentences(600, 1))
    write_csv(folder / "val.csv", sentences(200, 2))
    write_csv(folder / "test.csv", sentences(200, 3))
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def fine_tuned(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with what every export of the unspoilt workshop begins with, and with no evaluation. It is for copies."""
    import msgspec

    import exporters
    from aios_edge.profile_files import load_profile

    folder = tmp_path_factory.mktemp("fine_tuned")
    fp32 = msgspec.structs.replace(load_profile("x86-vnni"), precision_preference=("fp32",))
    exporters.export(workshop / "recipe.toml", [fp32], folder / "out", cache=folder / "cache")
    shutil.rmtree(folder / "cache" / "evaluate")
    return folder / "cache"


@pytest.fixture(scope="session")
def spelling(workshop: Path) -> None:
    """Beside it the same model with letters in its vocabulary, so that words may leave it."""
    make_model(workshop / "spelling", letters=string.ascii_lowercase)


@pytest.fixture(scope="session")
def lexicon(workshop: Path) -> None:
    """And with many words that no text has, so that their bits matter."""
    twos, threes = (map("".join, itertools.product(string.ascii_lowercase, repeat=count)) for count in (2, 3))
    make_model(workshop / "lexicon", letters=[*string.ascii_lowercase, *twos, *itertools.islice(threes, 1000)])


def make_token_rows(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = chance.integers(4, 40, (1, int(chance.integers(3, 24))))
        made.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    return made


@pytest.fixture(scope="session")
def token_rows() -> Callable[[int, int], list[dict[str, np.ndarray]]]:
    """``token_rows(count, seed)``: single texts of many lengths, encoded for the tiny model."""
    return make_token_rows


@pytest.fixture(scope="session")
def converted(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a channel that reaches further than the others and that its readers weigh less, as in real ones."""
    from exporters import convert
    from exporters.source import load_torch

    model = load_torch(workshop / "tiny", labels=("negative", "positive"))
    for name, weight in model.named_parameters():
        weight.data *= 6 if weight.dim() > 1 else 1
        if name.endswith("LayerNorm.weight"):
            weight.data[5] *= 20
        elif name.endswith(("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")):
            weight.data[:, 5] /= 20
    folder = tmp_path_factory.mktemp("converted")
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    convert.save_converted(convert.convert(model, inputs, folder), folder)
    return folder
