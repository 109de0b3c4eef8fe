"""The form of a bundle: fixed names, limits, and which paths a file in it may have. Pure.

Limits hold for directories and archives alike. They are far above what a real bundle needs and far below what
hurts the smallest device.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from aios_edge.errors import BundleRefused
from aios_edge.manifest import Manifest

MANIFEST = "manifest.json"
CONTRACT = "contract.json"
#: For people and for audits; a bundle without them (from an earlier exporter) is as valid.
MODEL_CARD = "MODEL_CARD.md"
SBOM = "sbom.cdx.json"

MAX_FILES = 256
MAX_DEPTH = 4  # path parts, the file itself included
MAX_PATH_CHARS = 200
MAX_DOCUMENT_BYTES = 1 << 20  # manifest.json and contract.json, each
MAX_TOTAL_BYTES = 8_000_000_000


def path_fault(path: str) -> str | None:
    """Why a name can't be the path of a file in a bundle, or None if it can.

    One plain spelling per file: relative POSIX, printable, no ``.`` or ``..``, no back slash or colon (a drive or a
    stream elsewhere), so that every tool that reads the bundle means the same file.
    """
    if not path or len(path) > MAX_PATH_CHARS:
        return f"is empty or longer than {MAX_PATH_CHARS} characters"
    if "\\" in path or ":" in path or not path.isprintable():
        return "has a back slash, a colon or a control character"
    if path.startswith("/"):
        return "is absolute"
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty, '.' or '..' part"
    if any(part.endswith((" ", ".")) for part in parts):
        return "has a part that ends in a space or a full stop"
    if len(parts) > MAX_DEPTH:
        return f"is deeper than {MAX_DEPTH} levels"
    return None


def check_paths(paths: Iterable[str], *, where: str, check: str = "unlisted") -> None:
    """Refuse paths that are malformed, doubled, differ only in case, too many, or use a file as a folder."""
    seen: dict[str, str] = {}
    folders: set[str] = set()
    for count, path in enumerate(paths, start=1):
        if count > MAX_FILES:
            raise BundleRefused(check, f"has more than {MAX_FILES} files", where=where)
        if fault := path_fault(path):
            raise BundleRefused(check, f"the path {path[:MAX_PATH_CHARS]!r} {fault}", where=where)
        key = unicodedata.normalize("NFC", path).casefold()
        if key in seen:
            what = "is there twice" if seen[key] == path else f"differs from {seen[key]!r} only in case"
            raise BundleRefused(check, f"the path {path!r} {what}", where=where)
        seen[key] = path
        folders.update(str(parent) for parent in PurePosixPath(key).parents)
    for key in folders & seen.keys():
        raise BundleRefused(check, f"the path {seen[key]!r} is a file and a folder", where=where)


def model_files(manifest: Manifest) -> tuple[str, ...]:
    """Paths of the model and its external data, which is named after it (``model.onnx``, ``model.onnx.data``)."""
    return tuple(entry.path for entry in manifest.files if entry.path.startswith(manifest.model))


def is_bundle(path: Path) -> bool:
    """Whether a directory looks like a bundle: it has a manifest and a contract. Says nothing about validity."""
    return (path / MANIFEST).is_file() and (path / CONTRACT).is_file()
