"""Things that go wrong silently elsewhere, done on purpose: each is found by the check that is there for it."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from aios_edge.errors import PromiseBroken
from aios_edge.manifest import SessionSpec
from exporters import convert, finetune, graph, observe, ort, qdq, training, verify
from exporters.encode import Encoder
from exporters.scheme import Scheme
from exporters.source import load_torch

pytestmark = pytest.mark.export
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(scope="module")
def model(workshop: Path) -> Any:
    found = load_torch(workshop / "tiny", labels=("negative", "positive"))
    for weight in found.parameters():
        weight.data *= 6 if weight.dim() > 1 else 1  # fresh weights are so small that tokens hardly tell on the logits
    return found


@pytest.fixture(scope="module")
def converted(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    facts = convert.convert(model, INPUTS, folder)
    convert.save_converted(facts, folder)
    assert facts.operators["Attention"] == 2
    return folder


def batches(seed: int = 0) -> list[tuple[list[int], dict[str, np.ndarray]]]:
    random = np.random.default_rng(seed)
    found = []
    for number, (rows, length) in enumerate([(4, 20), (1, 7)]):
        ids = random.integers(4, 40, (rows, length))
        mask = np.ones_like(ids)
        mask[0, length // 2 :] = 0
        batch = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        found.append((list(range(number * 10, number * 10 + rows)), batch))
    return found


def test_parity_holds_on_padded_batches(model: Any, converted: Path) -> None:
    for name in convert.GRAPHS:
        run = ort.Session(converted / name, SessionSpec()).run
        assert verify.check_parity(name, run, lambda b: training.batch_logits(model, b), batches()) < 1e-5


def test_lost_fusion_stops_the_export(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ort, "fuse_bert", lambda source, out, **_: shutil.copy(source, out))
    with pytest.raises(PromiseBroken, match="attention 0 of 2") as caught:
        convert.convert(model, INPUTS, tmp_path)
    assert (caught.value.promise, caught.value.exit_code) == ("fusion", 3)


def of_six_layers(*lost: str, left: Sequence[tuple[str, str]] = ()) -> Any:
    """A fused graph as it is counted, without the operators ``lost`` and with (operator, name) that are ``left``."""
    counts = Counter({"Attention": 6, "BiasGelu": 6, "LayerNormalization": 13}) - Counter(lost)
    nodes = [(operator, f"{operator}_{number}") for number, operator in enumerate(counts.elements())]
    made = [helper.make_node(operator, [], ["out"], name=name) for operator, name in [*nodes, *left]]
    return helper.make_model(helper.make_graph(made, "g", [], []))


POOLER = ("Tanh", "/bert/pooler/activation/Tanh")
NORM = "/bert/encoder/layer.4/output/LayerNorm"


@pytest.mark.parametrize(
    ("lost", "left", "told"),
    [
        (["Attention"], [("Softmax", "/layer.3/Softmax")], "attention 5 of 6; left: '/layer.3/Softmax' (layer 3)"),
        (["BiasGelu"], [("Tanh", "/layer.11/act/Tanh")], "GELU 5 of 6; left: '/layer.11/act/Tanh' (layer 11)"),
        (  # that of the embeddings makes up the number
            ["LayerNormalization"],
            [("ReduceMean", f"{NORM}/ReduceMean"), ("ReduceMean", f"{NORM}/ReduceMean_1")],
            f"layer norm 12 of 13; left: '{NORM}/ReduceMean' (layer 4)",
        ),
        ([], [("Erf", "/electra/classifier/Erf")], "GELU 6 of 7; left: '/electra/classifier/Erf'"),
        (["Attention"], [], "attention 5 of 6; of 1 no node tells where"),
        (
            ["Attention"] * 6,
            [("Softmax", f"/layer.{layer}/Softmax") for layer in range(5)],
            "attention 0 of 6; left: '/layer.0/Softmax' (layer 0), '/layer.1/Softmax' (layer 1), "
            "'/layer.2/Softmax' (layer 2) and 2 more; of 1 no node tells where",
        ),
    ],
)  # fmt: skip
def test_what_was_not_fused_is_named(lost: list[str], left: list[tuple[str, str]], told: str) -> None:
    graph.check_fusion(of_six_layers(left=[POOLER]), layers=6, where="t")
    with pytest.raises(PromiseBroken, match=re.escape(f"fused {told}. Use")):
        graph.check_fusion(of_six_layers(*lost, left=[*left, POOLER]), layers=6, where="t")


def test_what_an_encoder_without_gelu_has_instead_is_nothing_lost() -> None:
    relu = of_six_layers(*["BiasGelu"] * 6, left=[("Tanh", "/layer.0/act/Tanh")])
    graph.check_fusion(relu, layers=6, where="t", gelu=False)


def test_permuted_labels_break_parity_and_the_row_is_named(model: Any, converted: Path) -> None:
    run = ort.Session(converted / convert.RAW, SessionSpec()).run
    with pytest.raises(PromiseBroken, match="validation row") as caught:
        verify.check_parity("raw", lambda b: run(b)[:, ::-1], lambda b: training.batch_logits(model, b), batches())
    assert caught.value.promise == "parity"


def test_an_ignored_mask_breaks_parity(model: Any, converted: Path) -> None:
    run = ort.Session(converted / convert.RAW, SessionSpec()).run

    def blind(batch: dict[str, np.ndarray]) -> np.ndarray:
        return run({**batch, "attention_mask": np.ones_like(batch["attention_mask"])})

    with pytest.raises(PromiseBroken, match="differs from torch"):
        verify.check_parity("raw", blind, lambda b: training.batch_logits(model, b), batches())


def test_outputs_that_are_not_finite_break_parity(model: Any) -> None:
    def nan(batch: dict[str, np.ndarray]) -> np.ndarray:
        return np.full((len(batch["input_ids"]), 2), np.nan, dtype=np.float32)

    with pytest.raises(PromiseBroken, match="inf"):
        verify.check_parity("raw", nan, lambda b: training.batch_logits(model, b), batches())


def test_a_zero_point_other_than_zero_is_refused(converted: Path) -> None:
    from onnx import numpy_helper

    scheme = Scheme(static=True, symmetric=True)
    found = graph.load(converted / convert.STANDARD)
    qdq.quantize(found, observe.ranges_of(found, [batch for _, batch in batches()], scheme), scheme, "qdq")
    graph.check_zero_points(found)
    name = next(node.input[2] for node in found.graph.node if node.op_type == "QuantizeLinear")
    tensor = next(tensor for tensor in found.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(numpy_helper.to_array(tensor) + 1, dtype=np.int8), name))
    with pytest.raises(PromiseBroken, match="zero point") as caught:
        graph.check_zero_points(found)
    assert caught.value.promise == "symmetric"


def test_a_graph_too_new_for_the_oldest_runtime_is_refused(converted: Path, tmp_path: Path) -> None:
    found = graph.load(converted / convert.RAW)
    found.ir_version = 99
    with pytest.raises(PromiseBroken, match="IR 99"):
        graph.save(found, tmp_path)


def test_a_loss_that_is_not_finite_is_loud(workshop: Path, tmp_path: Path) -> None:
    from aios_edge.errors import AiosEdgeError
    from exporters.bundle import Identity, draft, text_input
    from exporters.data import Labelled
    from exporters.progress import SilentProgress
    from exporters.recipe import FinetuneSection

    text = text_input(max_length=32, pad_id=0, pair=False)
    names = ("negative", "positive")
    identity = Identity(name="n", version="1.0.0", task="text-classification", labels=names, inputs=INPUTS,
                        text=text, licence="x")  # fmt: skip
    encoder = Encoder(draft(identity), workshop / "tiny")
    rows = Labelled(texts=("great film", "awful film") * 8, labels=(1, 0) * 8)
    fresh = load_torch(workshop / "tiny", labels=names)
    fresh.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(AiosEdgeError, match=r"loss is nan in epoch 1, batch 1.*Lower learning_rate"):
        finetune.finetune(fresh, FinetuneSection(threads=1), rows, rows, encoder, tmp_path, SilentProgress())
