"""Which paths a bundle's files may have: pure rules, so any text is tried."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_edge.bundle.layout import MAX_FILES, check_paths, path_fault
from aios_edge.errors import BundleRefused


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_an_accepted_path_stays_inside_whatever_it_is_joined_to(path: str) -> None:
    if path_fault(path) is None:
        root = Path("/srv/bundle")
        joined = Path(os.path.normpath(root / path))
        assert joined.is_relative_to(root) and joined != root
        assert str(joined.relative_to(root)) == path


@given(st.lists(st.sampled_from(["a", "A", "b/c", "b", "b/C", "é", "e\u0301"]), max_size=5))
@settings(deadline=None)
def test_accepted_paths_never_collide_on_any_file_system(paths: list[str]) -> None:
    try:
        check_paths(paths, where="x")
    except BundleRefused:
        return
    folded = [path.casefold() for path in paths]
    assert len(set(folded)) == len(folded)
    assert not ("b" in folded and "b/c" in folded)


def test_too_many_files_are_refused() -> None:
    with pytest.raises(BundleRefused, match=str(MAX_FILES)):
        check_paths([f"f{i}" for i in range(MAX_FILES + 1)], where="x")
