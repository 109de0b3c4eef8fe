from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aios_edge.bundle.checks import manifest_sha256
from aios_edge.bundle.read import open_bundle, read_manifest
from aios_edge.digest import canonical_json, sha256_bytes, sha256_file
from aios_edge.errors import BundleRefused, UsageError
from aios_edge.golden import MIN_SAMPLES, encode_golden, read_golden
from aios_edge.manifest import Softmax


def refused_by(path: Path) -> str:
    with pytest.raises(BundleRefused) as caught:
        open_bundle(path)
    return caught.value.promise


def rehash(root: Path) -> None:
    """Make the manifest agree with the files again, as a forger would."""
    manifest = json.loads((root / "manifest.json").read_text())
    for entry in manifest["files"]:
        path = root / entry["path"]
        entry["sha256"], entry["size_bytes"] = sha256_file(path), path.stat().st_size
    (root / "manifest.json").write_text(json.dumps(manifest))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def reseal(root: Path) -> None:
    """Tie the golden samples to an altered contract and manifest too."""
    golden = dataclasses.replace(
        read_golden(root / "golden.npz"),
        contract_sha256=sha256_file(root / "contract.json"),
        manifest_sha256=manifest_sha256(json.loads((root / "manifest.json").read_text())),
    )
    (root / "golden.npz").write_bytes(encode_golden(golden))
    rehash(root)


def contract_of(root: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((root / "contract.json").read_text())
    return document


def promise(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(p for p in document["promises"] if p["name"] == name)


def test_a_valid_bundle_opens_and_its_id_is_the_digest_of_the_canonical_manifest(tiny_bundle: Any) -> None:
    bundle = open_bundle(tiny_bundle.path)
    assert bundle == tiny_bundle
    assert bundle.file("model.onnx").is_file()
    document = json.loads((bundle.path / "manifest.json").read_text())
    assert bundle.bundle_id == sha256_bytes(canonical_json(document))
    assert bundle.total_bytes == sum(p.stat().st_size for p in bundle.path.rglob("*") if p.is_file())


def test_the_id_depends_on_content_not_on_white_space(tiny_copy: Path, tiny_bundle: Any) -> None:
    edit(tiny_copy / "manifest.json", lambda d: None)
    assert open_bundle(tiny_copy).bundle_id == tiny_bundle.bundle_id


def test_a_bundle_gives_only_files_it_lists(tiny_bundle: Any) -> None:
    for name in ("manifest.json", "../secret", "/etc/passwd", "nope"):
        with pytest.raises(UsageError):
            tiny_bundle.file(name)


def test_every_file_is_covered_by_the_digest_check(tiny_bundle: Any, tmp_path: Path) -> None:
    import shutil

    for index, entry in enumerate(tiny_bundle.manifest.files):
        root = Path(shutil.copytree(tiny_bundle.path, tmp_path / str(index)))
        data = bytearray((root / entry.path).read_bytes())
        data[len(data) // 2] ^= 1
        (root / entry.path).write_bytes(data)
        with pytest.raises(BundleRefused) as caught:
            open_bundle(root)
        assert caught.value.promise == "digest"
        assert entry.path in str(caught.value)


def test_a_truncated_file_is_refused_by_digest(tiny_copy: Path) -> None:
    with (tiny_copy / "model.onnx").open("r+b") as stream:
        stream.truncate(10)
    assert refused_by(tiny_copy) == "digest"


def test_an_unlisted_file_is_refused(tiny_copy: Path) -> None:
    (tiny_copy / "extra").mkdir()
    (tiny_copy / "extra" / "run.py").write_text("")
    assert refused_by(tiny_copy) == "unlisted"


@pytest.mark.parametrize("folders", ["empty", "a/b/empty"])
def test_an_empty_folder_is_refused(tiny_copy: Path, folders: str) -> None:
    (tiny_copy / folders).mkdir(parents=True)
    with pytest.raises(BundleRefused, match=f"holds the empty folder '{folders}'") as caught:
        open_bundle(tiny_copy)
    assert caught.value.promise == "unlisted"


def test_a_listed_file_may_lie_in_a_folder(make_bundle: Any) -> None:
    assert make_bundle(files={"notes/origin.txt": b"x"}).file("notes/origin.txt").is_file()


def test_a_missing_file_is_refused(tiny_copy: Path) -> None:
    (tiny_copy / "tokenizer.json").unlink()
    assert refused_by(tiny_copy) == "unlisted"


def test_links_and_pipes_are_refused_and_never_followed(tiny_copy: Path, tmp_path: Path) -> None:
    model = tiny_copy / "model.onnx"
    model.rename(tmp_path / "elsewhere.onnx")
    model.symlink_to(tmp_path / "elsewhere.onnx")
    assert refused_by(tiny_copy) == "unlisted"
    model.unlink()
    os.mkfifo(model)
    assert refused_by(tiny_copy) == "unlisted"


def test_a_linked_manifest_is_refused(tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / "manifest.json").rename(tmp_path / "manifest.json")
    (tiny_copy / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert refused_by(tiny_copy) == "unlisted"


@pytest.mark.parametrize("path", ["../model.onnx", "/etc/passwd", "a\\b", "a//b", "./a", "MODEL.onnx", "a/b/c/d/e"])
def test_hostile_paths_in_the_manifest_are_refused(tiny_copy: Path, path: str) -> None:
    edit(
        tiny_copy / "manifest.json",
        lambda d: d["files"].append({"path": path, "sha256": "0" * 64, "size_bytes": 0}),
    )
    assert refused_by(tiny_copy) == "unlisted"


def test_a_file_listed_twice_is_refused(tiny_copy: Path) -> None:
    edit(tiny_copy / "manifest.json", lambda d: d["files"].append(d["files"][0]))
    assert refused_by(tiny_copy) == "unlisted"


@pytest.mark.parametrize("needed", ["contract.json", "golden.npz", "model.onnx", "tokenizer.json"])
def test_what_a_bundle_needs_must_be_listed(tiny_copy: Path, needed: str) -> None:
    (tiny_copy / needed).unlink()

    def drop(document: dict[str, Any]) -> None:
        document["files"] = [entry for entry in document["files"] if entry["path"] != needed]

    edit(tiny_copy / "manifest.json", drop)
    assert refused_by(tiny_copy) == "unlisted"


def test_a_newer_major_schema_is_refused_with_the_version_needed(tiny_copy: Path) -> None:
    edit(tiny_copy / "manifest.json", lambda d: d.update(schema="2.3"))
    with pytest.raises(BundleRefused, match=r"reads schema 2\.x") as caught:
        open_bundle(tiny_copy)
    assert caught.value.promise == "schema"


def test_a_newer_minor_schema_is_read_with_its_unknown_fields(tiny_copy: Path, tiny_bundle: Any) -> None:
    edit(tiny_copy / "manifest.json", lambda d: d.update(schema="1.9", colour="green"))
    for _ in ("added to a bundle of ours", "sealed by a newer exporter"):
        bundle = open_bundle(tiny_copy)
        assert bundle.manifest.schema == "1.9"
        assert bundle.bundle_id != tiny_bundle.bundle_id  # the id covers fields we don't know
        reseal(tiny_copy)


def test_a_field_that_a_newer_exporter_sealed_is_not_altered_unnoticed(tiny_copy: Path) -> None:
    edit(tiny_copy / "manifest.json", lambda d: d.update(schema="1.9", colour="green"))
    reseal(tiny_copy)
    edit(tiny_copy / "manifest.json", lambda d: d.update(colour="red"))
    assert refused_by(tiny_copy) == "manifest"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff\xfe", b'{"schema": 1}', b'{"schema": "one"}', b'{"schema": "1.0"}', b"[" * 9999],
)
def test_what_is_no_manifest_is_refused_by_schema(tiny_copy: Path, content: bytes) -> None:
    (tiny_copy / "manifest.json").write_bytes(content)
    assert refused_by(tiny_copy) == "schema"


def test_the_folder_of_an_export_names_the_bundles_inside(tiny_bundle: Any, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    for name in ("rpi5", "x86-gateway", ".cache"):
        shutil.copytree(tiny_bundle.path, out / name)
    (out / "logs").mkdir()
    for opens in (open_bundle, read_manifest):
        with pytest.raises(UsageError, match=r"has no manifest\.json") as caught:
            opens(out)
        assert caught.value.remedy == f"Did you mean {out}/rpi5 or {out}/x86-gateway?"
    shutil.rmtree(out / "x86-gateway")
    with pytest.raises(UsageError, match=r"Did you mean .*/out/rpi5\?$"):
        open_bundle(out)
    shutil.rmtree(out / "rpi5")
    assert refused_by(out) == "schema"


def test_a_missing_or_huge_manifest_is_refused_by_schema(tiny_copy: Path) -> None:
    (tiny_copy / "manifest.json").write_bytes(b" " * (2 << 20))
    assert refused_by(tiny_copy) == "schema"
    (tiny_copy / "manifest.json").unlink()
    assert refused_by(tiny_copy) == "schema"


@pytest.mark.parametrize(
    "change",
    [{"name": "a/b"}, {"name": ""}, {"version": "1"}, {"max_batch_size": 0}, {"labels": ["x", "x"]}, {"inputs": []}],
)
def test_impossible_manifest_values_are_refused_by_schema(tiny_copy: Path, change: dict[str, Any]) -> None:
    edit(tiny_copy / "manifest.json", lambda d: d.update(change))
    assert refused_by(tiny_copy) == "schema"


NAMES = ("accuracy", "accuracy_drop", "agreement", "size_bytes", "bundle_size_bytes", "latency_p95_s", "memory_bytes")


@pytest.mark.parametrize("name", NAMES)
def test_an_altered_promise_is_refused_though_the_manifest_was_hashed_anew(tiny_copy: Path, name: str) -> None:
    def soften(document: dict[str, Any]) -> None:
        found = promise(document, name)
        found["value"] = found["value"] * (0.9 if found["op"] == ">=" else 2)

    edit(tiny_copy / "contract.json", soften)
    rehash(tiny_copy)
    assert refused_by(tiny_copy) == "promises"


@pytest.mark.parametrize("name", ["accuracy", "agreement", "size_bytes"])
def test_a_softened_measured_promise_is_refused_even_with_the_golden_samples_sealed_anew(
    tiny_copy: Path, name: str
) -> None:
    def soften(document: dict[str, Any]) -> None:
        found = promise(document, name)
        found["value"] = found["value"] * (0.9 if found["op"] == ">=" else 2)

    edit(tiny_copy / "contract.json", soften)
    reseal(tiny_copy)
    assert refused_by(tiny_copy) == "promises"


def test_bytes_in_a_refusal_are_whole_numbers(tiny_copy: Path) -> None:
    edit(tiny_copy / "contract.json", lambda d: promise(d, "size_bytes").update(value=500_000_000.0))
    reseal(tiny_copy)
    with pytest.raises(BundleRefused, match=r"promises size_bytes <= 500000000, but \d+ was measured"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [("accuracy", -0.1), ("accuracy", 1.5), ("memory_bytes", -1), ("latency_p95_s", 0), ("accuracy_drop", -0.5)],
)
def test_promises_that_cannot_be_are_refused(tiny_copy: Path, name: str, value: float) -> None:
    edit(tiny_copy / "contract.json", lambda d: promise(d, name).update(value=value))
    reseal(tiny_copy)
    assert refused_by(tiny_copy) == "promises"


@pytest.mark.parametrize("value", ["NaN", "1e999", "null", '"0.9"'])
def test_promises_that_are_no_numbers_are_refused(tiny_copy: Path, value: str) -> None:
    path = tiny_copy / "contract.json"
    path.write_text(path.read_text().replace('"value": 0.9', f'"value": {value}'))
    rehash(tiny_copy)
    assert refused_by(tiny_copy) == "promises"


def test_a_promise_turned_round_or_made_twice_is_refused(tiny_copy: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    edit(tiny_copy / "contract.json", lambda d: promise(d, "latency_p95_s").update(op=">="))
    reseal(tiny_copy)
    assert refused_by(tiny_copy) == "promises"
    edit(tiny_copy / "contract.json", lambda d: d.update(promises=[promise(d, "accuracy")] * 2))
    reseal(tiny_copy)
    assert refused_by(tiny_copy) == "promises"


def test_a_contract_without_promises_is_refused(tiny_copy: Path) -> None:
    edit(tiny_copy / "contract.json", lambda d: d.update(promises=[]))
    reseal(tiny_copy)
    assert refused_by(tiny_copy) == "promises"


@pytest.mark.parametrize("name", ["accuracy", "accuracy_drop", "agreement", "size_bytes"])
def test_a_contract_without_a_promise_that_every_bundle_makes_is_refused(tiny_copy: Path, name: str) -> None:
    edit(tiny_copy / "contract.json", lambda d: d["promises"].remove(promise(d, name)))
    reseal(tiny_copy)
    with pytest.raises(BundleRefused, match=f"doesn't promise {name}") as caught:
        open_bundle(tiny_copy)
    assert caught.value.promise == "promises"


@pytest.mark.parametrize("name", NAMES)
def test_a_promise_that_would_be_checked_elsewhere_is_refused(tiny_copy: Path, name: str) -> None:
    for check in {"activation", "live", "export-only"} - {promise(contract_of(tiny_copy), name)["check"]}:
        edit(tiny_copy / "contract.json", lambda d, check=check: promise(d, name).update(check=check))
        reseal(tiny_copy)
        assert refused_by(tiny_copy) == "promises"


def test_promises_of_budgets_that_a_profile_may_not_have_are_not_asked_for(tiny_copy: Path) -> None:
    budgets = ("bundle_size_bytes", "latency_p95_s", "memory_bytes")
    edit(
        tiny_copy / "contract.json",
        lambda d: d.update(promises=[p for p in d["promises"] if p["name"] not in budgets]),
    )
    reseal(tiny_copy)
    assert len(open_bundle(tiny_copy).contract.promises) == 4


def test_a_contract_for_another_profile_is_refused(tiny_copy: Path) -> None:
    edit(tiny_copy / "contract.json", lambda d: d.update(profile="rpi5"))
    reseal(tiny_copy)
    assert refused_by(tiny_copy) == "promises"


@pytest.mark.parametrize(
    ("measured", "unmeasured", "says"),
    [
        ({"latency_p95_s": 0.5}, {}, "0.5 was measured on the target"),
        ({"latency_p95_s": -1.0}, {}, "is not possible"),
        ({"memory_bytes": 1e8}, {"memory_bytes": "why"}, "that it was measured, and that it was not"),
    ],
)
def test_figures_of_the_target_that_contradict_the_contract_are_refused_by_promises(
    tiny_copy: Path, measured: dict[str, float], unmeasured: dict[str, str], says: str
) -> None:
    seen = {name: {"value": value, "unit": "s", "conditions": {}} for name, value in measured.items()}
    edit(tiny_copy / "contract.json", lambda d: d.update(measured=seen, unmeasured=unmeasured))
    reseal(tiny_copy)
    with pytest.raises(BundleRefused, match=says) as caught:
        open_bundle(tiny_copy)
    assert caught.value.promise == "promises"


def test_a_contract_of_a_newer_major_schema_is_refused(tiny_copy: Path) -> None:
    edit(tiny_copy / "contract.json", lambda d: d.update(schema="7.0"))
    reseal(tiny_copy)
    with pytest.raises(BundleRefused, match=r"schema 7\.x"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize("change", [{"count": 3}, {"min_agreement": 0}, {"tolerance": {}}, {"tolerance": {"x": -1}}])
def test_altered_golden_terms_are_refused(tiny_copy: Path, change: dict[str, Any]) -> None:
    edit(tiny_copy / "contract.json", lambda d: d["golden"].update(change))
    reseal(tiny_copy)
    assert refused_by(tiny_copy) == "promises"


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["positive", "negative"]},
        {"name": "tinier"},
        {"version": "1.0.1"},
        {"task": "token-classification"},
        {"precision": "fp16"},
        {"max_batch_size": 64},
        {"licence": "MIT"},
        {"postprocess": {"kind": "softmax", "output": "logits", "temperature": -1.0}},
        {"preprocess": {"kind": "text", "tokenizer": "tokenizer.json", "max_length": 8, "pad_id": 0, "pair": False}},
        {"session": {"graph_optimization_level": "disable", "disabled_optimizers": [], "config_entries": {}}},
        {"measured": {"accuracy": 0.95, "accuracy_drop": 0.0, "agreement": 1.0, "size_bytes": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_altered_field_of_the_manifest_is_refused_by_manifest(tiny_copy: Path, change: dict[str, Any]) -> None:
    edit(tiny_copy / "manifest.json", lambda d: d.update(change))
    assert refused_by(tiny_copy) == "manifest"


def test_a_field_that_falls_back_to_its_default_is_refused_by_manifest(make_bundle: Any) -> None:
    root = make_bundle(postprocess=Softmax(temperature=2.0)).path
    edit(root / "manifest.json", lambda d: d["postprocess"].pop("temperature"))
    assert refused_by(root) == "manifest"


def test_golden_samples_without_a_seal_of_the_manifest_say_to_export_again(tiny_copy: Path) -> None:
    path = tiny_copy / "golden.npz"
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if name != "manifest_sha256.npy"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kept.items():
            archive.writestr(name, data)
    rehash(tiny_copy)
    with pytest.raises(BundleRefused, match="xport the bundle again") as caught:
        open_bundle(tiny_copy)
    assert caught.value.promise == "manifest"


def test_fewer_golden_samples_than_a_self_test_needs_are_refused(make_bundle: Any, tiny_parts: dict[str, Any]) -> None:
    whole = tiny_parts["golden"]

    def first(count: int) -> Any:
        golden = dataclasses.replace(
            whole,
            raw=whole.raw[:count],
            length=whole.length[:count],
            **{kind: {n: a[:count] for n, a in getattr(whole, kind).items()} for kind in ("inputs", "fp32", "shipped")},
        )
        spec = msgspec.structs.replace(tiny_parts["contract"]["golden"], count=count)
        return make_bundle(golden=golden, contract={"golden": spec})

    assert first(MIN_SAMPLES).contract.golden.count == 64
    with pytest.raises(BundleRefused, match="63 golden samples, at least 64") as caught:
        first(MIN_SAMPLES - 1)
    assert caught.value.promise == "promises"


def test_golden_samples_of_another_contract_are_refused(tiny_copy: Path, make_bundle: Any) -> None:
    other = make_bundle(promises={"latency_p95_s": 0.5})
    (tiny_copy / "golden.npz").write_bytes(other.file("golden.npz").read_bytes())
    rehash(tiny_copy)
    assert refused_by(tiny_copy) == "promises"


def test_what_is_no_golden_archive_is_refused_by_golden(tiny_copy: Path) -> None:
    (tiny_copy / "golden.npz").write_bytes(b"PK\x03\x04 not really")
    rehash(tiny_copy)
    assert refused_by(tiny_copy) == "golden"


def test_a_grown_model_is_refused_by_size_though_the_manifest_was_hashed_anew(tiny_copy: Path) -> None:
    with (tiny_copy / "model.onnx.data").open("ab") as stream:
        stream.write(b"\0" * 100)
    rehash(tiny_copy)
    assert refused_by(tiny_copy) == "size"


def test_a_bundle_larger_than_promised_is_refused_by_size(make_bundle: Any) -> None:
    with pytest.raises(BundleRefused) as caught:
        make_bundle(promises={"bundle_size_bytes": 1000})
    assert caught.value.promise == "size"


def test_a_zip_is_answered_with_how_to_unpack_it(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    with pytest.raises(UsageError, match="aios-edge bundle unpack"):
        open_bundle(tmp_path / "model.zip")
    with pytest.raises(UsageError, match="doesn't exist"):
        open_bundle(tmp_path / "nothing")


def test_a_directory_name_may_end_in_zip(make_bundle: Any, tmp_path: Path) -> None:
    assert make_bundle(tmp_path / "b.zip") == open_bundle(tmp_path / "b.zip")


def test_opening_and_verifying_needs_no_numpy(tiny_bundle: Any) -> None:
    code = (
        "import sys; from aios_edge.bundle.read import open_bundle, read_manifest; "
        "read_manifest(sys.argv[1]); open_bundle(sys.argv[1]); "
        "assert not {'numpy', 'onnxruntime', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_bundle.path)], check=True, timeout=60)


def test_without_verification_manifest_and_contract_are_still_parsed(tiny_copy: Path) -> None:
    (tiny_copy / "model.onnx").unlink()
    assert open_bundle(tiny_copy, verify=False).manifest == read_manifest(tiny_copy)
    (tiny_copy / "contract.json").write_text("{}")
    with pytest.raises(BundleRefused):
        open_bundle(tiny_copy, verify=False)


def test_the_tiny_model_says_what_its_words_say(tiny_bundle: Any) -> None:
    golden = read_golden(tiny_bundle.file("golden.npz"))
    answers = golden.shipped["logits"].argmax(axis=1)
    positive, negative = {"good", "great", "superb"}, {"bad", "awful", "dreary"}
    for raw, answer in zip(golden.raw, answers, strict=True):
        words = set(raw.split())
        if len(words & (positive | negative)) == 1 and len(words) < 6:
            assert tiny_bundle.manifest.labels[answer] == ("positive" if words & positive else "negative")
    assert 0.3 < answers.mean() < 0.7
