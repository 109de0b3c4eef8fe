from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import aios_edge.bundle.write as write
from aios_edge.bundle.read import open_bundle
from aios_edge.errors import BundleRefused, ResourceError, UsageError


def test_two_writes_of_the_same_parts_are_the_same_bundle(make_bundle: Any) -> None:
    assert make_bundle().bundle_id == make_bundle().bundle_id


def test_an_existing_bundle_is_replaced_and_nothing_else_is_left(make_bundle: Any, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    make_bundle(target, version="1.0.0")
    second = make_bundle(target, version="2.0.0")
    assert open_bundle(target) == second
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(
    make_bundle: Any, tmp_path: Path
) -> None:
    (tmp_path / ".bundle.abc.part").mkdir()
    (tmp_path / ".bundle.abc.part" / "model.onnx").write_bytes(b"half")
    with write.staging(tmp_path / "bundle", needed_bytes=1) as living:
        (living / "file").write_text("x")
        make_bundle(tmp_path / "bundle")
        assert (living / "file").is_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "bundle"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_without_an_atomic_exchange_the_old_bundle_is_still_replaced(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_exchange", lambda left, right: False)
    target = tmp_path / "bundle"
    make_bundle(target, version="1.0.0")
    make_bundle(target, version="2.0.0")
    assert open_bundle(target).manifest.version == "2.0.0"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_empty_directory_is_filled_and_a_full_one_left_alone(make_bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_bundle(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="isn't replaced"):
        make_bundle(tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        make_bundle(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UsageError):
        make_bundle(tmp_path / "link")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "link"]


def test_parts_that_make_no_valid_bundle_leave_the_old_one_in_place(make_bundle: Any, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    first = make_bundle(target)
    with pytest.raises(BundleRefused):
        make_bundle(target, promises={"accuracy": 0.99})
    assert open_bundle(target) == first
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"needs \d+ bytes, \d+ are free"):
        make_bundle(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "open_bundle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_bundle(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_target_s_parents_are_made_and_readable_by_the_agent_s_user(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "out" / "rpi5")
    assert bundle.path.stat().st_mode & 0o777 == 0o755


def test_a_path_outside_is_never_written(make_bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleRefused):
        make_bundle(tmp_path / "bundle", files={"../escaped": b"x"})
    assert list(tmp_path.iterdir()) == []


def test_altering_a_bundle_does_not_alter_what_it_was_made_from(
    make_bundle: Any, tiny_parts: dict[str, Any], tmp_path: Path
) -> None:
    before = tiny_parts["files"]["model.onnx"].read_bytes()
    bundle = make_bundle(tmp_path / "bundle")
    with bundle.file("model.onnx").open("r+b") as stream:
        stream.write(b"????")
    assert tiny_parts["files"]["model.onnx"].read_bytes() == before
