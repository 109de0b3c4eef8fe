"""Model card and SBOM from the same facts: valid, complete, the same each time, and harmless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from aios_edge.digest import sha256_bytes
from aios_edge.manifest import Manifest, Measured, Provenance, SessionSpec
from aios_edge.profile_files import load_profile
from exporters.bundle import Identity, contract_of, manifest_of, text_input
from exporters.calibration import Calibration
from exporters.class_drop import class_drops
from exporters.evaluate import metrics, quality
from exporters.facts import Facts, Split, documents, share_interval
from exporters.finetune import Tuned
from exporters.golden_samples import GoldenSpec
from exporters.recipe import DistillSection, parse_recipe
from exporters.recovery_search import Chosen, ShortTraining
from exporters.source import Source
from exporters.structure import Structure

SPLITS = ("training", "validation", "test")
UNTRAINED = Tuned(
    method="none", epochs=0, best_epoch=None, validation_accuracy=(), precision="fp32", trained_parameters=0
)
TOOLS = {"aios-edge": "0.1.0", "torch": "2.13.0+cpu"}


def facts_of(labels: tuple[str, ...] = ("bad", "good"), licence: str = "Apache-2.0", **changes: Any) -> Facts:
    truth = np.arange(len(labels) * 12) % len(labels)
    reference = np.eye(len(labels), dtype=np.float32)[truth]
    logits = reference.copy()
    logits[0] = reference[1]
    found = quality("test", logits, reference, truth, labels)
    assert found.metrics is not None and found.drop is not None and found.agreement is not None
    measured = Measured(accuracy=found.metrics.accuracy, accuracy_drop=found.drop.value,
                        agreement=found.agreement, size_bytes=4)  # fmt: skip
    identity = Identity(name="mood", version="1.0.0", task="text-classification", labels=labels,
                        inputs=("input_ids", "attention_mask"), licence=licence,
                        text=text_input(max_length=64, pad_id=0, pair=False))  # fmt: skip
    manifest: Manifest = manifest_of(
        identity,
        profile="rpi5",
        precision="dynamic-s8",
        session=SessionSpec(),
        max_batch_size=1,
        provenance=Provenance(source="tiny", candidate="h4+dynamic-s8", recipe_sha256="0" * 64, data="d",
                              finetune="full", tools=TOOLS),
        measured=measured,
    )  # fmt: skip
    golden = GoldenSpec(count=64, min_agreement=0.9, tolerance={})
    contract = contract_of(load_profile("rpi5"), measured, golden, rows=len(truth), host="h", observed={})
    base: dict[str, Any] = {
        "manifest": manifest,
        "contract": contract,
        "recipe": parse_recipe({"model": {"source": "tiny"}, "data": {"train": "a/train.csv"}}, folder=Path()),
        "source": Source(folder=Path("/secret"), name="tiny", digest="ab", config={"model_type": "bert"}),
        "tuned": Tuned(method="full", epochs=3, best_epoch=2, validation_accuracy=(0.1, 0.9, 0.8), precision="fp32",
                       trained_parameters=7),
        "structure": None,
        "recovered": UNTRAINED,
        "recovery": None,
        "rare_row_bits": 8,
        "splits": tuple(Split(name=n, file=f"{n}.csv", rows=9, digest="cd") for n in SPLITS),
        "quality": found,
        "class_drops": class_drops(logits, reference, truth, labels, max_drop=0.01),
        "calibration": Calibration(temperature=1.25, error_before=0.05, error_after=0.01),
        "baseline": metrics(truth, truth, labels),
        "majority_accuracy": 0.5,
    }  # fmt: skip
    return Facts(**{**base, **changes})


FILES: dict[str, Path | bytes] = {"model.onnx": b"graph", "tokenizer.json": b"{}"}


def written(facts: Facts) -> tuple[str, dict[str, Any]]:
    found = documents(facts, FILES)
    return found["MODEL_CARD.md"].decode(), json.loads(found["sbom.cdx.json"])


@pytest.mark.parametrize("licence", ["Apache-2.0", "unknown", "MIT OR Apache-2.0"])
@pytest.mark.parametrize("count", [2, 150])
def test_the_sbom_is_valid_cyclonedx(count: int, licence: str) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    data = documents(facts_of(tuple(f"l{i}" for i in range(count)), licence), FILES)["sbom.cdx.json"]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(data.decode()) is None
    broken = data.decode().replace('"machine-learning-model"', '"ml"', 1)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None  # the validator is alive


def test_the_sbom_names_files_source_data_and_tools() -> None:
    _, sbom = written(facts_of())
    by_ref = {part["bom-ref"]: part for part in sbom["components"]}
    assert by_ref["file:model.onnx"]["hashes"] == [{"alg": "SHA-256", "content": sha256_bytes(b"graph")}]
    card = documents(facts_of(), FILES)["MODEL_CARD.md"]
    assert by_ref["file:MODEL_CARD.md"]["hashes"][0]["content"] == sha256_bytes(card)
    assert not [ref for ref in by_ref if "manifest" in ref or "contract" in ref or "golden" in ref]
    assert by_ref["source"]["name"] == "tiny" and by_ref["source"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert {"data:training", "data:validation", "data:test"} <= set(by_ref)
    assert [tool["purl"] for tool in sbom["metadata"]["tools"]["components"]] == [
        "pkg:pypi/aios-edge@0.1.0",
        "pkg:pypi/torch@2.13.0%2Bcpu",
    ]
    model = sbom["metadata"]["component"]
    references = {entry["ref"] for entry in model["modelCard"]["modelParameters"]["datasets"]}
    assert references <= set(by_ref) and set(sbom["dependencies"][0]["dependsOn"]) == set(by_ref)
    accuracy = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]
    assert float(accuracy["confidenceInterval"]["lowerBound"]) < float(accuracy["value"])


def test_both_are_the_same_each_time_and_the_serial_number_follows_the_content() -> None:
    first, again = documents(facts_of(), FILES), documents(facts_of(), FILES)
    assert first == again
    serial = json.loads(first["sbom.cdx.json"])["serialNumber"]
    other = json.loads(documents(facts_of(), {**FILES, "model.onnx": b"other"})["sbom.cdx.json"])["serialNumber"]
    assert serial != other
    assert "timestamp" not in first["sbom.cdx.json"].decode() and "/secret" not in str(first)


def test_the_card_says_what_it_is_for_how_good_it_is_and_what_is_not_known() -> None:
    card, _ = written(facts_of())
    for heading in ("Intended use", "Data", "Results on the test split", "Limitations", "Licence", "How to run it"):
        assert f"## {heading}\n" in card
    assert "| test | test.csv | 9 | `cd` |" in card
    assert "| accuracy | 0.9583 (0.7976 to 0.9926) | 1.0000 (0.8620 to 1.0000) |" in card
    assert "| bad | 1.000 | 0.917 | 0.957 | 12 | 0.083 |" in card
    assert "Not measured: latency_p95_s (unmeasured on target" in card and "fairness" in card
    assert "temperature 1.25" in card and "learning rate 5e-05" in card and "epoch 2 was kept" in card
    assert "unknown. Find out" in written(facts_of(licence="unknown"))[0]
    assert "not fine-tuned here" in written(facts_of(tuned=UNTRAINED))[0]


def test_the_card_tells_what_was_pruned_and_how_it_recovered() -> None:
    assert "Pruning" not in written(facts_of())[0]
    small = Structure(layers=6, heads=4, ffn=512, vocabulary=8000)
    recovered = Tuned(method="distill", epochs=4, best_epoch=3, validation_accuracy=(0.1, 0.9, 0.9, 0.8),
                      precision="fp32", trained_parameters=7)  # fmt: skip
    had = Chosen(settings=DistillSection(learning_rate=0.000345678, temperature=3))
    card = written(facts_of(structure=small, recovered=recovered, recovery=had))[0]
    assert "6 layers of 4 heads and 512 neurons, a vocabulary of 8000 pieces" in card
    assert "distillation from the fine-tuned model, 4 epochs (epoch 3 was kept)" in card
    assert "learning rate 0.000346, batches of 32, temperature 3, 0.9 of the loss" in card and "short" not in card
    best = ShortTraining(epochs=1, learning_rate=0.000345678, temperature=3, teacher_weight=0.9, state_weight=1,
                         validation_accuracy=0.9, kept=True)  # fmt: skip
    tried = Chosen(settings=had.settings, trials=(msgspec.structs.replace(best, kept=False), best))
    card = written(facts_of(structure=small, recovered=recovered, recovery=tried))[0]
    assert "; as in number 2 of 2 short trainings, the best of them on" in card


@pytest.mark.parametrize("bits", [4, 2])
def test_the_card_warns_of_words_that_training_did_not_use(bits: int) -> None:
    card = written(facts_of(rare_row_bits=bits))[0]
    limits = card.partition("## Limitations")[2].partition("\n## ")[0]
    assert f"take {bits} bits" in limits and "Texts full of such words" in limits
    assert "full of such words" not in written(facts_of())[0]


def test_labels_do_not_break_out_of_the_card() -> None:
    card, sbom = written(facts_of(("a|b\n# c", "<script>`x`</script>")))
    assert "\n# c" not in card and "| a\\|b # c |" in card
    assert "\\<script\\>" in card and "`<script>'x'</script>`" in card
    assert msgspec.json.encode(sbom)


def test_few_rows_and_many_classes_are_said() -> None:
    card, _ = written(facts_of(tuple(f"l{i}" for i in range(320))))
    assert "20 classes with a higher F1 are left out." in card
    assert len(card) < 40_000


@pytest.mark.parametrize(("share", "rows", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0)])
def test_interval_of_a_share_by_the_book(share: float, rows: int, low: float, high: float) -> None:
    assert share_interval(share, rows) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
