"""Callers without a key: counted, named by their address, and never more than the disk should bear."""

from __future__ import annotations

import json
from pathlib import Path

from aios_edge.telemetry import OutboxFigures
from device_agent.strangers import BURST, LINES_PER_S, Strangers, address_of
from device_agent.window import Gauges, TelemetryWindow


def test_a_flood_of_them_is_counted_and_only_a_few_are_written(tmp_path: Path) -> None:
    told: list[str] = []
    now = 0.0
    strangers = Strangers(tmp_path, told.append, clock=lambda: now)
    for _ in range(1000):
        strangers.came(address_of(("10.0.0.9", 4711), None), "GET", "/status", key_sent=True)
    now = 1.0
    strangers.came(address_of(None, 1000), "POST", "/" + "x" * 1000, key_sent=False)
    strangers.came(address_of(None, None), "GET", "/", key_sent=False)
    strangers.close()
    lines = [json.loads(line) for line in (tmp_path / "audit" / "_unauthorized.jsonl").read_text().splitlines()]
    assert len(lines) == BURST + 2 <= BURST + LINES_PER_S and len(told) == 1002
    assert [line["address"] for line in lines[-3:]] == ["10.0.0.9", "unix:1000", "unix"]
    assert [line["not_written"] for line in lines[-3:]] == [0, 1000 - BURST, 0]
    assert len(lines[-2]["path"]) == 200


def test_telemetry_names_the_ten_addresses_that_most_came_from() -> None:
    window = TelemetryWindow(0.0)
    for number in range(3000):  # as many addresses as somebody has who owns a network
        window.unauthorized(f"10.0.{number // 250}.{number % 250}")
    for _ in range(5):
        window.unauthorized("10.0.0.7")

    def close(now: float) -> tuple[int, dict[str, int]]:
        told = window.close(now, ts="t", boot_id="b", seq=1, gauges=Gauges(), outbox=OutboxFigures()).unauthorized
        return told.count, told.addresses

    count, addresses = close(1.0)
    assert count == 3005 and len(addresses) == 10 and addresses["10.0.0.7"] == 6
    assert close(2.0) == (0, {})
