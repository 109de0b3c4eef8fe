"""Copies of the bundles that serve, in the agent's own folder: what lies at an entry's path may be replaced any time.

    <state_dir>/bundles/<first 16 digits of the bundle's id>/

A worker that died is started from the copy, so that it comes back with the bundle whose contract was checked; and
after a swap the copy of the previous bundle is the way back.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from aios_edge.bundle.layout import MANIFEST
from aios_edge.bundle.read import Bundle, open_bundle
from aios_edge.bundle.write import staging, write_file
from aios_edge.errors import AiosEdgeError, BundleRefused, ResourceError

FOLDER = "bundles"
_ID_DIGITS = 16


def keep(bundle: Bundle, state_dir: Path) -> Path:
    """Copy a bundle, unless it was copied before; returns where. Reads and writes all of it: not for the event loop.

    Raises :class:`ResourceError` for a disk that won't have it, :class:`BundleRefused` when what lies at its path is
    another bundle by now.
    """
    target = _folder(state_dir, bundle.bundle_id)
    if _holds(target, bundle.bundle_id):
        return target
    shutil.rmtree(target, ignore_errors=True)  # damaged
    try:
        with staging(target, needed_bytes=bundle.total_bytes) as stage:
            for name in (MANIFEST, *(entry.path for entry in bundle.manifest.files)):
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                write_file(stage / name, bundle.path / name)
            if not _holds(stage, bundle.bundle_id):
                raise BundleRefused("replaced", "was replaced while it was copied", where=str(bundle.path))
    except OSError as error:  # gone while it was read
        raise ResourceError(f"can't be copied ({error.strerror})", where=str(bundle.path)) from error
    return target


def open_kept(state_dir: Path, bundle_id: str) -> Bundle | None:
    """The copy of a bundle; None where there is none, or it was damaged. Reads all of it: not for the event loop."""
    folder = _folder(state_dir, bundle_id)
    return open_bundle(folder, verify=False) if _holds(folder, bundle_id) else None


def forget_others(state_dir: Path, bundle_ids: Collection[str]) -> None:
    """Remove the copies of all bundles but these."""
    kept = {bundle_id[:_ID_DIGITS] for bundle_id in bundle_ids}
    for folder in (state_dir / FOLDER).glob("*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _folder(state_dir: Path, bundle_id: str) -> Path:
    return (state_dir / FOLDER / bundle_id[:_ID_DIGITS]).absolute()


def _holds(folder: Path, bundle_id: str) -> bool:
    """Whether the folder is that very bundle, undamaged."""
    try:
        return folder.is_dir() and open_bundle(folder).bundle_id == bundle_id
    except (AiosEdgeError, OSError):
        return False
