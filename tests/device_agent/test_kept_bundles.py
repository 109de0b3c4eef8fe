"""Copies of bundles outlive what happens to their path."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from aios_edge.bundle.read import open_bundle
from aios_edge.errors import BundleRefused, ResourceError
from device_agent.kept_bundles import FOLDER, forget_others, keep


def test_a_copy_is_made_once_and_mended_when_it_is_damaged(tiny_copy: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_copy)
    kept = keep(bundle, tmp_path)
    assert kept == tmp_path / FOLDER / bundle.bundle_id[:16] and open_bundle(kept).bundle_id == bundle.bundle_id
    inode = kept.stat().st_ino
    assert keep(bundle, tmp_path) == kept and kept.stat().st_ino == inode
    (kept / "tokenizer.json").write_bytes(b"{}")
    assert open_bundle(keep(bundle, tmp_path)).bundle_id == bundle.bundle_id
    shutil.rmtree(tiny_copy)
    assert keep(bundle, tmp_path) == kept, "the copy is all it needs"


def test_another_bundle_at_the_path_is_not_taken_for_it(tiny_copy: Path, tmp_path: Path, make_bundle: Any) -> None:
    bundle = open_bundle(tiny_copy)
    make_bundle(tiny_copy, version="2.0.0")
    with pytest.raises(BundleRefused, match="replaced"):
        keep(bundle, tmp_path)
    shutil.rmtree(tiny_copy)
    with pytest.raises(ResourceError):
        keep(bundle, tmp_path)
    assert not [*(tmp_path / FOLDER).iterdir()], "nothing half-written remains"


def test_copies_of_others_are_forgotten(tiny_copy: Path, tmp_path: Path, make_bundle: Any) -> None:
    bundles = [open_bundle(tiny_copy), make_bundle(version="2.0.0")]
    kept = [keep(bundle, tmp_path) for bundle in bundles]
    forget_others(tmp_path, {bundles[1].bundle_id})
    assert [path.exists() for path in kept] == [False, True]
    forget_others(tmp_path / "nowhere", set())
