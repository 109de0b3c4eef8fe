"""The wall clock is set under a real agent: forwards, and back by decades, as on a device without a battery."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from identity_model import write_identity
from mqtt_listener import Listener
from raw_http import Door, Wire
from steady_load import ask

from aios_edge.broker import start_broker

DAY_S = 86400.0
#: Read by every Python process: its wall clock is off by what the file says now.
_SITE = """
import time, pathlib, os
_real, _file = time.time, pathlib.Path(os.environ["CLOCK_OFFSET"])
time.time = lambda: _real() + float(_file.read_text())
time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.fixture
def set_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Of agents that are started in this test, by so much."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_SITE)
    offset = tmp_path / "offset"
    offset.write_text("0")
    monkeypatch.setenv("CLOCK_OFFSET", str(offset))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def jump(by_s: float) -> None:
        offset.with_suffix(".new").write_text(str(by_s))
        offset.with_suffix(".new").replace(offset)

    yield jump


def parameters(wire: Wire, number: int, timeout_us: int) -> dict[str, Any]:
    wire.say(ask(number, timeout_us))
    heard = wire.hear()
    assert heard is not None
    found: dict[str, Any] = heard.document["parameters"]
    return found | {"status": heard.status}


def test_deadlines_windows_and_connections_do_not_feel_it(
    start_agent: Any, tmp_path: Path, set_clock: Callable[[float], None]
) -> None:
    write_identity(tmp_path / "repository" / "id" / "1")
    with start_broker() as broker, Listener(broker) as heard:
        more = f'[repository]\npath = "{tmp_path / "repository"}"\n[mqtt]\nurl = "{broker.url}"\ninterval_s = 0.1'
        agent = start_agent(more)
        boot = agent.status()["boot_id"]
        began = time.monotonic()
        years = set()
        with Door.of(agent.url).connect() as wire:
            for turn, by_s in enumerate((0.0, 40 * DAY_S, -3 * 365 * DAY_S, 0.5, -1_000.0, 70 * 365 * DAY_S, 0.0)):
                set_clock(by_s)
                seen = len(heard.of("telemetry"))
                for number in range(5):
                    assert parameters(wire, number, 5_000_000)["reason"] == "idle"
                    assert parameters(wire, number, 1)["status"] == 504
                heard.until(lambda seen=seen: len(heard.of("telemetry")) >= seen + 3)
                years.add(datetime.datetime.fromisoformat(heard.of("telemetry")[-1][1]["ts"][:-1]).year)
                assert agent.status()["uptime_s"] < 60 and heard.has_windows(3 * turn, boot)
        assert max(years) - min(years) > 60, "the clock did jump"
        took_s = time.monotonic() - began
        assert agent.events("worker_crashed") == []
        assert agent.stop() == 0
    windows = [message for _, message in heard.of("telemetry")]
    assert [window["seq"] for window in windows] == list(range(1, len(windows) + 1))
    assert sum(window["requests"]["answered"] for window in windows) == 35
    assert all(0.05 < window["window_s"] < took_s + 5 for window in windows[:-1])
    assert sum(window["window_s"] for window in windows) < took_s + 15
    for window in windows:
        assert 0 <= (window["energy"]["energy_j"] or 0) < 1000 * (took_s + 5)
        assert (window["latency"]["histogram"]["max_s"] or 0) < took_s
    assert "Traceback" not in agent.log()


@pytest.mark.long
def test_a_days_budget_is_not_had_twice_by_setting_the_clock(
    start_agent: Any, tmp_path: Path, set_clock: Callable[[float], None]
) -> None:
    write_identity(tmp_path / "repository" / "id" / "1")
    repository = f'[repository]\npath = "{tmp_path / "repository"}"\n'
    cloud = start_agent(repository)
    agent = start_agent(
        f'{repository}[[cloud]]\nname = "c"\nurl = "{cloud.url}"\nmodel_map = {{id = "id"}}\nrequests_per_day = 2\n'
        "[emulate]\nslowdown = 1000.0"
    )

    def sent() -> int:
        """Since the agent's start, after as many requests as it takes to be refused for the budget. One that is sent
        too late for its answer is given up, and the cloud counts no answer."""
        agent.until(lambda status: status["cloud"]["c"]["models"]["id"]["usable"])
        with Door.of(agent.url).connect() as wire:
            end = time.monotonic() + 20
            while (found := parameters(wire, 1, 60_000))["reason"] != "budget":
                assert time.monotonic() < end, found
        assert sum(cloud.status()["totals"].values()) <= 2
        count: int = agent.status()["cloud"]["c"]["spent"]["requests"]
        return count

    assert sent() == 2
    set_clock(3 * DAY_S)
    assert sent() == 2
    agent.process.kill()
    agent.process.wait()
    set_clock(-400 * DAY_S)
    agent = start_agent(again=agent)
    set_clock(9 * DAY_S)
    assert sent() == 0
    saved = json.loads((agent.config.parent / "state" / "budgets.json").read_text())
    assert saved["boot_id"], "the machine has not been started anew"
    assert agent.stop() == 0 and cloud.stop() == 0
