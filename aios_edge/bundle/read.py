"""Open a bundle. Reading executes nothing, follows no link and writes nothing; it needs no numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios_edge.bundle.checks import (
    check_digest,
    check_manifest,
    check_promises,
    check_size,
    check_unlisted,
    parse_contract,
    parse_manifest,
)
from aios_edge.bundle.layout import MANIFEST, path_fault
from aios_edge.contract import Contract
from aios_edge.digest import canonical_json, sha256_bytes
from aios_edge.errors import UsageError
from aios_edge.manifest import Manifest

_BUNDLES_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A directory that is a bundle. ``bundle_id`` is the sha256 of the canonical manifest."""

    path: Path
    manifest: Manifest
    contract: Contract
    bundle_id: str

    def file(self, name: str) -> Path:
        """Absolute path of a file of the bundle; raises :class:`UsageError` for one the manifest doesn't list."""
        if path_fault(name) or all(name != entry.path for entry in self.manifest.files):
            raise UsageError(f"the bundle has no file {name!r}", where=str(self.path))
        return self.path / name

    @property
    def total_bytes(self) -> int:
        """Everything in the directory, the manifest included."""
        return sum(entry.size_bytes for entry in self.manifest.files) + (self.path / MANIFEST).stat().st_size


def bundle_id(document: dict[str, Any]) -> str:
    """The id of a bundle from its manifest as decoded JSON, fields of newer minor schemas included."""
    return sha256_bytes(canonical_json(document))


def read_manifest(path: Path | str) -> Manifest:
    """The manifest alone, checked for ``schema`` only."""
    return parse_manifest(_directory(Path(path)))[0]


def open_bundle(path: Path | str, *, verify: bool = True) -> Bundle:
    """Open the bundle in a directory.

    With ``verify``, runs the checks ``schema``, ``unlisted``, ``digest``, ``manifest``, ``promises``, ``size`` in this
    order and raises :class:`~aios_edge.errors.BundleRefused` named after the first that fails; without, only what is
    needed to parse manifest and contract, for a reader whose bundle was verified before. Raises
    :class:`~aios_edge.errors.UsageError` when the path is no directory, or one that holds bundles.
    """
    root = _directory(Path(path))
    manifest, document = parse_manifest(root)
    if verify:
        check_unlisted(root, manifest)
        check_digest(root, manifest)
    contract = parse_contract(root)
    if verify:
        check_unlisted(root, manifest, contract)  # again, now that the golden file's name is known
        check_manifest(root, manifest, document, contract)
        check_promises(root, manifest, contract)
        check_size(root, manifest, contract)
    return Bundle(path=root, manifest=manifest, contract=contract, bundle_id=bundle_id(document))


def _bundles_in(folder: Path) -> list[Path]:
    """Those that an export wrote there, one for each profile; not what it keeps in hidden folders."""
    return sorted(found.parent for found in folder.glob(f"[!.]*/{MANIFEST}"))


def _directory(path: Path) -> Path:
    path = path.absolute()
    if path.is_dir():
        if not (path / MANIFEST).exists() and (inside := _bundles_in(path)):
            more = ", …" if len(inside) > _BUNDLES_NAMED else ""
            named = " or ".join(str(folder) for folder in inside[:_BUNDLES_NAMED])
            raise UsageError(f"has no {MANIFEST}", where=str(path), remedy=f"Did you mean {named}{more}?")
        return path
    if path.suffix == ".zip" and path.is_file():
        raise UsageError(
            "is the transport form of a bundle, which can't be run as it is",
            where=str(path),
            remedy=f"Unpack it first: aios-edge bundle unpack {path}",
        )
    what = "is not a directory" if path.exists() else "doesn't exist"
    raise UsageError(what, where=str(path), remedy="Name the folder that 'aios-edge export' wrote")
