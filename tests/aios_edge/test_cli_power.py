from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TREES = Path(__file__).parents[1] / "fixtures" / "power"
PROMISED = {"total_w", "total_method", "total_source", "rails", "energy", "thermal", "throttled", "skipped"}


def power(*arguments: str, env_path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aios_edge.cli.main", "power", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={"PATH": env_path})


def as_json(*arguments: str, **more: str) -> dict[str, Any]:
    done = power(*arguments, "--json", **more)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told.keys() >= PROMISED
    return told


@pytest.mark.parametrize("tree", sorted(path.name for path in TREES.iterdir() if path.is_dir()))
def test_every_captured_board_is_reported_in_the_promised_shape(tree: str) -> None:
    told = as_json("--sys-root", str(TREES / tree))
    assert told["total_method"] in ("measured", "sum_of_rails", "unknown")  # nothing is estimated from this host
    assert (told["total_w"] is None) == (told["total_method"] == "unknown")
    assert told["total_w"] is not None or told["reason"]
    for rail in told["rails"]:
        assert rail.keys() == {"name", "power_w", "source"}
    for zone in told["thermal"]:
        assert zone.keys() == {"name", "temperature_c"}
    assert power("--sys-root", str(TREES / tree)).stdout.startswith("Total")


def test_counters_become_watts_with_an_interval(tmp_path: Path) -> None:
    tree = shutil.copytree(TREES / "x86-rapl", tmp_path / "sys")
    counter = tree / "class/powercap/intel-rapl:0/energy_uj"
    command = [
        sys.executable,
        "-m",
        "aios_edge.cli.main",
        "power",
        "--json",
        "--interval",
        "1.5",
        "--sys-root",
        str(tree),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:  # a counter that runs, as the real one does
        next_to_it = counter.with_name("next")
        next_to_it.write_text(str(10_000_000_000 + int(time.monotonic() * 20e6)))
        next_to_it.replace(counter)
        time.sleep(0.005)
    told = json.loads(process.communicate()[0])
    assert told["total_method"] == "measured"
    assert told["total_w"] == pytest.approx(20.0, rel=0.2)


def test_this_machine_is_reported_without_inventing_anything() -> None:
    told = as_json("--interval", "0.1")
    assert told["total_w"] is None or told["total_w"] > 0
    assert told["total_w"] is not None or told["reason"]


def test_a_root_that_is_not_there_is_wrong_usage() -> None:
    done = power("--sys-root", "/nonexistent", "--json")
    assert done.returncode == 2 and done.stdout == "" and "nonexistent" in done.stderr
