"""The cache: whole results only, built once, resumed where a stage can."""

from __future__ import annotations

import errno
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
