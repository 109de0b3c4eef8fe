from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aios_edge.cli.main", "bundle", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_show_tells_the_promises(tiny_bundle: Any) -> None:
    text = run("show", tiny_bundle.path).stdout
    assert tiny_bundle.bundle_id in text and "accuracy >= 0.9 share (measured, checked: export-only)" in text
    document = json.loads(run("show", tiny_bundle.path, "--json").stdout)
    assert document["bundle_id"] == tiny_bundle.bundle_id
    assert document["total_bytes"] == tiny_bundle.total_bytes
    assert document["contract"]["promises"][0]["name"] == "accuracy"


def test_verify_of_a_valid_bundle_exits_0(tiny_bundle: Any) -> None:
    done = run("verify", tiny_bundle.path, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "ok": True,
        "checks": ["schema", "unlisted", "digest", "manifest", "promises", "size"],
        "error": None,
        "bundle_id": tiny_bundle.bundle_id,
    }


def test_verify_of_a_damaged_bundle_exits_3_and_names_the_check(tiny_copy: Path) -> None:
    (tiny_copy / "extra").write_text("")
    done = run("verify", tiny_copy, "--json")
    assert done.returncode == 3 and "[unlisted]" in done.stderr
    assert json.loads(done.stdout)["check"] == "unlisted"


@pytest.mark.parametrize("command", ["show", "pack"])
def test_a_refused_bundle_is_one_json_document_for_every_command(tiny_copy: Path, command: str) -> None:
    (tiny_copy / "contract.json").write_text("{}")
    done = run(command, tiny_copy, "--json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert document["ok"] is False and f"[{document['check']}]" in document["error"]
    assert done.stderr == f"aios-edge: {document['error']}\n"


def test_a_refused_archive_is_one_json_document(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    done = run("unpack", tmp_path / "a.zip", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["check"] == "archive"


def test_pack_and_unpack_round_trip(tiny_copy: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    packed = json.loads(run("pack", tiny_copy, "--json").stdout)
    assert Path(packed["path"]) == tmp_path / "bundle.zip"
    done = run("unpack", packed["path"], "--out", tmp_path / "again", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"path": str(tmp_path / "again"), "bundle_id": tiny_bundle.bundle_id}


@pytest.fixture
def packed(tiny_copy: Path) -> Path:
    """A packed bundle, alone in its folder."""
    done = run("pack", tiny_copy)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tiny_copy)
    return Path(f"{tiny_copy}.zip")


def test_a_zip_is_shown_and_verified_like_its_folder(
    packed: Path, tiny_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    assert run("show", packed, "--json").stdout == run("show", tiny_bundle.path, "--json").stdout
    assert run("show", packed).stdout == run("show", tiny_bundle.path).stdout
    done = run("verify", packed, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["ok"], document["bundle_id"]) == (True, tiny_bundle.bundle_id)
    assert document["checks"] == ["archive", "schema", "unlisted", "digest", "manifest", "promises", "size"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bundle.zip", "temporary"]


@pytest.mark.parametrize("command", ["show", "verify"])
@pytest.mark.parametrize(
    ("name", "check"), [("../escaped", "archive"), ("extra.py", "unlisted"), ("MODEL.onnx", "archive")]
)
def test_a_hostile_zip_is_refused_and_nothing_is_left(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, check: str
) -> None:
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(name, b"x")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    done = run(command, packed, "--json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert document["check"] == check and str(packed) in document["error"]
    assert "temporary" not in done.stderr and "can't be run" not in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bundle.zip", "temporary"]


def test_a_zip_where_a_folder_is_needed_says_what_to_do(packed: Path) -> None:
    done = run("pack", packed)
    assert done.returncode == 2 and "aios-edge bundle unpack" in done.stderr


@pytest.mark.parametrize("command", ["show", "verify", "pack"])
def test_the_folder_above_a_bundle_is_wrong_usage(tiny_copy: Path, command: str) -> None:
    done = run(command, tiny_copy.parent, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Did you mean {tiny_copy}?" in done.stderr
    assert not Path(f"{tiny_copy.parent}.zip").exists()


def test_a_path_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    assert run("show", tmp_path / "nothing").returncode == 2
    assert run("unpack", tmp_path / "nothing.zip").returncode == 2
