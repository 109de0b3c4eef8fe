"""Finished stages kept by the digest of all that went into them, so an export resumes and profiles share.

``ROOT/<stage>/<digest>/`` holds a result's files. It is built in ``<digest>.part`` and renamed when whole: a killed
export leaves a part, never half a result. A lock file per result keeps two exports from building the same one at
once; the kernel releases it when its holder dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from aios_edge.digest import canonical_json, sha256_bytes, sha256_file
from aios_edge.errors import AiosEdgeError, ResourceError

_NO_ROOM_BYTES = 1_000_000


class StageCache:
    """Results under ``root``. ``built`` and ``reused`` list what happened, as (stage, digest)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.built: list[tuple[str, str]] = []
        self.reused: list[tuple[str, str]] = []

    def produce(
        self, stage: str, ingredients: dict[str, Any], build: Callable[[Path], None], *, resumes: bool = False
    ) -> Path:
        """The directory of the result; ``build`` fills an empty one if there is none yet.

        With ``resumes`` the part of a killed build is handed to the next one as it is; it must itself see to
        writing its checkpoints atomically.
        """
        digest = digest_of(stage, ingredients)
        target = self.root / stage / digest
        if target.is_dir():
            self.reused.append((stage, digest))
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(target.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            remedy = "Choose another place with --cache"
            raise ResourceError(
                f"can't be written ({error.strerror})", where=str(target.parent), remedy=remedy
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():  # another export may have built it while we waited
                part = target.with_suffix(".part")
                if not resumes:
                    shutil.rmtree(part, ignore_errors=True)
                part.mkdir(exist_ok=True)
                with _full_disk_said(part):
                    build(part)
                    part.rename(target)
            self.built.append((stage, digest))
        finally:
            os.close(lock)  # the file stays: removing it under one who waits would let a third in beside them
        return target


@contextmanager
def _full_disk_said(folder: Path) -> Iterator[None]:
    """A full disk as one error: torch, onnx and safetensors each say it with a kind of their own."""
    try:
        yield
    except AiosEdgeError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and shutil.disk_usage(folder).free > _NO_ROOM_BYTES:
            raise
        remedy = "Free some space or choose another place with --cache, then run the same command again"
        raise ResourceError("the disk is full", where=str(folder.parent), remedy=remedy) from error


def digest_of(stage: str, ingredients: dict[str, Any]) -> str:
    """The digest that names a result."""
    return sha256_bytes(canonical_json({"stage": stage, "in": ingredients}))[:32]


def code_digest(*modules: ModuleType) -> str:
    """Stands for the code of a stage, so that changed code never meets an old result."""
    files = [Path(module.__file__ or "") for module in modules]
    return sha256_bytes(canonical_json([sha256_file(file) for file in files]))[:16]


def folder_digest(folder: Path, names: Sequence[str] | None = None) -> str:
    """Digest of a folder's files by name and content (all of them, or those named)."""
    files = [folder / name for name in names] if names else sorted(p for p in folder.rglob("*") if p.is_file())
    return sha256_bytes(canonical_json([[str(p.relative_to(folder)), sha256_file(p)] for p in files]))[:32]
