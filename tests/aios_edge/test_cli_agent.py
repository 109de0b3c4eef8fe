"""``aios-edge agent`` as it is typed; the running daemon is tested beside its own code."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from aios_edge.cli.agent import describe


def agent(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aios_edge.cli.main", "agent", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )


def test_help_lists_what_works() -> None:
    result = agent("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("run", "check", "prebuild", "status", "key"))


def test_missing_configuration_and_files_are_wrong_usage(tmp_path: Path) -> None:
    assert agent("run").returncode == 2
    result = agent("run", "--config", str(tmp_path / "none.toml"))
    assert result.returncode == 2 and "--config" in result.stderr


def test_an_unknown_profile_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('[device]\nid = "d"\nprofile = "rpi55"\n[[bundle]]\npath = "b"\n')
    result = agent("check", "--config", str(tmp_path / "agent.toml"))
    assert result.returncode == 2 and "rpi5" in result.stderr


def test_no_bundle_is_said_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('[device]\nid = "d"\nprofile = "rpi5"\n[http]\nbind = "127.0.0.1:0"\n')
    for command in ("check", "run"):
        result = agent(command, "--config", str(tmp_path / "agent.toml"))
        assert result.returncode == 2 and "[[bundle]]" in result.stderr, result.stderr


def test_status_of_nobody_is_a_failure_that_names_the_address() -> None:
    result = agent("status", "--url", "http://127.0.0.1:1", "--json")
    assert result.returncode == 1 and "127.0.0.1:1" in result.stderr and result.stdout == ""


def test_status_always_names_an_emulation() -> None:
    document = json.loads(
        """{"device": {"group": "g", "id": "d", "profile": "rpi5"}, "state": "ready", "agent_version": "0",
        "uptime_s": 5.0, "listen": ["http://127.0.0.1:1"], "emulate": {"slowdown": 8.0}, "refused": [],
        "models": {}, "cloud": {"c": {"url": "u", "breaker": "open",
        "budgets": {"requests": {"per_day": 20.0, "left": 3.0}}, "models":
        {"m": {"remote": "r", "usable": false, "reason": "down"}}}}, "power": null, "power_reason": "no source",
        "device_state": {"strained": ["hot"]},
        "mqtt": {"link": {"connected": false, "reason": "refused"}, "outbox": {"depth": 3, "error": "disk is full"},
        "published": 0},
        "totals": {"local": 2}}"""
    )
    text = "\n".join(describe(document))
    assert "EMULATED" in text and "x 8" in text and "breaker open" in text and "power unknown: no source" in text
    assert "budget of requests: 3 of 20 left" in text
    assert "disk is full" in text and "for hot" in text
    del document["device_state"], document["cloud"]["c"]["budgets"]
    older = describe(document)
    assert any("breaker open" in line for line in older), "an agent that knew neither is told of as well"


def test_a_key_is_random_and_comes_with_its_line_for_the_settings() -> None:
    made = [json.loads(agent("key", "--json").stdout) for _ in range(2)]
    assert made[0]["key"] != made[1]["key"]
    assert all(hashlib.sha256(one["key"].encode()).hexdigest() == one["key_sha256"] for one in made)
    result = agent("key")
    key, line = (result.stdout.splitlines()[index].strip() for index in (1, 3))
    assert result.returncode == 0 and line == f'key_sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"'


def test_status_of_a_tenant_tells_its_limits() -> None:
    lines = describe(
        {
            "tenant": "shop",
            "state": "ready",
            "agent_version": "0",
            "models": {"m": {"version": "1", "state": "ready"}},
            "totals": {},
            "requests_per_s": 0.5,
            "bytes_per_day": 10,
            "bytes_left": 4,
        }
    )
    assert lines == [
        "tenant shop  ready  version 0",
        "model m 1  ready",
        "at most 0.5 requests a second",
        "4 of 10 bytes of 24 hours left",
        "requests none yet",
    ]
