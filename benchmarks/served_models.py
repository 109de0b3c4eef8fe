"""What ``serving.py`` and ``overload.py`` serve, as ONNX files and bundles of them: a small MLP, and a model that takes
its time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from aios_edge.bundle.write import write_bundle
from aios_edge.contract import CONTRACT_SCHEMA, Conditions, Contract, GoldenSpec, Promise
from aios_edge.golden import Golden
from aios_edge.manifest import (
    MANIFEST_SCHEMA,
    Manifest,
    Measured,
    Provenance,
    SessionSpec,
    Softmax,
    TensorSpec,
    TextInput,
)

INPUTS = 16
MAX_LENGTH = 32  # of a text; the model looks at the first 16 numbers
HIDDEN = 32
CLASSES = 3
WORDS = [f"w{number}" for number in range(64)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
GOLDEN = 64
#: More rows than this run in parts; requests of the payload table have up to some 20,000.
MAX_BATCH = 1024
WIDTH = 256  # of the steady model: a batch of matrices of 16 x 256, so that time grows with rows

#: What :func:`_first_numbers` reads.
_FIRST_NUMBERS = {
    "scale": np.array(0.01, np.float32),
    "pads": np.array([0, 0, 0, INPUTS]),
    "start": np.array([0]),
    "end": np.array([INPUTS]),
    "axis": np.array([1]),
}


def write_mlp(path: Path) -> Path:
    """``input_ids`` INT64 [batch, length] -> ``logits`` FP32 [batch, 3]: the first 16 numbers, zeros where there are
    fewer (a bundle's texts may be shorter), through one hidden layer."""
    chance = np.random.default_rng(0)

    def layer(rows: int, columns: int) -> np.ndarray:
        return (chance.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)

    constants = {
        **_FIRST_NUMBERS,
        "w1": layer(INPUTS, HIDDEN),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": layer(HIDDEN, CLASSES),
        "b2": np.zeros(CLASSES, np.float32),
    }
    nodes = [
        *_first_numbers(),
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["logits"]),
    ]
    model = _model("mlp", nodes, constants)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path)
    return path


def write_steady(path: Path, layers: int) -> Path:
    """The same tensors as the MLP's; time that grows with rows and layers alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(_steady(layers), path)
    return path


def steady_layers(row_s: float) -> int:
    """How many layers take that long for one row, with one thread of this machine."""
    layers = 8
    session = open_session(_steady(layers).SerializeToString(), 1)
    ids = np.ones((1, INPUTS), dtype=np.int64)
    took = []
    for _ in range(200):
        began = time.perf_counter()
        session.run(None, {"input_ids": ids})
        took.append(time.perf_counter() - began)
    return max(1, round(layers * row_s / statistics.median(took)))


def _first_numbers() -> list[onnx.NodeProto]:
    """``input_ids`` -> ``x`` FP32 [batch, 16]: the first 16 numbers, zeros where there are fewer."""
    return [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "scale"], ["small"]),
        helper.make_node("Pad", ["small", "pads"], ["padded"]),
        helper.make_node("Slice", ["padded", "start", "end", "axis"], ["x"]),
    ]


def _model(name: str, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """``input_ids`` in, ``logits`` out; checked."""
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _steady(layers: int) -> onnx.ModelProto:
    chance = np.random.default_rng(0)
    constants = {
        **_FIRST_NUMBERS,
        "last": np.array([2]),
        "spread": chance.standard_normal((1, 1, WIDTH)).astype(np.float32),
        "w": (chance.standard_normal((WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5).astype(np.float32),
        "w2": (chance.standard_normal((INPUTS, CLASSES)) / INPUTS**0.5).astype(np.float32),
        "b2": np.zeros(CLASSES, np.float32),
    }
    nodes = [
        *_first_numbers(),
        helper.make_node("Unsqueeze", ["x", "last"], ["column"]),
        helper.make_node("Mul", ["column", "spread"], ["h0"]),
    ]
    for layer in range(layers):
        nodes.append(helper.make_node("MatMul", [f"h{layer}", "w"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"h{layer + 1}"]))
    nodes.append(helper.make_node("ReduceMean", [f"h{layers}"], ["mean"], axes=[2], keepdims=0))
    nodes.append(helper.make_node("Gemm", ["mean", "w2", "b2"], ["logits"]))
    return _model("steady", nodes, constants)


def request_body(rows: int) -> str:
    """One inference request with that many rows, as JSON of the Open Inference Protocol."""
    numbers = np.random.default_rng(rows).integers(4, 68, rows * INPUTS).tolist()
    tensor = {"name": "input_ids", "datatype": "INT64", "shape": [rows, INPUTS], "data": numbers}
    return msgspec.json.encode({"inputs": [tensor]}).decode()


def open_session(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """onnxruntime by itself, with the threads that everybody gets."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )


def write_tiny_bundle(target: Path, model: Path, name: str, *, max_batch_size: int = MAX_BATCH) -> Path:
    """A bundle of one of these models under that name: texts of numbered words, and an honest golden record."""
    if (target / "manifest.json").is_file():
        return target
    work = target.with_suffix(".parts")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(work / "tokenizer.json"))
    texts = [" ".join(WORDS[(k * 7 + i * 3) % len(WORDS)] for k in range(INPUTS - 2)) for i in range(GOLDEN)]
    ids = np.array([tokenizer.encode(text).ids for text in texts], dtype=np.int64)
    session = open_session(model, 1)
    logits = np.concatenate([session.run(["logits"], {"input_ids": row[None]})[0] for row in ids])
    size = model.stat().st_size
    one = Conditions(batch=1, length=MAX_LENGTH, threads=1, provider="CPUExecutionProvider")
    seen, none = Conditions(samples=GOLDEN, method="nothing was learnt"), Conditions()

    def learnt(name: str, op: Literal["<=", ">="], value: float) -> Promise:
        return Promise(
            name=name, op=op, value=value, unit="share", basis="budget", check="export-only", conditions=seen
        )

    def held(name: str, value: float, unit: str, conditions: Conditions) -> Promise:
        return Promise(
            name=name, op="<=", value=value, unit=unit, basis="budget", check="activation", conditions=conditions
        )

    write_bundle(
        target,
        Manifest(
            schema=MANIFEST_SCHEMA,
            name=name,
            version="1.0.0",
            task="text-classification",
            profile="x86-gateway",
            precision="fp32",
            labels=("a", "b", "c"),
            inputs=(TensorSpec(name="input_ids", datatype="INT64", shape=(-1, -1)),),
            outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, CLASSES)),),
            preprocess=TextInput(tokenizer="tokenizer.json", max_length=MAX_LENGTH, pad_id=0),
            postprocess=Softmax(),
            session=SessionSpec(),
            max_batch_size=max_batch_size,
            provenance=Provenance(
                source="random", candidate="fp32", recipe_sha256="0" * 64, data="none", finetune="none"
            ),
            licence="Apache-2.0",
            measured=Measured(accuracy=1.0, accuracy_drop=0.0, agreement=1.0, size_bytes=size),
        ),
        Contract(
            schema=CONTRACT_SCHEMA,
            profile="x86-gateway",
            promises=(
                learnt("accuracy", ">=", 1.0),
                learnt("accuracy_drop", "<=", 0.01),
                learnt("agreement", ">=", 1.0),
                held("size_bytes", size, "B", none),
                held("bundle_size_bytes", 120_000_000, "B", none),
                held("latency_p95_s", 0.06, "s", one),
                held("memory_bytes", 500_000_000, "B", one),
            ),
            golden=GoldenSpec(count=GOLDEN, min_agreement=0.98, tolerance={"CPUExecutionProvider": 1e-3}),
            unmeasured={"energy_j_per_inference": "no power source was read"},
        ),
        {"model.onnx": model, "tokenizer.json": work / "tokenizer.json"},
        Golden(
            raw=tuple(texts),
            inputs={"input_ids": ids},
            length=np.full(GOLDEN, INPUTS, dtype=np.int64),
            fp32={"logits": logits},
            shipped={"logits": logits},
            contract_sha256="",
            manifest_sha256="",
        ),
    )
    return target


def _tokenizer() -> Tokenizer:
    vocabulary: Mapping[str, int] = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer
