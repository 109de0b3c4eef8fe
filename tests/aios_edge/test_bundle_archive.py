from __future__ import annotations

import io
import os
import random
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aios_edge.bundle.archive import pack, unpack
from aios_edge.bundle.layout import MAX_FILES
from aios_edge.bundle.read import open_bundle
from aios_edge.errors import AiosEdgeError, BundleRefused, UsageError

Members = list[tuple[zipfile.ZipInfo, bytes]]


@pytest.fixture(scope="module")
def packed(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tiny_bundle, tmp_path_factory.mktemp("packed") / "bundle.zip")


def rebuilt(packed: Path, target: Path, change: Callable[[Members], None], compress: int = zipfile.ZIP_STORED) -> Path:
    """A hostile copy of a packed bundle."""
    with zipfile.ZipFile(packed) as archive:
        members: Members = [(zipfile.ZipInfo(i.filename), archive.read(i)) for i in archive.infolist()]
    change(members)
    with zipfile.ZipFile(target, "w", compress) as archive:
        for info, data in members:
            archive.writestr(info, data, compress)
    return target


def named(name: str, data: bytes = b"x", mode: int = 0) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.filename = name  # ZipInfo tidies its argument; a hostile archive doesn't
    info.external_attr = mode << 16
    return info, data


def test_packing_and_unpacking_gives_the_same_bundle(packed: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = unpack(packed, tmp_path / "out")
    assert bundle.bundle_id == tiny_bundle.bundle_id
    assert open_bundle(tmp_path / "out") == bundle
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_packing_is_reproducible(packed: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))
    for path in copy.iterdir():
        path.chmod(0o600)
        os.utime(path, (1, 1))
    assert pack(open_bundle(copy), tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_a_damaged_bundle_is_not_packed(tiny_copy: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_copy)
    (tiny_copy / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleRefused):
        pack(bundle, tmp_path / "b.zip")
    assert not list(tmp_path.glob("*.zip*"))


def test_packing_replaces_a_zip_and_nothing_else(packed: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        archive.writestr("older", b"x")
    assert pack(tiny_bundle, tmp_path / "old.zip").read_bytes() == packed.read_bytes()
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(UsageError, match=r"rows\.csv: is there already and no \.zip.* another name"):
        pack(tiny_bundle, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == "text,label\n"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is there already"):
        pack(tiny_bundle, tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"folder: is a directory\. Name the \.zip") as refused:
        pack(tiny_bundle, tmp_path / "folder")
    assert refused.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "old.zip", "pipe", "rows.csv"]


def test_unpacking_replaces_a_bundle_and_nothing_else(packed: Path, make_bundle: Any, tmp_path: Path) -> None:
    make_bundle(tmp_path / "old", version="0.1.0")
    assert unpack(packed, tmp_path / "old").manifest.version == "1.0.0"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").write_text("mine")
    with pytest.raises(UsageError):
        unpack(packed, tmp_path / "home")


def test_an_archive_made_by_another_zip_tool_is_read(packed: Path, tmp_path: Path) -> None:
    hostile = rebuilt(packed, tmp_path / "deflated.zip", lambda members: members.reverse(), zipfile.ZIP_DEFLATED)
    assert unpack(hostile, tmp_path / "out").manifest.name == "tiny"


HOSTILE: dict[str, Callable[[Members], None]] = {
    "parent": lambda m: m.append(named("../escaped")),
    "deep parent": lambda m: m.append(named("a/../../escaped")),
    "absolute": lambda m: m.append(named("/tmp/aios-edge-escaped")),
    "back slash": lambda m: m.append(named("..\\escaped")),
    "drive": lambda m: m.append(named("C:escaped")),
    "symlink": lambda m: m.append(named("link", b"/etc/passwd", stat.S_IFLNK | 0o777)),
    "device": lambda m: m.append(named("device", b"", stat.S_IFCHR | 0o666)),
    "case collision": lambda m: m.append(named("MODEL.onnx")),
    "file as folder": lambda m: m.append(named("model.onnx/x")),
    "too deep": lambda m: m.append(named("a/b/c/d/e/f")),
    "hostile folder": lambda m: m.append(named("../escaped/", b"")),
    "too many": lambda m: m.extend(named(f"f{i}") for i in range(MAX_FILES)),
    "long name": lambda m: m.append(named("n" * 5000)),
    "no manifest": lambda m: m.pop(0) and None,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_before_anything_is_written(kind: str, packed: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    hostile = rebuilt(packed, inside / "hostile.zip", HOSTILE[kind])
    with pytest.raises(BundleRefused) as caught:
        unpack(hostile, inside / "out")
    assert caught.value.promise == "archive"
    assert [path.name for path in inside.iterdir()] == ["hostile.zip"]
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert not Path("/tmp/aios-edge-escaped").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(packed: Path, tmp_path: Path) -> None:
    hostile = rebuilt(packed, tmp_path / "h.zip", lambda m: m.append(named("model.onnx")))
    with pytest.raises(BundleRefused, match="twice"):
        unpack(hostile, tmp_path / "out")


def test_a_bomb_is_refused_by_its_ratio(packed: Path, tmp_path: Path) -> None:
    bomb = rebuilt(
        packed, tmp_path / "h.zip", lambda m: m.append(named("zeros", bytes(50_000_000))), zipfile.ZIP_DEFLATED
    )
    with pytest.raises(BundleRefused, match="times its size"):
        unpack(bomb, tmp_path / "out")


def test_an_unlisted_file_in_an_archive_is_refused_by_unlisted_and_nothing_stays(packed: Path, tmp_path: Path) -> None:
    hostile = rebuilt(packed, tmp_path / "h.zip", lambda m: m.append(named("extra.py")))
    with pytest.raises(BundleRefused) as caught:
        unpack(hostile, tmp_path / "out")
    assert caught.value.promise == "unlisted"
    assert [path.name for path in tmp_path.iterdir()] == ["h.zip"]


def test_an_encrypted_or_oddly_compressed_member_is_refused(packed: Path, tmp_path: Path) -> None:
    lzma = rebuilt(packed, tmp_path / "lzma.zip", lambda m: None, zipfile.ZIP_LZMA)
    with pytest.raises(BundleRefused, match="unusual"):
        unpack(lzma, tmp_path / "out")
    data = bytearray(packed.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "enc.zip").write_bytes(data)
    with pytest.raises(BundleRefused, match="encrypted"):
        unpack(tmp_path / "enc.zip", tmp_path / "out")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    with pytest.raises(BundleRefused, match="whole zip"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    with pytest.raises(UsageError):
        unpack(tmp_path / "missing.zip", tmp_path / "out")


@given(seed=st.integers(0, 2**32), cut=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_archive_never_gives_another_bundle(
    packed: Path, tiny_bundle: Any, tmp_path: Path, seed: int, cut: bool
) -> None:
    """Any flipped byte or cut is an error of ours, or harmless (a time stamp): never a bundle with another id."""
    rng = random.Random(seed)
    data = bytearray(packed.read_bytes())
    if cut:
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    folder = tmp_path / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "a.zip").write_bytes(io.BytesIO(data).getvalue())
    try:
        assert unpack(folder / "a.zip", folder / "out").bundle_id == tiny_bundle.bundle_id
    except AiosEdgeError:
        assert [path.name for path in folder.iterdir()] == ["a.zip"]
