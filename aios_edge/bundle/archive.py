"""Pack a bundle into a ``.zip`` and take it out again, from whoever sent it."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aios_edge.bundle.layout import MANIFEST, MAX_FILES, MAX_TOTAL_BYTES, check_paths
from aios_edge.bundle.read import Bundle, open_bundle
from aios_edge.bundle.write import staging, sync_directory
from aios_edge.errors import BundleRefused, ResourceError, UsageError

MAX_RATIO = 100  # unpacked to packed; text and weights of a real bundle stay below 10
_EPOCH = (1980, 1, 1, 0, 0, 0)
_BLOCK = 1 << 20
_ENCRYPTED = 0x1


def pack(bundle: Bundle, zip_path: Path) -> Path:
    """Write a bundle as ``zip_path``, in one step, replacing a .zip that is there and nothing else; returns the path.

    Reproducible: manifest first, then sorted paths, fixed time and permissions, stored uncompressed, because the
    bytes of deflate depend on the version of zlib (and quantized weights hardly shrink). The bundle is verified
    first. Raises :class:`BundleRefused`, :class:`UsageError` for what isn't replaceable, or :class:`ResourceError`
    when it can't be written.
    """
    zip_path = zip_path.absolute()
    _check_replaceable(zip_path)
    bundle = open_bundle(bundle.path)
    names = [MANIFEST, *sorted(entry.path for entry in bundle.manifest.files)]
    part: Path | None = None
    try:
        zip_path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part_name = tempfile.mkstemp(prefix=f".{zip_path.name}.", suffix=".part", dir=zip_path.parent)
        part = Path(part_name)
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), 0o644)
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                for name in names:
                    _add(archive, name, bundle.path / name)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(zip_path)
        sync_directory(zip_path.parent)
    except OSError as error:
        remedy = "Free some space or choose another place with --out"
        raise ResourceError(
            f"can't be written ({error.strerror or error})", where=str(zip_path), remedy=remedy
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return zip_path


def _check_replaceable(zip_path: Path) -> None:
    if zip_path.is_dir():
        raise UsageError("is a directory", where=str(zip_path), remedy="Name the .zip to write with --out")
    if zip_path.exists() and not (zip_path.is_file() and zipfile.is_zipfile(zip_path)):
        what = "is there already and no .zip, so it isn't replaced"
        raise UsageError(what, where=str(zip_path), remedy="Choose another name with --out")


def _add(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    entry = zipfile.ZipInfo(name, date_time=_EPOCH)
    entry.create_system = 3  # Unix, wherever this runs
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    entry.file_size = path.stat().st_size  # lets zipfile decide about 64-bit sizes before it writes
    with path.open("rb") as source, archive.open(entry, "w") as sink:
        shutil.copyfileobj(source, sink, _BLOCK)


def unpack(zip_path: Path, target: Path) -> Bundle:
    """Unpack into the directory ``target`` and return the verified bundle.

    Names, kinds, sizes and counts are judged before a byte is written; writing happens in a new directory beside
    ``target``, which takes its place only after every check of :func:`open_bundle`. Raises :class:`BundleRefused`
    (``archive`` for a damaged or hostile archive, else the bundle's own checks), :class:`UsageError` for a path that
    is no file or a target that isn't replaceable, :class:`ResourceError` for a full disk.
    """
    zip_path, target = zip_path.absolute(), target.absolute()
    if not zip_path.is_file():
        raise UsageError("is not a file", where=str(zip_path), remedy="Name a .zip made by 'aios-edge bundle pack'")
    try:
        with zipfile.ZipFile(zip_path) as archive:
            entries = _checked_entries(archive, zip_path)
            needed_bytes = sum(entry.file_size for entry in entries)
            with staging(target, needed_bytes=needed_bytes) as stage:
                for entry in entries:
                    _extract(archive, entry, stage, zip_path)
                bundle = _verified(stage, zip_path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        what = f"is not a whole zip archive ({error})"
        raise BundleRefused("archive", what, where=str(zip_path), remedy="Fetch it again") from error
    return Bundle(path=target, manifest=bundle.manifest, contract=bundle.contract, bundle_id=bundle.bundle_id)


@contextmanager
def unpacked(zip_path: Path) -> Iterator[Bundle]:
    """The verified bundle of an archive, in a temporary folder that is gone after the block; raises as
    :func:`unpack` does."""
    with tempfile.TemporaryDirectory(prefix="aios-edge-") as folder:
        yield unpack(zip_path, Path(folder) / "bundle")


def _verified(stage: Path, zip_path: Path) -> Bundle:
    """A refusal names the archive: the folder it was unpacked into is gone when somebody reads that."""
    try:
        return open_bundle(stage)
    except BundleRefused as error:
        where = error.where and error.where.replace(str(stage), str(zip_path))
        raise BundleRefused(error.promise, error.what, where=where, remedy=error.remedy) from error


def _checked_entries(archive: zipfile.ZipFile, zip_path: Path) -> list[zipfile.ZipInfo]:
    """The archive's files (folders are made as needed), or :class:`BundleRefused` (``archive``)."""
    where = str(zip_path)
    entries = archive.infolist()
    if len(entries) > 2 * MAX_FILES:
        raise BundleRefused("archive", f"has more than {MAX_FILES} files", where=where)
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.orig_filename != entry.filename or "\0" in entry.orig_filename:
            raise BundleRefused("archive", f"the path {entry.orig_filename!r} isn't plain", where=where)
        if kind not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
            raise BundleRefused("archive", f"{entry.filename!r} is a link or not a plain file", where=where)
        if entry.flag_bits & _ENCRYPTED:
            raise BundleRefused("archive", f"{entry.filename!r} is encrypted", where=where)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BundleRefused("archive", f"{entry.filename!r} is compressed in an unusual way", where=where)
        if entry.is_dir() and entry.file_size:
            raise BundleRefused("archive", f"the folder {entry.filename!r} has content", where=where)
    check_paths(
        [entry.filename.rstrip("/") + "/_" for entry in entries if entry.is_dir()], where=where, check="archive"
    )
    files = [entry for entry in entries if not entry.is_dir()]
    check_paths([entry.filename for entry in files], where=where, check="archive")
    if all(entry.filename != MANIFEST for entry in files):
        raise BundleRefused("archive", f"has no {MANIFEST} at its top, so it is no bundle", where=where)
    total_bytes = sum(entry.file_size for entry in files)
    if total_bytes > MAX_TOTAL_BYTES:
        raise BundleRefused("archive", f"would unpack to more than {MAX_TOTAL_BYTES} bytes", where=where)
    # Against the whole file, not each entry: entries that overlap can't add up to more than they are
    if total_bytes > MAX_RATIO * zip_path.stat().st_size:
        raise BundleRefused("archive", f"would unpack to more than {MAX_RATIO} times its size", where=where)
    return files


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, stage: Path, zip_path: Path) -> None:
    """Write one file, no more of it than the archive's own table says."""
    path = stage / entry.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    left = entry.file_size
    with path.open("xb") as sink:
        for block in _blocks(archive, entry, zip_path):
            left -= len(block)
            if left < 0:
                raise BundleRefused("archive", f"{entry.filename!r} is longer than it says", where=str(zip_path))
            sink.write(block)
        sink.flush()
        os.fsync(sink.fileno())


def _blocks(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, zip_path: Path) -> Iterator[bytes]:
    """The content of one file; a damaged table sends zipfile to impossible places, which is no fault of the disk."""
    try:
        with archive.open(entry) as source:
            while block := source.read(_BLOCK):
                yield block
    except (OSError, ValueError) as error:
        raise BundleRefused("archive", f"{entry.filename!r} can't be read ({error})", where=str(zip_path)) from error
