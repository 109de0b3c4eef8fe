"""The cache: whole results only, built once, resumed where a stage can."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from aios_edge.errors import ResourceError
from exporters.cache import StageCache


def test_a_result_is_built_once_and_found_again(tmp_path: Path) -> None:
    calls = []

    def build(work: Path) -> None:
        calls.append(work)
        (work / "value").write_text("1", encoding="utf-8")

    first = StageCache(tmp_path).produce("stage", {"a": 1}, build)
    again = StageCache(tmp_path)
    assert again.produce("stage", {"a": 1}, build) == first
    assert again.reused and not again.built
    assert again.produce("stage", {"a": 2}, build) != first
    assert len(calls) == 2
    assert not list((tmp_path / "stage").glob("*.part"))


def test_a_failed_build_leaves_no_result_and_starts_clean(tmp_path: Path) -> None:
    def fail(work: Path) -> None:
        (work / "half").write_text("x", encoding="utf-8")
        raise KeyboardInterrupt

    cache = StageCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.produce("stage", {}, fail)

    def build(work: Path) -> None:
        assert not list(work.iterdir())

    cache.produce("stage", {}, build)


def test_a_stage_that_resumes_finds_its_checkpoint(tmp_path: Path) -> None:
    def fail(work: Path) -> None:
        (work / "checkpoint").write_text("2", encoding="utf-8")
        raise KeyboardInterrupt

    cache = StageCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.produce("stage", {}, fail, resumes=True)
    seen = []
    cache.produce("stage", {}, lambda work: seen.append((work / "checkpoint").read_text()), resumes=True)
    assert seen == ["2"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    def build(work: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match="the disk is full"):
        StageCache(tmp_path).produce("stage", {}, build)
    assert [path.suffix for path in sorted((tmp_path / "stage").iterdir())] == [".lock", ".part"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    path.write_bytes(b"\0" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("deep/value", cut, "deep/value has 4 of 5 bytes"),
        ("deep/value", alter, "deep/value is not what was written"),
        ("deep/value", Path.unlink, "deep/value can't be read"),
        ("seal.json", Path.unlink, "seal.json is missing"),
        ("seal.json", cut, "seal.json can't be read"),
    ],
)
def test_a_damaged_result_is_built_again_and_said(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], said: str
) -> None:
    calls = []

    def build(work: Path) -> None:
        calls.append(work)
        (work / "deep").mkdir()
        (work / "deep" / "value").write_text("whole", encoding="utf-8")

    target = StageCache(tmp_path).produce("stage", {}, build)
    spoil(target / name)
    heard: list[str] = []
    cache = StageCache(tmp_path, say=heard.append)
    assert cache.produce("stage", {}, build) == target
    assert cache.produce("stage", {}, build) == target
    assert (target / "deep" / "value").read_text(encoding="utf-8") == "whole"
    assert len(calls) == 2 and len(cache.built) == len(cache.reused) == 1
    assert heard == cache.damaged and said in heard[0] and "is built again" in heard[0]


def test_who_waits_for_another_export_is_told_and_takes_its_result(tmp_path: Path) -> None:
    waits, heard = threading.Event(), []

    def say(text: str) -> None:
        heard.append(text)
        waits.set()

    def build(work: Path) -> None:
        other = threading.Thread(target=StageCache(tmp_path, say=say).produce, args=("stage", {}, never))
        other.start()
        others.append(other)
        assert waits.wait(60)

    def never(work: Path) -> None:
        raise AssertionError("built twice")

    others: list[threading.Thread] = []
    StageCache(tmp_path).produce("stage", {}, build)
    others[0].join(60)
    assert heard == ["another export builds stage; waiting for it"]
