"""What a fresh environment gets: sizes, distributions and interpreters. Long: each makes a virtual environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKSHOP = {"torch", "transformers", "optimum", "onnx", "neural-compressor", "rich"}

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def interpreter_of(version: str) -> str | None:
    """A Python of that version that really starts: on PATH, or among pyenv's (whose shims may be there but refuse)."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        if candidate and subprocess.run([candidate, "-c", ""], check=False, capture_output=True).returncode == 0:
            return candidate
    return None


def environment(folder: Path, extras: str, interpreter: str = sys.executable) -> Path:
    """A virtual environment with the project installed from this tree (not editable); its python."""
    subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), f"{ROOT}[{extras}]"],
        check=True,
    )
    return python


def distributions(python: Path) -> dict[str, str]:
    """Name to version of every installed distribution."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True
    )
    return {row["name"].lower(): row["version"] for row in json.loads(listed.stdout)}


def installed_bytes(python: Path) -> int:
    """Size of site-packages without pip, setuptools and compiled caches."""
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    own = ("pip", "setuptools", "_distutils_hack", "pkg_resources", "wheel")
    return sum(
        path.stat().st_size
        for path in site.rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and not path.relative_to(site).parts[0].split("-")[0].startswith(own)
    )


@pytest.mark.parametrize(("extras", "limit_bytes"), [("cpu", 185e6), ("cpu,text", 215e6)])
def test_a_device_install_is_small(extras: str, limit_bytes: float, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", extras)
    names = set(distributions(python)) - {"pip", "setuptools", "wheel"}
    assert not names & WORKSHOP
    assert installed_bytes(python) <= limit_bytes
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    assert {path.parent.name for path in site.glob("*/py.typed")} >= {"aios_edge", "exporters", "device_agent"}
    if extras == "cpu" and sys.version_info >= (3, 11):
        assert len(names) <= 14, sorted(names)


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_the_agent_runs_on_every_supported_python(version: str, tiny_bundle: Any, tmp_path: Path) -> None:
    interpreter = interpreter_of(version)
    if interpreter is None:
        pytest.skip(f"no Python {version} on this machine")
    python = environment(tmp_path / "venv", "cpu,text", interpreter)
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[device]\nid = "d"\nprofile = "{tiny_bundle.manifest.profile}"\nstate_dir = "{tmp_path / "state"}"\n'
        f'[http]\nbind = "127.0.0.1:0"\n[[bundle]]\npath = "{tiny_bundle.path}"\n'
    )
    command = [str(python), "-m", "aios_edge.cli.main"]
    for arguments in (["agent", "check", "--config", str(config)], ["infer", str(tiny_bundle.path), "a good film"]):
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert "positive" in result.stdout
