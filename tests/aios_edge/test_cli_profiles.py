from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HOSTS = Path(__file__).parents[1] / "fixtures" / "hosts"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aios_edge.cli.main", "profiles", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_list_names_every_profile() -> None:
    names = {profile["name"] for profile in json.loads(run("list", "--json").stdout)}
    assert {"rpi5", "cloud-cpu"} <= names
    assert all(name in run("list").stdout for name in names)


def test_show_prints_a_profile() -> None:
    assert json.loads(run("show", "rpi5", "--json").stdout)["budgets"]["latency_p95_s"] == 0.12
    assert "120 ms at batch 1, length 32" in run("show", "rpi5").stdout


@pytest.mark.parametrize(
    ("name", "told"),
    [("x86-vnni", "dynamic-s8"), ("x86-gateway", "dynamic-s8, weights in 7 bits"), ("cloud-gpu", "none")],
)
def test_show_tells_of_7_bits_where_weights_have_them(name: str, told: str) -> None:
    (row,) = (line.split(maxsplit=1) for line in run("show", name).stdout.splitlines() if "quantization" in line)
    assert row == ["quantization", told]


def test_an_unknown_profile_is_wrong_usage_with_a_suggestion() -> None:
    done = run("show", "rpi6")
    assert done.returncode == 2 and "did you mean 'rpi5'" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_check_says_what_is_wrong_and_exits_2(tmp_path: Path, json_flag: tuple[str, ...]) -> None:
    path = tmp_path / "p.toml"
    path.write_text('name = "p"\ntitel = "x"\n')
    done = run("check", path, *json_flag)
    assert done.returncode == 2 and "titel" in done.stderr
    if json_flag:
        assert json.loads(done.stdout)["ok"] is False


def test_check_accepts_a_shipped_profile() -> None:
    path = Path(__file__).parents[2] / "profiles" / "rpi5.toml"
    done = run("check", path, "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == {
        "file": str(path),
        "ok": True,
        "name": "rpi5",
        "error": None,
    }


def test_detect_reads_a_captured_machine_and_says_why() -> None:
    roots = ("--proc-root", HOSTS / "jetson-orin-nano" / "proc", "--sys-root", HOSTS / "jetson-orin-nano" / "sys")
    document = json.loads(run("detect", *roots, "--json").stdout)
    assert document["name"] == "jetson-orin-nano" and document["why"] and document["others"]
    text = run("detect", *roots).stdout
    assert "jetson-orin-nano (architecture aarch64; device tree says" in text
