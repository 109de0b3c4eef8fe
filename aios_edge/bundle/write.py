"""Write a bundle: whole or not at all."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from aios_edge.bundle.checks import manifest_sha256
from aios_edge.bundle.layout import CONTRACT, MANIFEST, check_paths, is_bundle
from aios_edge.bundle.read import Bundle, open_bundle
from aios_edge.contract import Contract
from aios_edge.digest import sha256_bytes, sha256_file
from aios_edge.errors import ResourceError, UsageError
from aios_edge.golden import Golden, encode_golden
from aios_edge.manifest import FileEntry, Manifest

_STAGE = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_bundle(
    target: Path, manifest: Manifest, contract: Contract, files: Mapping[str, Path | bytes], golden: Golden
) -> Bundle:
    """Write a bundle into the directory ``target`` and return it, verified.

    ``manifest.files`` and the digests in ``golden`` are filled in here, whatever they held. ``files`` maps paths in
    the bundle (the model, its external data, the tokenizer) to a file to copy or to bytes; contract and golden
    samples are added. Files are copied, not linked: altering a bundle must not alter the exporter's cache.

    An existing ``target`` is replaced in one step if it is a bundle or an empty directory, else
    :class:`UsageError`. On any failure nothing half-written remains: :class:`ResourceError` for a full disk,
    :class:`BundleRefused` when the parts don't make a valid bundle.
    """
    target = target.absolute()
    contract_data = _pretty(contract)
    golden = dataclasses.replace(
        golden,
        contract_sha256=sha256_bytes(contract_data),
        manifest_sha256=manifest_sha256(msgspec.to_builtins(manifest)),
    )
    contents: dict[str, Path | bytes] = {
        **files,
        CONTRACT: contract_data,
        contract.golden.file: encode_golden(golden),
    }
    check_paths([MANIFEST, *contents], where=str(target))
    needed_bytes = sum(_size(content) for content in contents.values())
    with staging(target, needed_bytes=needed_bytes) as stage:
        entries = []
        for name in sorted(contents):
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, contents[name])
            entries.append(FileEntry(path=name, sha256=sha256_file(path), size_bytes=path.stat().st_size))
        write_file(stage / MANIFEST, _pretty(msgspec.structs.replace(manifest, files=tuple(entries))))
        bundle = open_bundle(stage)
    return dataclasses.replace(bundle, path=target)


@contextmanager
def staging(target: Path, *, needed_bytes: int) -> Iterator[Path]:
    """A new directory beside ``target`` that takes its place when the block ends well, and vanishes when not."""
    check_replaceable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        stage, held = _new_stage(target)
    except OSError as error:
        raise _refused(error, target, needed_bytes) from error
    try:
        stage.chmod(0o755)  # mkdtemp's 0700 would hide the bundle from the agent's user
        yield stage
        for folder in [stage, *(path for path in stage.rglob("*") if path.is_dir())]:
            sync_directory(folder)
        _replace(stage, target)
        sync_directory(target.parent)
    except OSError as error:
        raise _refused(error, target, needed_bytes) from error
    finally:  # after a success it is gone, or holds the bundle that was replaced
        shutil.rmtree(stage, ignore_errors=True)
        os.close(held)


def _new_stage(target: Path) -> tuple[Path, int]:
    """A fresh directory and the descriptor that holds it: its lock tells a living writer's from a killed one's."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_STAGE, dir=target.parent))
        held = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # some network file systems have no locks for directories
            fcntl.flock(held, fcntl.LOCK_EX)
        if stage.is_dir():  # another writer may have swept it before it was held
            return stage, held
        os.close(held)


def _sweep(target: Path) -> None:
    """Remove what writers of the same target left behind when they were killed."""
    for stage in target.parent.glob(f".{glob.escape(target.name)}.*{_STAGE}"):
        with suppress(OSError):  # a living writer holds it, or it is gone already
            held = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stage, ignore_errors=True)
            finally:
                os.close(held)


def check_replaceable(target: Path) -> None:
    """Raise :class:`UsageError` unless ``target`` is free, an empty directory, or a bundle."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError("exists and is not a directory", where=str(target), remedy="Choose another place")
    if target.is_dir() and any(target.iterdir()) and not is_bundle(target):
        raise UsageError(
            "is a directory with other things in it, so it isn't replaced",
            where=str(target),
            remedy="Choose another place or empty it",
        )


def write_file(path: Path, content: Path | bytes) -> None:
    """Write or copy a new file and see it on the disk."""
    with path.open("xb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """See a directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(stage: Path, target: Path) -> None:
    """Put ``stage`` in the place of ``target``; what was there ends up at ``stage``."""
    if not target.exists() or not any(target.iterdir()):
        stage.rename(target)  # POSIX replaces an empty directory in one step
        return
    if _exchange(stage, target):
        return
    aside = stage.with_suffix(".old")
    target.rename(aside)
    try:
        stage.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(stage)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two paths in one step (Linux, most file systems); False where that isn't possible."""
    at_cwd, rename_exchange = -100, 2
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(rename(at_cwd, os.fsencode(left), at_cwd, os.fsencode(right), rename_exchange) == 0)
    return False


def _pretty(value: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _size(content: Path | bytes) -> int:
    if isinstance(content, bytes):
        return len(content)
    try:
        return content.stat().st_size
    except OSError as error:
        raise ResourceError(f"can't be read ({error.strerror})", where=str(content)) from error


def _refused(error: OSError, target: Path, needed_bytes: int) -> ResourceError:
    if error.errno in _FULL:
        folder = target.parent
        return ResourceError(
            f"the disk is full: the bundle needs {needed_bytes} bytes, {shutil.disk_usage(folder).free} are free",
            where=str(folder),
            remedy="Free some space or choose another place, then run the same command again",
        )
    return ResourceError(f"can't be written ({error.strerror or error})", where=str(target))
