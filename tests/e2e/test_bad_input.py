"""What a person can get wrong, through the commands: one message that says what, where and the remedy, the documented
exit code, a clean stdout, and nothing half-written."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aios_edge.digest import sha256_file

ROOT = Path(__file__).parents[2]
AE = (sys.executable, "-m", "aios_edge.cli.main")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

TRAIN = "text,label\n" + "".join(f"sentence {i},{'ab'[i % 2]}\n" for i in range(160))
RECIPE = '[model]\nsource = "package:nothing-of-this-name"\n[data]\ntrain = "train.csv"\n'


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("aios-edge: "), done.stderr
    for part in said:
        assert part in last


@pytest.mark.export
@pytest.mark.parametrize(
    ("train", "recipe", "code", "said"),
    [
        (TRAIN.replace("label", "lable", 1), RECIPE, 1, "did you mean 'lable'"),
        ("text,label\n" + "x,a\n" * 9, RECIPE, 1, "one class only"),
        (TRAIN + ",a\n", RECIPE, 1, "lines 162"),
        (TRAIN + "one, two,a\n", RECIPE, 1, "line 162 has more fields"),
        (TRAIN.encode() + b"caf\xe9,a\n", RECIPE, 1, "iconv"),
        (TRAIN, RECIPE + "[finetune]\nepoch = 1\n", 2, "Did you mean 'epochs'?"),
        (TRAIN, RECIPE + "[[[", 2, "is not TOML"),
        (TRAIN, RECIPE, 2, "not installed"),
    ],
)
def test_export_refuses_before_it_writes(tmp_path: Path, train: str | bytes, recipe: str, code: int, said: str) -> None:
    folder = tmp_path / "Größe und Maß"
    folder.mkdir()
    (folder / "train.csv").write_bytes(train if isinstance(train, bytes) else train.encode())
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    done = run("export", "recipe.toml", "--profile", "rpi5", "--out", "out", "--json", cwd=folder)
    refused(done, code, said)
    assert not (folder / "out").exists()


@pytest.mark.export
def test_export_never_meets_other_peoples_files_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(TRAIN)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "out" / "rpi5").mkdir(parents=True)
    (tmp_path / "out" / "rpi5" / "thesis.txt").write_text("precious")
    done = run("export", tmp_path / "recipe.toml", "--profile", "rpi5", "--out", tmp_path / "out")
    refused(done, 2, "other things in it")
    done = run("export", tmp_path / "recipe.toml", "--profile", "rpi5", "--out", tmp_path / "train.csv")
    refused(done, 2, "is not a directory")
    refused(run("export", tmp_path / "recipe.toml", "--profile", "rpi55", "--out", tmp_path), 2, "did you mean 'rpi5'")


@pytest.mark.parametrize("name", ["manifest.json", "contract.json"])
def test_a_document_that_is_not_utf8_is_refused_by_name(tiny_copy: Path, name: str) -> None:
    data = bytearray((tiny_copy / name).read_bytes())
    data[5] = 0xFF
    (tiny_copy / name).write_bytes(bytes(data))
    if name != "manifest.json":
        manifest = json.loads((tiny_copy / "manifest.json").read_text(encoding="utf-8"))
        for entry in manifest["files"]:
            entry["sha256"] = sha256_file(tiny_copy / entry["path"])
        (tiny_copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    done = run("bundle", "verify", tiny_copy)
    refused(done, 3, "[schema]" if name == "manifest.json" else "[promises]", name)


def test_infer_with_a_closed_standard_input_says_what_to_give(tiny_bundle: Any) -> None:
    command = shlex.join([*AE, "infer", str(tiny_bundle.path)])
    done = subprocess.run(
        ["sh", "-c", f"{command} <&-"], capture_output=True, text=True, timeout=60, check=False, env=ENVIRONMENT
    )
    refused(done, 2, "there is no input")


def config(folder: Path, *bundles: Path, more: str = "", http: str = 'bind = "127.0.0.1:0"') -> Path:
    path = folder / "agent.toml"
    entries = "".join(f'[[bundle]]\npath = "{bundle}"\n' for bundle in bundles)
    path.write_text(f'[device]\nid = "d"\nprofile = "x86-gateway"\n[http]\n{http}\n{more}\n{entries}')
    return path


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('[mqtt]\nurl = "nonsense"', "mqtt.url"),
        ('[mqtt]\nurl = "mqtt://x"\nusername = "u"\npassword_file = "nowhere"', "nowhere"),
        ('[[cloud]]\nname = "c"\nurl = "http://x:port"', "cloud.c.url"),
        ('[[cloud]]\nname = "c"\nurl = "http://x"\nbearer_file = "nowhere"', "nowhere"),
        ('[[cloud]]\nname = "c"\nurl = "http://x"\nmodel_map = {tinny = "t"}', "'tinny'. Did you mean 'tiny'?"),
    ],
)
def test_agent_check_reads_the_whole_configuration(tiny_bundle: Any, tmp_path: Path, more: str, said: str) -> None:
    refused(run("agent", "check", "--config", config(tmp_path, tiny_bundle.path, more=more), "--json"), 2, said)


def test_agent_check_refuses_two_bundles_of_one_name(tiny_bundle: Any, tmp_path: Path) -> None:
    path = config(tmp_path, tiny_bundle.path, tiny_bundle.path)
    refused(run("agent", "check", "--config", path), 2, "two models have the name 'tiny'")


def test_a_busy_port_and_a_long_socket_path_are_said_before_anything_starts(tiny_bundle: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = config(tmp_path, tiny_bundle.path, http=f'bind = "127.0.0.1:{port}"')
        refused(run("agent", "run", "--config", path), 1, f"port {port}", "in use")
    path = config(tmp_path, tiny_bundle.path, http=f'bind = ""\nunix_socket = "{"x" * 150}"')
    refused(run("agent", "run", "--config", path), 1, "unix_socket", "length")
