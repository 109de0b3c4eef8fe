"""The cache: whole results only, built once, resumed where a stage can."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == sorted([first.name, calls[1].stem])


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
