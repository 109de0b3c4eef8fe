"""Finished stages kept by the digest of all that went into them, so an export resumes and profiles share.

``ROOT/<stage>/<digest>/`` holds a result's files. It is built in ``<digest>.part`` and renamed when whole: a killed
export leaves a part, never half a result. A lock file per result keeps two exports from building the same one at
once; the kernel releases it when its holder dies. A result that isn't as it was written is built again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from aios_edge.digest import canonical_json, sha256_bytes, sha256_file
from aios_edge.errors import AiosEdgeError, ResourceError
from exporters import memory
from exporters.seal import damage, seal

_NO_ROOM_BYTES = 1_000_000
_TRACEBACK = "traceback.txt"


class StageCache:
    """Results under ``root``. ``built`` and ``reused`` list what happened, as (stage, digest); ``damaged`` what was
    found spoilt, in words. ``say`` is told what a person who waits should know."""

    def __init__(self, root: Path, *, say: Callable[[str], None] = lambda text: None) -> None:
        self.root = root
        self.built: list[tuple[str, str]] = []
        self.reused: list[tuple[str, str]] = []
        self.damaged: list[str] = []
        self._say = say
        self._whole: set[Path] = set()

    def produce(
        self, stage: str, ingredients: dict[str, Any], build: Callable[[Path], None], *, resumes: bool = False
    ) -> Path:
        """The directory of the result; ``build`` fills an empty one if there is none yet.

        With ``resumes`` the part of a killed build is handed to the next one as it is; it must itself see to
        writing its checkpoints atomically.
        """
        digest = digest_of(stage, ingredients)
        target = self.root / stage / digest
        if self._is_whole(target):
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
            self._take(lock, stage)
            if not self._is_whole(target):  # another export may have built it while we waited
                self._discard(target)
                part = target.with_suffix(".part")
                if not resumes:
                    shutil.rmtree(part, ignore_errors=True)
                part.mkdir(exist_ok=True)
                (part / _TRACEBACK).unlink(missing_ok=True)
                with _failures_said(stage, part):
                    build(part)
                    seal(part)
                    part.rename(target)
                self._whole.add(target)
            self.built.append((stage, digest))
        finally:
            os.close(lock)  # the file stays: removing it under one who waits would let a third in beside them
        return target

    def _is_whole(self, target: Path) -> bool:
        """Whether the result is there as it was written; read once by each export."""
        if target not in self._whole and target.is_dir() and damage(target) is None:
            self._whole.add(target)
        return target in self._whole

    def _discard(self, target: Path) -> None:
        if not target.is_dir():
            return
        what = f"the kept result {target.parent.name}/{target.name} was damaged ({damage(target)}) and is built again"
        self.damaged.append(what)
        self._say(what)
        shutil.rmtree(target)

    def _take(self, lock: int, stage: str) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._say(f"another export builds {stage}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)


@contextmanager
def _failures_said(stage: str, part: Path) -> Iterator[None]:
    """No memory, no room, or anything else that a library raises, as one error of ours that names the stage."""
    try:
        yield
    except Exception as error:
        if memory.ran_out(error) and not isinstance(error, ResourceError):
            raise memory.out_of_memory(error, stage) from error
        if isinstance(error, AiosEdgeError):
            raise
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # torch, onnx and safetensors each say it with a kind of their own
        if full or shutil.disk_usage(part).free <= _NO_ROOM_BYTES:
            remedy = "Free some space or choose another place with --cache, then run the same command again"
            raise ResourceError("the disk is full", where=str(part.parent), remedy=remedy) from error
        if isinstance(error, OSError):
            raise
        (part / _TRACEBACK).write_text(traceback.format_exc(), encoding="utf-8")
        what = f"ended with {type(error).__name__} ({error})"
        remedy = f"Please report it with {part / _TRACEBACK}"
        raise AiosEdgeError(what, where=f"stage {stage}", remedy=remedy) from error


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
