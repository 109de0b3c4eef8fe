"""The examples in README and docs, typed as they stand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aios_edge.cli.demo.processes import AgentProcess, free_port
from aios_edge.telemetry import Event, Status, Telemetry
from device_agent.settings import parse_settings
from exporters.recipe import parse_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
AGENT = (ROOT / "docs" / "agent.md").read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)


#: Examples that ask the model. The one with token ids is made for a real model's vocabulary, not for a test's, and
#: the one over TLS for a gateway with a certificate.
_ELSEWHERE = ("input_ids", "https://")
QUESTIONS = [
    block
    for block in blocks(README, "sh") + blocks(AGENT, "sh")
    if "models/my-model" in block and not any(word in block for word in _ELSEWHERE)
]


@pytest.fixture(scope="module")
def doors(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A running agent with a model named as in the documents: host and port, and the Unix socket."""
    bundle = make_bundle(name="my-model")
    folder = tmp_path_factory.mktemp("examples")
    with tempfile.TemporaryDirectory() as short:  # a Unix socket's path has 107 bytes
        address, unix = f"127.0.0.1:{free_port()}", f"{short}/agent.sock"
        config = (
            f'[device]\nid = "examples"\nprofile = "{bundle.manifest.profile}"\nstate_dir = "{folder / "state"}"\n'
            f'[http]\nbind = "{address}"\nunix_socket = "{unix}"\n[[bundle]]\npath = "{bundle.path}"\n'
        )
        with AgentProcess(f"http://{address}", config, folder):
            yield address, unix


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", QUESTIONS)
def test_questions_with_curl_are_answered(block: str, doors: tuple[str, str], tmp_path: Path) -> None:
    script = block.replace("localhost:8080", doors[0]).replace("/run/aios-edge.sock", doors[1])
    script = script.replace("50000", "5000000")  # the deadline is of a quiet machine
    result = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert '"error"' not in result.stdout
    if "infer" in block:
        assert json.loads(result.stdout)["outputs"][0]["name"] == "label"
    if (tmp_path / "answer.bin").exists():
        assert b'"binary_data_size"' in (tmp_path / "answer.bin").read_bytes()
    else:
        assert "answer.bin" not in block


def test_there_are_questions() -> None:
    assert len(QUESTIONS) >= 4


def test_the_readmes_agent_toml_is_valid(tmp_path: Path) -> None:
    (text,) = [block for block in blocks(README, "toml") if "[device]" in block]
    settings = parse_settings(text, where="README", base=tmp_path)
    assert settings.cloud[0].model_map and settings.mqtt and settings.bundle


def test_the_readmes_recipe_is_valid_and_names_the_model_that_is_served(tmp_path: Path) -> None:
    (text,) = [block for block in blocks(README, "toml") if "[finetune]" in block]
    assert parse_recipe(tomllib.loads(text), folder=tmp_path).name == "my-model"


def shape(value: Any) -> Any:
    """Keys all the way down; of lists, the first element's."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


@pytest.mark.parametrize("kind", [Status, Telemetry, Event])
def test_example_messages_have_every_field(kind: type[msgspec.Struct]) -> None:
    heading = f"**`{kind.__name__.lower()}`**"
    shown = blocks(AGENT[AGENT.index(heading) :], "json")[0]
    message = msgspec.json.decode(shown.encode(), type=kind)
    assert shape(json.loads(shown)) == shape(json.loads(msgspec.json.encode(message)))
