"""The named checks of a bundle. Each takes values or a directory and raises ``BundleRefused(<name>)``.

``schema``    the manifest is one we can read
``unlisted``  the directory holds exactly the files the manifest lists, all of them plain files
``digest``    every file has the size and sha256 the manifest says
``manifest``  the manifest is the one that the golden samples were recorded for
``promises``  contract, golden samples and what the exporter measured agree with each other
``size``      the model and the bundle are as large as measured and no larger than promised
"""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import msgspec

from aios_edge import contract as c
from aios_edge.bundle.layout import (
    CONTRACT,
    MANIFEST,
    MAX_DOCUMENT_BYTES,
    MAX_FILES,
    MAX_TOTAL_BYTES,
    check_paths,
    model_files,
    path_fault,
)
from aios_edge.contract import CONTRACT_SCHEMA, Contract, Promise
from aios_edge.digest import canonical_json, sha256_bytes, sha256_file
from aios_edge.errors import BundleRefused
from aios_edge.golden import MIN_SAMPLES, read_seal
from aios_edge.manifest import MANIFEST_SCHEMA, Manifest
from aios_edge.provider_options import options_fault

CHECKS = ("schema", "unlisted", "digest", "manifest", "promises", "size")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # goes into URLs and MQTT topics as it is
_SEMVER = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAME = 1e-6  # figures written by one exporter run are the same number, not nearly the same


def _document(path: Path, check: str) -> bytes:
    """The bytes of a small JSON document, never through a link."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleRefused("unlisted", "is a link or not a plain file", where=str(path))
        if status.st_size > MAX_DOCUMENT_BYTES:
            raise BundleRefused(check, f"is larger than {MAX_DOCUMENT_BYTES} bytes", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise BundleRefused(
            check, f"can't be read ({error.strerror})", where=str(path), remedy="A bundle is a folder with it inside"
        ) from error


def _decode(data: bytes, path: Path, check: str, supported: str) -> dict[str, Any]:
    """The JSON object, its schema version judged before anything else in it."""
    try:
        document = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleRefused(check, f"is not a JSON object ({error})", where=str(path)) from error
    schema = document.get("schema")
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", schema) if isinstance(schema, str) else None
    if match is None:
        raise BundleRefused(check, f"has no schema 'major.minor' (found {schema!r})", where=str(path))
    if match[1] != supported.partition(".")[0]:
        raise BundleRefused(
            check,
            f"has schema {schema}, this aios-edge reads {supported.partition('.')[0]}.x",
            where=str(path),
            remedy=f"Use an aios-edge that reads schema {match[1]}.x, or export the bundle again with this one",
        )
    return document


def parse_manifest(root: Path) -> tuple[Manifest, dict[str, Any]]:
    """Check ``schema``: the manifest as a value and as it lies on disk (a newer minor may say more than we know)."""
    path = root / MANIFEST
    document = _decode(_document(path, "schema"), path, "schema", MANIFEST_SCHEMA)
    try:
        manifest = msgspec.convert(document, Manifest)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BundleRefused("schema", f"is not a manifest ({error})", where=str(path)) from error

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise BundleRefused("schema", what, where=str(path))

    require(NAME.fullmatch(manifest.name) is not None, f"name {manifest.name!r} is not letters, digits, '.', '_', '-'")
    require(_SEMVER.fullmatch(manifest.version) is not None, f"version {manifest.version!r} is not SemVer")
    require(manifest.max_batch_size >= 1, "max_batch_size is less than 1")
    require(len(manifest.labels) == len(set(manifest.labels)) > 0, "labels are empty or not unique")
    require(bool(manifest.inputs and manifest.outputs), "inputs or outputs are empty")
    for threads in (manifest.session.intra_op_threads, manifest.session.inter_op_threads):
        require(threads is None or threads >= 1, "session has less than 1 thread")
    fault = options_fault(manifest.provider_options)
    require(fault is None, f"provider_options {fault}")
    for entry in manifest.files:
        require(_SHA256.fullmatch(entry.sha256) is not None, f"sha256 of {entry.path!r} is not 64 hex digits")
        require(entry.size_bytes >= 0, f"size of {entry.path!r} is negative")
    return manifest, document


def parse_contract(root: Path) -> Contract:
    """The contract as a value; part of check ``promises``."""
    path = root / CONTRACT
    document = _decode(_document(path, "promises"), path, "promises", CONTRACT_SCHEMA)
    try:
        return msgspec.convert(document, Contract)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BundleRefused("promises", f"is not a contract ({error})", where=str(path)) from error


def check_unlisted(root: Path, manifest: Manifest, contract: Contract | None = None) -> None:
    """The files of the directory are exactly those listed, and what the manifest refers to is among them."""
    listed = [entry.path for entry in manifest.files]
    check_paths([MANIFEST, *listed], where=str(root / MANIFEST))
    needed = [CONTRACT, manifest.model, manifest.preprocess.tokenizer]
    for name in needed + ([contract.golden.file] if contract else []):
        if name not in listed:
            raise BundleRefused("unlisted", f"needs {name!r} but doesn't list it", where=str(root / MANIFEST))
    found = _walk(root)
    for path in sorted(set(found) - {MANIFEST, *listed}):
        raise BundleRefused(
            "unlisted", f"holds {path!r}, which its manifest doesn't list", where=str(root), remedy="Export it again"
        )
    for path in sorted(set(listed) - set(found)):
        raise BundleRefused("unlisted", f"lacks {path!r}, which its manifest lists", where=str(root))


def _walk(root: Path) -> list[str]:
    """Relative paths of all files, refusing links, devices, empty folders and whatever else isn't a plain file or the
    folder of one."""
    found: list[str] = []
    folders = [(root, "")]
    while folders:
        folder, prefix = folders.pop()
        empty = True
        with os.scandir(folder) as entries:
            for entry in entries:
                empty = False
                path = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if fault := path_fault(path + "/x"):
                        raise BundleRefused("unlisted", f"the folder {path!r} {fault}", where=str(root))
                    folders.append((Path(entry.path), path + "/"))
                elif entry.is_file(follow_symlinks=False):
                    found.append(path)
                else:
                    raise BundleRefused("unlisted", f"{path!r} is a link or not a plain file", where=str(root))
                if len(found) + len(folders) > 2 * MAX_FILES:
                    raise BundleRefused("unlisted", f"holds more than {MAX_FILES} files", where=str(root))
        if empty:
            what = f"holds the empty folder {prefix.rstrip('/')!r}, which no listed file is in"
            raise BundleRefused("unlisted", what, where=str(root), remedy="Remove it")
    return found


def check_digest(root: Path, manifest: Manifest) -> None:
    """Size first, because it is free; then sha256."""
    if sum(entry.size_bytes for entry in manifest.files) > MAX_TOTAL_BYTES:
        raise BundleRefused("digest", f"lists more than {MAX_TOTAL_BYTES} bytes", where=str(root / MANIFEST))
    for entry in manifest.files:
        path = root / entry.path
        if (size := path.lstat().st_size) != entry.size_bytes:
            raise BundleRefused("digest", f"has {size} bytes, its manifest says {entry.size_bytes}", where=str(path))
        if sha256_file(path) != entry.sha256:
            raise BundleRefused(
                "digest", "was altered: its sha256 is not the manifest's", where=str(path), remedy="Fetch it again"
            )


def manifest_sha256(document: dict[str, Any]) -> str:
    """What golden samples carry of a manifest: the digest of its canonical form, fields of newer minor schemas
    included, without the list of files. That list holds the digest of the samples themselves."""
    return sha256_bytes(canonical_json({key: value for key, value in document.items() if key != "files"}))


def check_manifest(root: Path, manifest: Manifest, document: dict[str, Any], contract: Contract) -> None:
    """Labels, session, measured figures and all the rest are those that the golden samples were recorded for.

    Swapped labels invert every answer and leave all outputs as recorded, so nothing else would find them. Fields that
    somebody added for newer readers don't count: this one ignores them.
    """
    where = str(root / MANIFEST)
    sealed = read_seal(root / contract.golden.file).manifest_sha256
    if sealed is None:
        what = f"is not sealed: {contract.golden.file} was written by an aios-edge that didn't do so yet"
        raise BundleRefused("manifest", what, where=where, remedy="Export the bundle again with this one")
    if sealed not in (manifest_sha256(document), *(manifest_sha256(form) for form in _known_forms(manifest))):
        what = f"was altered: it is not the manifest that {contract.golden.file} was recorded for"
        raise BundleRefused("manifest", what, where=where, remedy="Fetch it again")


def _known_forms(manifest: Manifest) -> list[dict[str, Any]]:
    """The document as exporters of the minor schemas up to ours wrote it, which say the same of this manifest."""
    document: dict[str, Any] = {**msgspec.to_builtins(manifest), "schema": MANIFEST_SCHEMA}
    forms = [document]
    session = {name: value for name, value in document["session"].items() if name not in _SESSION_SINCE_1_1}
    if all(document["session"][name] is None for name in _SESSION_SINCE_1_1) and all(
        document[name] == default for name, default in _SINCE_1_1.items()
    ):
        older = {name: value for name, value in document.items() if name not in _SINCE_1_1}
        forms.append({**older, "schema": "1.0", "session": session})
    return forms


#: What schema 1.1 added to a manifest and to its session, with the value that means nothing was said.
_SINCE_1_1: dict[str, Any] = {"purpose": "serve", "provider_options": {}}
_SESSION_SINCE_1_1 = ("intra_op_threads", "inter_op_threads", "spinning")


def check_promises(root: Path, manifest: Manifest, contract: Contract) -> None:
    """Contract, golden samples and measured figures tell one story.

    The golden samples carry the sha256 of contract.json, so neither can be altered alone; a measured promise is the
    measured figure itself, so the contract can't be softened even together with the samples. What every exporter
    measures every contract promises; a budget is promised only where the profile has one.
    """
    where = str(root / CONTRACT)

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise BundleRefused("promises", what, where=where)

    require(contract.profile == manifest.profile, f"is for {contract.profile!r}, the manifest for {manifest.profile!r}")
    names = [promise.name for promise in contract.promises]
    require(len(names) == len(set(names)), "makes the same promise twice")
    measured = {
        c.ACCURACY: manifest.measured.accuracy,
        c.ACCURACY_DROP: manifest.measured.accuracy_drop,
        c.AGREEMENT: manifest.measured.agreement,
        c.SIZE: float(manifest.measured.size_bytes),
    }
    for name, figure in measured.items():
        require(_plausible(name, figure), f"measured {name} = {figure} is not possible")
        require(name in names, f"doesn't promise {name}, which every bundle does")
    for promise in contract.promises:
        require(_plausible(promise.name, promise.value), f"{promise.name} = {promise.value} is not possible")
        if promise.name in _TERMS:
            op, check = _TERMS[promise.name]
            require(promise.op == op, f"{promise.name} can't be promised with '{promise.op}'")
            require(promise.check == check, f"{promise.name} is checked '{promise.check}', not '{check}'")
        if promise.name in measured:
            _consistent(promise, measured[promise.name], where)
    for name, seen in contract.measured.items():
        require(_plausible(name, seen.value), f"measured {name} = {seen.value} is not possible")
        require(name not in contract.unmeasured, f"says of {name} that it was measured, and that it was not")
        if (promised := contract.promise(name)) is not None:
            kept, value = promised.kept_by(seen.value), _figure(promised.value)
            require(
                kept, f"promises {name} {promised.op} {value}, and {_figure(seen.value)} was measured on the target"
            )
    golden = contract.golden
    require(0 < golden.min_agreement <= 1, f"golden.min_agreement = {golden.min_agreement} is not a share")
    require(bool(golden.tolerance), "golden.tolerance is empty")
    for provider, tolerance in golden.tolerance.items():
        require(math.isfinite(tolerance) and tolerance >= 0, f"golden.tolerance of {provider} = {tolerance}")
    seal = read_seal(root / golden.file)
    require(
        seal.contract_sha256 == sha256_file(root / CONTRACT), f"is not the contract that {golden.file} was recorded for"
    )
    require(seal.count == golden.count, f"says {golden.count} golden samples, {golden.file} has {seal.count}")
    require(golden.count >= MIN_SAMPLES, f"has {golden.count} golden samples, at least {MIN_SAMPLES} are needed")


_SHARES = (c.ACCURACY, c.AGREEMENT)
#: Direction of each promise we know, and when it is checked. Else a promise that a device must check could be turned
#: into one that only the exporter can.
_TERMS = {
    c.ACCURACY: (">=", "export-only"),
    c.ACCURACY_DROP: ("<=", "export-only"),
    c.AGREEMENT: (">=", "export-only"),
    c.LATENCY_P95: ("<=", "activation"),
    c.MEMORY: ("<=", "activation"),
    c.SIZE: ("<=", "activation"),
    c.BUNDLE_SIZE: ("<=", "activation"),
}


def _plausible(name: str, value: float) -> bool:
    if not math.isfinite(value):
        return False
    if name in _SHARES:
        return 0 <= value <= 1
    if name == c.ACCURACY_DROP:
        return -1 <= value <= 1  # below zero: better than fp32 on the test split
    return value > 0 or (value == 0 and name not in _TERMS)


def _figure(value: float) -> str:
    """As a person writes it: bytes as whole numbers, never 5e+08."""
    return f"{value:.15g}"


def _consistent(promise: Promise, measured: float, where: str) -> None:
    promised, found = f"{promise.name} {promise.op} {_figure(promise.value)}", _figure(measured)
    if promise.basis == "measured" and abs(promise.value - measured) > _SAME:
        what = f"promises {promised}, but {found} was measured"
        raise BundleRefused("promises", what, where=where)
    if not promise.kept_by(measured) and abs(promise.value - measured) > _SAME:
        what = f"promises {promised}, which the measured {found} doesn't keep"
        raise BundleRefused("promises", what, where=where)


def check_size(root: Path, manifest: Manifest, contract: Contract) -> None:
    """Model files as large as measured; model and bundle within the promised sizes."""
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    model_bytes = sum(sizes[path] for path in model_files(manifest))
    if model_bytes != manifest.measured.size_bytes:
        what = f"the model has {model_bytes} bytes, {manifest.measured.size_bytes} were measured"
        raise BundleRefused("size", what, where=str(root / manifest.model))
    total_bytes = sum(sizes.values()) + (root / MANIFEST).lstat().st_size
    for name, actual in ((c.SIZE, model_bytes), (c.BUNDLE_SIZE, total_bytes)):
        promise = contract.promise(name)
        if promise is not None and not promise.kept_by(actual):
            what = f"{name} is {actual}, promised {promise.op} {_figure(promise.value)}"
            raise BundleRefused("size", what, where=str(root))
