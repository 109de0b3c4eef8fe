"""Each check of the activation refuses under its own name, on bundles that differ from a good one in one thing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from aios_edge.digest import sha256_file
from aios_edge.golden import encode_golden, read_golden
from aios_edge.manifest import SessionSpec, TensorSpec
from aios_edge.profile import Budgets, DeviceProfile, Threads
from aios_edge.profile_files import load_profile
from device_agent.activation import Activated, ActivationRefused, activate
from device_agent.activation_measure import check_memory

BUNDLE_CHECKS = ["schema", "unlisted", "digest", "manifest", "promises", "size"]


def profile(**budgets: Any) -> DeviceProfile:
    """The gateway's profile; with keywords, its budgets replaced."""
    gateway = load_profile("x86-gateway")
    return msgspec.structs.replace(gateway, budgets=Budgets(**budgets)) if budgets else gateway


def activated(path: Path, how: str = "full", device: DeviceProfile | None = None, alone: bool = False) -> Activated:
    return activate(path, device or profile(), how, alone=alone)


def refusal(path: Path, device: DeviceProfile | None = None, alone: bool = False) -> ActivationRefused:
    with pytest.raises(ActivationRefused) as refused:
        activated(path, device=device, alone=alone)
    return refused.value


def rehash(path: Path, **changes: Any) -> None:
    """Write the manifest anew so that every digest fits: what an attacker without a signing key would do."""
    document = json.loads((path / "manifest.json").read_text())
    for entry in document["files"]:
        entry["sha256"] = sha256_file(path / entry["path"])
        entry["size_bytes"] = (path / entry["path"]).stat().st_size
    (path / "manifest.json").write_text(json.dumps({**document, **changes}))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def test_a_good_bundle_is_activated_and_everything_is_reported(tiny_bundle: Any) -> None:
    stages: list[str] = []
    found = activate(tiny_bundle.path, profile(), alone=False, on_stage=stages.append)
    report = found.report
    names = [check.name for check in report.checks]
    assert names == [
        *BUNDLE_CHECKS,
        "purpose",
        "profile",
        "load",
        "golden",
        "golden_raw",
        "latency_p95_s",
        "memory_bytes",
    ]
    assert all(check.passed for check in report.checks)
    assert report.bundle_id == tiny_bundle.bundle_id
    assert report.providers_active == ("CPUExecutionProvider",)
    assert report.latency_p95_s is not None and 0 < report.latency_p95_s < 0.06
    assert stages == ["bundle", "profile", "load", "golden", "golden_raw", "latency_p95_s", "memory_bytes"]


def test_a_bundle_that_takes_less_of_the_cpu_says_so_and_one_that_takes_more_is_refused(make_bundle: Any) -> None:
    two = msgspec.structs.replace(profile(), threads=Threads(intra_op=2))
    found = activated(make_bundle(session=SessionSpec(intra_op_threads=1)).path, device=two)
    assert found.runtime.options.intra_op_threads == 1
    details = {check.name: check.detail for check in found.report.checks}
    assert "runs as it was measured: intra-op threads 1 (the profile grants 2)" in details["profile"]
    assert "on 1 thread(s)" in details["latency_p95_s"]
    refused = refusal(make_bundle(session=SessionSpec(intra_op_threads=3)).path, device=two)
    assert refused.promise == "profile" and "3 intra-op threads, the profile grants 2" in refused.what


def test_a_bundle_for_measuring_is_weighed_and_not_served(make_bundle: Any) -> None:
    bundle = make_bundle(purpose="measure")
    assert refusal(bundle.path).promise == "purpose"
    assert activated(bundle.path, "quick").report.checks


def test_quick_looks_at_digests_and_a_few_samples_only(tiny_bundle: Any) -> None:
    report = activated(tiny_bundle.path, "quick").report
    checks = {check.name: check for check in report.checks}
    assert list(checks) == [*BUNDLE_CHECKS, "profile", "load", "golden", "golden_raw"]
    assert checks["golden"].detail.startswith("8 samples")
    assert report.latency_p95_s is None


def test_memory_is_measured_in_a_process_of_its_own_and_skipped_with_a_reason_in_a_thread(tiny_bundle: Any) -> None:
    alone = activated(tiny_bundle.path, alone=True).report
    assert alone.rss_bytes is not None and alone.rss_bytes > 10_000_000
    shared = activated(tiny_bundle.path, alone=False).report
    check = shared.checks[-1]
    assert shared.rss_bytes is None
    assert check.skipped and check.measured is None and "not measurable alone" in check.detail


def test_a_newer_major_schema_is_refused_by_schema(tiny_copy: Path) -> None:
    rehash(tiny_copy, schema="2.0")
    refused = refusal(tiny_copy)
    assert refused.promise == "schema"
    assert refused.report is None


def test_an_unlisted_file_is_refused_by_unlisted(tiny_copy: Path) -> None:
    (tiny_copy / "payload.so").write_bytes(b"x")
    assert refusal(tiny_copy).promise == "unlisted"


def test_an_altered_byte_is_refused_by_digest(tiny_copy: Path) -> None:
    flip(tiny_copy / "model.onnx", 100)
    assert refusal(tiny_copy).promise == "digest"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_an_altered_model_with_a_new_digest_is_refused_by_load_or_golden(tiny_copy: Path, name: str) -> None:
    size = (tiny_copy / name).stat().st_size
    # The sign of a weight of "great", word 5 of the table (little-endian fp32, two a word); the middle of the graph.
    flip(tiny_copy / name, 5 * 8 + 7 if name.endswith("data") else size // 2)
    rehash(tiny_copy)
    assert refusal(tiny_copy).promise in ("load", "golden")


def test_a_model_that_is_none_is_refused_by_load(tiny_copy: Path) -> None:
    (tiny_copy / "model.onnx").write_bytes(b"\x00" * (tiny_copy / "model.onnx").stat().st_size)
    rehash(tiny_copy)
    refused = refusal(tiny_copy)
    assert refused.promise == "load"
    assert refused.report is not None
    assert [check.name for check in refused.report.checks if not check.passed] == ["load"]


def test_tensors_that_are_not_the_manifests_are_refused_by_load(make_bundle: Any) -> None:
    outputs = (TensorSpec(name="logits", datatype="FP32", shape=(-1, 3)),)
    assert refusal(make_bundle(outputs=outputs).path).promise == "load"


def test_altered_golden_outputs_are_refused_by_golden(tiny_copy: Path) -> None:
    golden = read_golden(tiny_copy / "golden.npz")
    shipped = {"logits": golden.shipped["logits"] + np.float32(0.01)}
    (tiny_copy / "golden.npz").write_bytes(encode_golden(dataclasses.replace(golden, shipped=shipped)))
    rehash(tiny_copy)
    refused = refusal(tiny_copy)
    assert refused.promise == "golden"
    assert refused.report is not None and refused.report.checks[-1].measured == pytest.approx(0.01, rel=0.01)


def test_golden_answers_that_are_not_finite_are_refused_by_golden(tiny_copy: Path) -> None:
    path = tiny_copy / "model.onnx.data"
    path.write_bytes(np.full(path.stat().st_size // 4, np.nan, dtype="<f4").tobytes())
    rehash(tiny_copy)
    refused = refusal(tiny_copy)
    assert refused.promise == "golden" and "not finite" in refused.what


@pytest.mark.parametrize("altered", [-1.0, float("nan")])
def test_altered_golden_outputs_of_the_fp32_model_are_refused_by_golden(tiny_copy: Path, altered: float) -> None:
    golden = read_golden(tiny_copy / "golden.npz")
    fp32 = {name: array * altered for name, array in golden.fp32.items()}
    (tiny_copy / "golden.npz").write_bytes(encode_golden(dataclasses.replace(golden, fp32=fp32)))
    rehash(tiny_copy)
    assert refusal(tiny_copy).promise == "golden"


def test_swapped_labels_are_refused_by_manifest(tiny_copy: Path) -> None:
    rehash(tiny_copy, labels=["positive", "negative"])
    assert refusal(tiny_copy).promise == "manifest"


def test_altered_promises_are_refused_by_promises(tiny_copy: Path) -> None:
    contract = tiny_copy / "contract.json"
    contract.write_text(contract.read_text().replace("0.06", "0.6"))
    rehash(tiny_copy)
    assert refusal(tiny_copy).promise == "promises"


def test_promises_looser_than_the_device_asks_are_refused_by_profile(make_bundle: Any) -> None:
    refused = refusal(make_bundle(promises={"latency_p95_s": 60.0}).path)
    assert refused.promise == "profile" and "latency_p95_s" in refused.what


def test_a_latency_promise_for_a_shorter_input_is_refused_by_profile(tiny_bundle: Any) -> None:
    device = profile(latency_p95_s=1.0, latency_length=128)
    assert refusal(tiny_bundle.path, device).promise == "profile"


def test_an_altered_tokenizer_is_refused_by_golden_raw(tiny_copy: Path) -> None:
    path = tiny_copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["great"], vocabulary["awful"] = vocabulary["awful"], vocabulary["great"]
    path.write_text(json.dumps(tokenizer))
    rehash(tiny_copy)
    assert refusal(tiny_copy).promise == "golden_raw"


def test_an_impossible_latency_is_refused_by_latency(make_bundle: Any) -> None:
    bundle = make_bundle(promises={"latency_p95_s": 1e-9})
    refused = refusal(bundle.path, profile(latency_p95_s=1e-9))
    assert refused.promise == "latency_p95_s"
    assert "best of 3" in refused.what
    assert refused.report is not None
    assert refused.report.latency_p95_s is not None and refused.report.latency_p95_s > 1e-9


def test_an_impossible_memory_budget_is_refused_by_memory(make_bundle: Any) -> None:
    bundle = make_bundle(promises={"memory_bytes": 1000})
    assert refusal(bundle.path, profile(memory_bytes=1000), alone=True).promise == "memory_bytes"


def test_without_a_budget_memory_is_told_and_not_judged() -> None:
    device = msgspec.structs.replace(profile(), budgets=Budgets())
    check = check_memory(123, device)
    assert (check.passed, check.skipped, check.measured, check.promised) == (True, True, 123, None)
