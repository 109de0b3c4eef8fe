"""What README and docs show is what the product does, and what the product has is in them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest

from aios_edge.cli.main import COMMANDS, cli
from device_agent import settings
from device_agent.values import Reason
from exporters import recipe
from exporters.report import Baseline, Candidate, ExportReport, Finetuned, ProfileReport

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
AGENT = (ROOT / "docs" / "agent.md").read_text(encoding="utf-8")
EXPORTING = (ROOT / "docs" / "exporting.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
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


def commands() -> dict[str, click.Command]:
    """Every command and subcommand by the words that call it."""
    found: dict[str, click.Command] = {}
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": leaf for sub, leaf in command.commands.items()}
    return found


def options(command: click.Command) -> set[str]:
    """Its long options."""
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


def calls(document: str) -> list[str]:
    """What a document calls ``aios-edge`` with: in its code blocks and tables, without comments."""
    lines = re.findall(r"^\$? ?aios-edge ([^#\n]+)", document, re.MULTILINE)
    return [*lines, *re.findall(r"`aios-edge ([^`]+)`", document)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_subcommands_and_options_in_the_documents_exist(document: Path) -> None:
    known = commands()
    for call in calls(document.read_text(encoding="utf-8").replace("\\|", "|")):
        words = call.split()
        assert words[0] in known, call
        command = known[words[0]]
        leaves = [command]
        if isinstance(command, click.Group) and len(words) > 1:
            heads = re.findall(r"(?:^|\|)([a-z]+)", words[1])
            assert set(heads) <= set(command.commands), call
            leaves = [command.commands[head] for head in heads]
        for option in re.findall(r"--[a-z-]+", call):
            assert all(option in options(leaf) for leaf in leaves), call


def test_the_readme_lists_every_subcommand() -> None:
    shown = " ".join(call for call in calls(README.replace("\\|", "|")))
    for words, command in commands().items():
        if " " in words and not isinstance(command, click.Group):
            group, sub = words.split()
            assert re.search(rf"\b{group} (?:[^ ]+ )*[^ ]*\b{sub}\b", shown), words


def test_every_command_that_reports_takes_json() -> None:
    for words, command in commands().items():
        if not isinstance(command, click.Group) and words != "agent run":  # it serves
            assert "--json" in options(command), words


def test_both_tables_of_what_to_open_are_the_same() -> None:
    table = re.compile(r"\| to change or add \| open \|\n(?:\|.*\n)+")
    in_readme, in_architecture = table.search(README), table.search(ARCHITECTURE)
    assert in_readme and in_architecture
    assert in_readme[0] == in_architecture[0]


def keys_in(document: str) -> dict[str, set[str]]:
    """The keys of a reference: the first column below each ``**`[table]`**`` row."""
    found: dict[str, set[str]] = {}
    keys: set[str] | None = None
    for line in document.splitlines():
        if head := re.match(r"\| \*\*`\[+(\w+)\]+`\*\*", line):
            keys = found.setdefault(head[1], set())
        elif not line.startswith("|"):
            keys = None
        elif keys is not None:
            keys |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    return found


def test_every_setting_of_the_agent_is_in_its_reference() -> None:
    tables = {
        "device": settings.Device,
        "http": settings.Http,
        "mqtt": settings.Mqtt,
        "bundle": settings.BundleEntry,
        "repository": settings.Repository,
        "policy": settings.Policy,
        "cloud": settings.CloudEndpoint,
        "tenant": settings.Tenant,
        "emulate": settings.Emulate,
    }
    assert set(tables) == set(settings.Settings.__struct_fields__)
    assert keys_in(AGENT) == {name: set(table.__struct_fields__) for name, table in tables.items()}
    for table, key in settings.NOT_AVAILABLE:
        assert f"`{table}.{key}`" in AGENT or (key == "*" and re.search(rf"`\[+{table}\]+`", AGENT)), (table, key)


def test_the_defaults_in_the_agents_reference_are_the_defaults() -> None:
    defaults = {
        field.name: field.default
        for table in (settings.Http, settings.Policy, settings.CloudEndpoint, settings.Tenant, settings.Emulate)
        for field in msgspec.structs.fields(table)
        if isinstance(field.default, int | float | str)
    }
    assert defaults
    for name, default in defaults.items():
        shown = f'`"{default}"`' if isinstance(default, str) else str(default)
        shown = f"`{shown.lower()}`" if isinstance(default, bool) else shown
        assert re.search(rf"^\| `{name}` \| {re.escape(shown)} \|", AGENT, re.MULTILINE), (name, shown)


def test_every_key_of_a_recipe_is_in_its_reference() -> None:
    sections = {field.name: recipe.struct_of(field.type) for field in msgspec.structs.fields(recipe.ExportRecipe)}
    del sections["folder"]  # no part of the file
    assert keys_in(EXPORTING) == {name: set(section.__struct_fields__) for name, section in sections.items()}
    later = {f"`{method}`" for method in recipe.LATER_METHODS} | {f"`[{table}]`" for table in recipe.LATER_TABLES}
    for name in later | {f"`{method}`" for method in recipe.METHODS}:
        assert name in EXPORTING, name


@pytest.mark.parametrize("part", [ExportReport, Baseline, Finetuned, ProfileReport, Candidate])
def test_every_key_of_the_report_is_in_its_reference(part: type[msgspec.Struct]) -> None:
    section = EXPORTING.partition("## report.json")[2].partition("## Exit codes")[0]
    for name in part.__struct_fields__:
        assert f"`{name}`" in section or f"`{name}." in section, name


def test_every_reason_code_is_explained() -> None:
    explained = set(re.findall(r"^\| `(\w+)` \| (?:local|cloud|shed)", AGENT, re.MULTILINE))
    assert explained == {reason.value for reason in Reason}


def test_every_module_is_in_the_architecture() -> None:
    for package in ("aios_edge", "exporters", "device_agent"):
        section = ARCHITECTURE.partition(f"\n## {package}\n")[2].partition("\n## ")[0]
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT / package).with_suffix(""))
            if path.name != "__init__.py":
                assert f"`{name}`" in section, path
        for name in re.findall(r"`([\w/]+)`", "".join(re.findall(r"^\| (`[^|]+)\|", section, re.MULTILINE))):
            assert (ROOT / package / f"{name}.py").is_file(), f"{package}/{name}"
