"""A model of more than 2 GB, for real: what protobuf can't have in one message becomes bundles.

Without ``qdq-s8-sym``, which tries the whole model a dozen times.
"""

from __future__ import annotations

import csv
import itertools
import random
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest

import exporters
from aios_edge.profile import Budgets, DeviceProfile
from aios_edge.profile_files import load_profile

pytestmark = [pytest.mark.export, pytest.mark.long, pytest.mark.timeout(1800)]

PIECES, WIDTH = 530_000, 1024
ROOT = Path(exporters.__file__).parent.parent
RECIPE = """
[model]
source = "large"
[data]
train = "train.csv"
validation = "val.csv"
test = "test.csv"
[finetune]
method = "none"
max_length = 32
threads = 1
[search]
exhaustive = false
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """On a disk with room for what an export of it keeps, and gone afterwards."""
    with TemporaryDirectory(prefix="aios-edge-large-") as name:
        if shutil.disk_usage(name).free < 30e9 or available_bytes() < 12e9:
            pytest.skip("needs 30 GB of disk and 12 GB of memory")
        make(Path(name))
        yield Path(name)


def available_bytes() -> int:
    """Memory that this machine can give."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def make(folder: Path) -> None:
    """Random weights; the two answers are apart on the texts that are kept, which have them as labels."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification

    letters = string.ascii_lowercase
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    invented = (itertools.product(letters, repeat=length) for length in (4, 5))
    words = list(map("".join, itertools.islice(itertools.chain(*invented), PIECES - len(known))))
    pieces = {piece: number for number, piece in enumerate([*known, *words])}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(7)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=PIECES,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=16,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=64,
            id2label={0: "negative", 1: "positive"},
            label2id={"negative": 0, "positive": 1},
        )
    ).eval()
    chance = random.Random(3)
    texts = [" ".join(chance.choices(words, k=chance.randint(6, 12))) for _ in range(520)]
    with torch.no_grad():
        ids = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
        pooled = np.concatenate([model.bert(row).pooler_output.numpy() for row in ids]).astype(np.float64)
        # The direction in which texts differ most, and its middle.
        axis = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)[2][0]
        axis *= 2 / (pooled @ axis).std()
        middle = np.median(pooled @ axis)
        model.classifier.weight[:] = torch.tensor(np.stack([-axis, axis]) / 2)
        model.classifier.bias[:] = torch.tensor([middle, -middle]) / 2
    margin = pooled @ axis - middle
    order = np.argsort(margin)
    kept = [number for pair in zip(order[:140], order[-140:], strict=True) for number in pair]
    rows = [(texts[number], "positive" if margin[number] > 0 else "negative") for number in kept]
    chance.shuffle(rows)
    for name, part in {"train": rows[:110], "val": rows[110:195], "test": rows[195:]}.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("text", "label"), *part])
    model.save_pretrained(folder / "large", max_shard_size="9GB")
    tokenizer.save(str(folder / "large" / "tokenizer.json"))
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")


def profile(like: str, name: str, *wanted: str) -> DeviceProfile:
    """A shipped profile that prefers something else and has room for a large model."""
    budgets = Budgets(max_drop=0.05)
    return msgspec.structs.replace(load_profile(like), name=name, precision_preference=wanted, budgets=budgets)


def test_a_model_beyond_two_gigabytes_becomes_bundles_that_answer(folder: Path) -> None:
    profiles = [
        profile("x86-vnni", "cpu", "dynamic-s8", "fp32"),
        profile("jetson-agx-orin", "half", "fp16"),
    ]
    report = exporters.export(folder / "recipe.toml", profiles, folder / "out")
    assert report.baseline.size_bytes > 2**31
    for entry in report.profiles.values():
        for candidate in entry.candidates:
            assert candidate.metrics is not None and candidate.latency_s and candidate.rss_bytes, candidate.name
            assert candidate.agreement is not None and candidate.agreement >= 0.95, candidate.name
        assert entry.chosen, entry.problem
    with (folder / "test.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))[:4]
    for chosen in ("cpu", "half"):
        command = [sys.executable, "-m", "aios_edge.cli.main", "infer", str(folder / "out" / chosen)]
        command += [row["text"] for row in rows]
        told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        assert [line.split("\t")[0] for line in told.splitlines()] == [row["label"] for row in rows]
