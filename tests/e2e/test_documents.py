"""What README and docs show is what the product does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from aios_edge.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "profiles" / "README.md",
]


def help_of(*command: str) -> str:
    """The help text, as wide as the README shows it."""
    result = subprocess.run(
        [sys.executable, "-m", "aios_edge.cli.main", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "100", "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    )
    return result.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_and_is_in_the_readme(command: str) -> None:
    assert "--help" in help_of(command)
    assert f"aios-edge {command}" in README


def test_every_command_in_the_readme_exists() -> None:
    named = set(re.findall(r"^\$? ?aios-edge (\w+)", README, re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_files_the_documents_name_exist() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(
            r"`((?:aios_edge|exporters|device_agent|profiles|tests|docs|benchmarks)/[\w./-]+)`", text
        ):
            assert (ROOT / name).exists(), f"{document.name} names {name}"
