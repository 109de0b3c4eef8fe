"""Raw ONNX models: a folder in Triton's layout, ``<name>/<version>/model.onnx``, served without a bundle.

Nobody promised anything of such a model, so nothing is checked. Its manifest is made here: tensors from the session,
once a worker has opened it, and empty where a bundle's exporter would have something to say. That way the rest of the
agent serves it as it serves any bundle; what differs asks :func:`is_raw`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from aios_edge.bundle.checks import NAME
from aios_edge.bundle.read import Bundle, bundle_id
from aios_edge.contract import CONTRACT_SCHEMA, Contract, GoldenSpec
from aios_edge.digest import sha256_file
from aios_edge.errors import BundleRefused, SettingsError
from aios_edge.manifest import (
    MANIFEST_SCHEMA,
    FileEntry,
    Manifest,
    Measured,
    Provenance,
    SessionSpec,
    Softmax,
    TensorSpec,
    TextInput,
)
from device_agent.settings import BundleEntry, Repository
from device_agent.values import ActivationReport

MODEL = "model.onnx"
TRITON_CONFIG = "config.pbtxt"
NO_CONTRACT = "no contract: nothing was promised, nothing is checked"
_NO_TASK = "none"
_LAYOUT = f"Lay it out as <name>/<version>/{MODEL}, the version a number"


class RawEntry(BundleEntry, frozen=True, kw_only=True):
    """A model's folder in the repository: ``path`` is ``<repository>/<name>``."""


def repository_entries(repository: Repository | None) -> tuple[RawEntry, ...]:
    """Every folder of the repository is a model, hidden ones left out. Raises :class:`SettingsError` for a repository
    that can't be read."""
    if repository is None:
        return ()
    try:
        folders = sorted(path for path in repository.path.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError as error:
        raise SettingsError(
            f"the repository can't be read ({error.strerror})", where=str(repository.path), remedy=_LAYOUT
        ) from error
    return tuple(RawEntry(path=path) for path in folders)


def open_raw(folder: Path) -> Bundle:
    """A model's highest version, before anything of it was read. Raises :class:`BundleRefused` (``repository``)."""
    if NAME.fullmatch(folder.name) is None:
        what = f"the model's name {folder.name!r} is not letters, digits, '.', '_', '-'"
        raise BundleRefused("repository", what, where=str(folder), remedy="Rename the folder")
    try:
        numbers = [path for path in folder.iterdir() if _is_version(path.name) and _model_of(path) is not None]
    except OSError as error:
        raise BundleRefused("repository", f"can't be read ({error.strerror})", where=str(folder)) from error
    if not numbers:
        raise BundleRefused("repository", "has no version with a model", where=str(folder), remedy=_LAYOUT)
    version = max(numbers, key=lambda path: int(path.name))
    return raw_bundle(_model_of(version) or version, folder.name, version.name)


def raw_bundle(root: Path, name: str, version: str) -> Bundle:
    """A bundle that promises nothing, of the files in ``root``; its tensors aren't known yet, its digests not taken."""
    manifest = Manifest(
        schema=MANIFEST_SCHEMA,
        name=name,
        version=version,
        task=_NO_TASK,
        profile="",
        precision="fp32",  # whatever it is: nothing reads it
        labels=(),
        inputs=(),
        outputs=(),
        preprocess=TextInput(tokenizer="", max_length=0, pad_id=0),
        postprocess=Softmax(output=""),
        session=SessionSpec(),
        max_batch_size=1,  # requests pass through as they are
        provenance=Provenance(source=str(root), candidate="", recipe_sha256="", data="", finetune=""),
        licence="",
        measured=Measured(accuracy=0.0, accuracy_drop=0.0, agreement=0.0, size_bytes=0),
        model=MODEL,
        files=(FileEntry(path=MODEL, sha256="", size_bytes=0),),
    )
    contract = Contract(
        schema=CONTRACT_SCHEMA, profile="", promises=(), golden=GoldenSpec(count=0, min_agreement=0.0, tolerance={})
    )
    return Bundle(path=root.absolute(), manifest=manifest, contract=contract, bundle_id="")


def digested(bundle: Bundle) -> Bundle:
    """With the digests of all its files, and an id made of them: other weights are another model. Raises
    :class:`BundleRefused` (``repository``) for what is no file of the model's own."""
    paths = own_files(bundle.path)
    files = tuple(
        FileEntry(
            path=path.relative_to(bundle.path).as_posix(), sha256=sha256_file(path), size_bytes=path.stat().st_size
        )
        for path in paths
    )
    identity = {"name": bundle.manifest.name, "version": bundle.manifest.version, "files": msgspec.to_builtins(files)}
    manifest = msgspec.structs.replace(bundle.manifest, files=files)
    return replace(bundle, manifest=manifest, bundle_id=bundle_id(identity))


def own_files(root: Path) -> list[Path]:
    """The files in ``root``. Whoever may put a model there must not have the agent read what else there is on the
    device, or wait for a pipe: raises :class:`BundleRefused` (``repository``) for links that lead out of the model's
    folder, and for what is neither file nor folder."""
    home = root.parent.parent if root.name == MODEL else root.parent
    allowed = {home.resolve(), root.resolve()}  # a whole version, or model, may be linked from elsewhere
    found: list[Path] = []
    for folder, names, files in os.walk(root):
        for path in (Path(folder, name) for name in (*names, *files)):
            if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
                what = f"{path.relative_to(root)} is a link that leads out of the model's folder"
                raise BundleRefused("repository", what, where=str(root), remedy="Put the file itself there")
            if path.is_file():
                found.append(path)
            elif not path.is_dir():
                what = f"{path.relative_to(root)} is neither a file nor a folder"
                raise BundleRefused("repository", what, where=str(root), remedy="Remove it")
    return sorted(found)


def is_raw(manifest: Manifest) -> bool:
    """Whether it was made here, and not read from a bundle."""
    return manifest.task == _NO_TASK


def contract_of(entry: BundleEntry) -> Literal["checked", "none"]:
    """Whether what lies at an entry promises anything."""
    return "none" if isinstance(entry, RawEntry) else "checked"


def with_tensors(bundle: Bundle, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Bundle:
    """A raw model with its session's tensors."""
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, inputs=inputs, outputs=outputs))


def as_loaded(bundle: Bundle, report: ActivationReport) -> Bundle:
    """A bundle as its worker found it: of a raw model only the worker knows tensors and digest."""
    if not is_raw(bundle.manifest):
        return bundle
    return replace(with_tensors(bundle, report.inputs, report.outputs), bundle_id=report.bundle_id)


def notes(bundle: Bundle) -> str:
    """What a person should know who takes the model for a bundle or the folder for Triton's."""
    config = (folder / TRITON_CONFIG for folder in (bundle.path, bundle.path.parent, bundle.path.parent.parent))
    ignored = f"; {TRITON_CONFIG} is ignored: tensors are the model's own, requests are never put together"
    return NO_CONTRACT + (ignored if any(path.exists() for path in config) else "")


def _model_of(version: Path) -> Path | None:
    """The folder with the model's file. With external data beside it Triton has one named as the file would be."""
    for folder in (version, version / MODEL):
        if (folder / MODEL).is_file():
            return folder
    return None


def _is_version(name: str) -> bool:
    """A number as Triton writes them: without zeros in front."""
    return name.isascii() and name.isdigit() and name[0] != "0"
