"""A real bundle without torch: a bag-of-words sentiment model built node by node, run by onnxruntime."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Hundreds of processes begin in these tests: each would compile the whole program again where an image forbids to keep
# what was compiled.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

POSITIVE = ["good", "great", "fine", "lovely", "superb", "bright", "warm", "clever", "moving", "funny"]
NEGATIVE = ["bad", "awful", "dull", "dreary", "poor", "cold", "weak", "boring", "clumsy", "flat"]
NEUTRAL = ["the", "a", "film", "plot", "and", "is", "was", "it", "story", "with", "actor", "scene", "of", "very"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = [*SPECIAL, *POSITIVE, *NEGATIVE, *NEUTRAL]
LABELS = ("negative", "positive")
GOLDEN_COUNT = 72

#: make_bundle(target=None, *, manifest={}, contract={}, measured={}, promises=None, profile="x86-gateway") -> Bundle
MakeBundle = Callable[..., Any]


def tiny_sentences(count: int = GOLDEN_COUNT) -> list[str]:
    """Sentences of 3 to 24 words, both labels in turn; the last of each ten leans to neither side."""
    sentences = []
    for index in range(count):
        words = [NEUTRAL[(index * 7 + k * 5) % len(NEUTRAL)] for k in range(2 + index % 22)]
        side, other = (POSITIVE, NEGATIVE) if index % 2 else (NEGATIVE, POSITIVE)
        words.insert(index % len(words), side[index % 10])
        if index % 10 == 9:
            words.append(other[(index + 3) % 10])
        sentences.append(" ".join(words))
    return sentences


def _write_model(path: Path) -> None:
    """logits[n, k] = sum over true tokens of table[id, k] / number of true tokens; the table is external data."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table = np.zeros((len(VOCABULARY), 2), dtype=np.float32)
    for words, column in ((NEGATIVE, 0), (POSITIVE, 1)):
        for rank, word in enumerate(words):
            table[VOCABULARY.index(word), column] = 4.0 + 0.5 * rank
    for rank, word in enumerate(NEUTRAL):
        table[VOCABULARY.index(word)] = 0.01 * rank, 0.01
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["vectors", "mask3"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "middle"], ["count"], keepdims=1),
        helper.make_node("Max", ["count", "one"], ["positive_count"]),
        helper.make_node("Div", ["total", "positive_count"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bag_of_words",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([-1], dtype=np.int64), "last"),
            numpy_helper.from_array(np.array([1], dtype=np.int64), "middle"),
            numpy_helper.from_array(np.array(1, dtype=np.float32), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        location=path.name + ".data",
        size_threshold=256,
        convert_attribute=False,
    )


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path))


@pytest.fixture(scope="session")
def words() -> tuple[str, ...]:
    """For sentences: with accents, symbols and what the tiny model's tokenizer doesn't know."""
    latin = ("good", "bad", "great", "awful", "film", "the", "plot", "Été", "naïve", "dull", "superb")
    return (*latin, "漢字", "!", "?x")


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a bundle is made of: ``files`` by name, ``golden``, ``manifest`` and ``contract`` as keyword arguments."""
    import numpy as np
    import onnxruntime as ort
    from tokenizers import Tokenizer

    from aios_edge.contract import CONTRACT_SCHEMA, Conditions, GoldenSpec, Promise
    from aios_edge.golden import Golden
    from aios_edge.manifest import MANIFEST_SCHEMA, Measured, Provenance, SessionSpec, Softmax, TensorSpec, TextInput

    folder = tmp_path_factory.mktemp("tiny_parts")
    _write_model(folder / "model.onnx")
    _write_tokenizer(folder / "tokenizer.json")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sentences = tiny_sentences()
    encodings = tokenizer.encode_batch(sentences)
    length = np.array([len(e.ids) for e in encodings], dtype=np.int64)
    ids = np.zeros((len(sentences), int(length.max())), dtype=np.int64)
    for row, encoding in zip(ids, encodings, strict=True):
        row[: len(encoding.ids)] = encoding.ids
    inputs = {"input_ids": ids, "attention_mask": (np.arange(ids.shape[1]) < length[:, None]).astype(np.int64)}
    logits = np.concatenate(
        [
            session.run(["logits"], {name: array[i : i + 1, : length[i]] for name, array in inputs.items()})[0]
            for i in range(len(sentences))
        ]
    )
    size_bytes = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    here = Conditions(samples=500, method="test split")
    one = Conditions(batch=1, length=32, threads=1, provider="CPUExecutionProvider")

    def promise(name: str, op: Any, value: float, unit: str, basis: Any, check: Any, conditions: Conditions) -> Promise:
        return Promise(name=name, op=op, value=value, unit=unit, basis=basis, check=check, conditions=conditions)

    return {
        "files": {name: folder / name for name in ("model.onnx", "model.onnx.data", "tokenizer.json")},
        "golden": Golden(
            raw=tuple(sentences),
            inputs=inputs,
            length=length,
            fp32={"logits": logits},
            shipped={"logits": logits},
            contract_sha256="",
            manifest_sha256="",
        ),
        "manifest": {
            "schema": MANIFEST_SCHEMA,
            "name": "tiny",
            "version": "1.0.0",
            "task": "text-classification",
            "profile": "x86-gateway",
            "precision": "fp32",
            "labels": LABELS,
            "inputs": tuple(TensorSpec(name=n, datatype="INT64", shape=(-1, -1)) for n in inputs),
            "outputs": (TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),),
            "preprocess": TextInput(tokenizer="tokenizer.json", max_length=64, pad_id=0),
            "postprocess": Softmax(),
            "session": SessionSpec(),
            "max_batch_size": 32,
            "provenance": Provenance(
                source="built in a test", candidate="fp32", recipe_sha256="0" * 64, data="none", finetune="none"
            ),
            "licence": "Apache-2.0",
            "measured": Measured(accuracy=0.9, accuracy_drop=0.0, agreement=1.0, size_bytes=size_bytes),
        },
        "contract": {
            "schema": CONTRACT_SCHEMA,
            "profile": "x86-gateway",
            "promises": (
                promise("accuracy", ">=", 0.9, "share", "measured", "export-only", here),
                promise("accuracy_drop", "<=", 0.01, "share", "budget", "export-only", here),
                promise("agreement", ">=", 1.0, "share", "measured", "export-only", here),
                promise("size_bytes", "<=", size_bytes, "B", "measured", "activation", Conditions()),
                promise("bundle_size_bytes", "<=", 30_000_000, "B", "budget", "activation", Conditions()),
                promise("latency_p95_s", "<=", 0.06, "s", "budget", "activation", one),
                promise("memory_bytes", "<=", 500_000_000, "B", "budget", "activation", one),
            ),
            "golden": GoldenSpec(count=len(sentences), min_agreement=0.98, tolerance={"CPUExecutionProvider": 1e-3}),
            "unmeasured": {"energy_j_per_inference": "no power source on the exporting host"},
        },
    }


@pytest.fixture(scope="session")
def make_bundle(tiny_parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """A factory of bundles: ``make_bundle(name="tiny", max_batch_size=4, profile="rpi5") -> Bundle``.

    Keywords replace fields of the manifest; ``target`` is where (a new folder otherwise), ``contract`` a dict that
    replaces fields of the contract, ``promises`` a dict {name: value} that replaces values of promises, ``files`` a
    dict of added or replaced files (path or bytes), ``golden`` other golden samples, ``profile`` goes into manifest
    and contract.
    """
    import msgspec

    from aios_edge.bundle.write import write_bundle
    from aios_edge.contract import Contract
    from aios_edge.manifest import Manifest

    def make(
        target: Path | None = None,
        *,
        contract: dict[str, Any] | None = None,
        promises: dict[str, float] | None = None,
        files: dict[str, Path | bytes] | None = None,
        golden: Any = None,
        **manifest: Any,
    ) -> Any:
        target = target or tmp_path_factory.mktemp("bundles") / "bundle"
        fields = {**tiny_parts["contract"], **(contract or {})}
        if "profile" in manifest:
            fields["profile"] = manifest["profile"]
        fields["promises"] = tuple(
            msgspec.structs.replace(p, value=(promises or {}).get(p.name, p.value)) for p in fields["promises"]
        )
        return write_bundle(
            target,
            Manifest(**{**tiny_parts["manifest"], **manifest}),
            Contract(**fields),
            {**tiny_parts["files"], **(files or {})},
            golden or tiny_parts["golden"],
        )

    return make


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: MakeBundle) -> Any:
    """A valid bundle shared by all tests: read it, never write into it; ``tiny_copy`` is for that."""
    return make_bundle()


@pytest.fixture
def tiny_copy(tiny_bundle: Any, tmp_path: Path) -> Path:
    """A copy of the tiny bundle's directory that a test may damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
