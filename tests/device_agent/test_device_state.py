"""How the device is: what its files say, when a limit is passed, and what that does to requests of a real agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent import Agent
from device_agent.device_state import GAP_C, HOLD_S, DeviceState, Trigger, next_triggers
from device_agent.power.battery import read_battery
from device_agent.power.meter import PowerMeter
from device_agent.power.pressure import read_memory_pressure
from device_agent.power.reading import Battery, PowerReading, Skipped
from device_agent.settings import Policy, parse_settings
from device_agent.strain import Strain
from device_agent.values import Reason

FIXTURES = Path(__file__).parents[1] / "fixtures"


def battery(tree: str) -> tuple[Battery | None, tuple[Skipped, ...]]:
    return read_battery(FIXTURES / "power" / tree)


def test_a_gateway_runs_on_its_own_battery_and_not_on_its_keyboards() -> None:
    assert battery("battery-gateway") == (Battery(percent=42.0, discharging=True), ())


def test_two_packs_are_one_battery_and_an_empty_bay_is_none() -> None:
    found, gaps = battery("battery-two-packs")
    assert found is not None and not gaps
    assert found.percent == pytest.approx((100 * 39459 / 44611 + 80) / 2) and found.discharging is False


def test_a_board_without_batteries_has_none_and_a_silent_gauge_says_why() -> None:
    assert battery("rpi5") == (None, ())
    found, (gap,) = battery("battery-unreadable")
    assert found is None and "can't be read" in gap.reason
    reading = PowerMeter(sys_root=FIXTURES / "power" / "battery-unreadable").sample()
    assert reading.battery is None and "can't be read" in str(reading.battery_reason)
    assert PowerMeter(sys_root=FIXTURES / "power" / "rpi5").sample().battery_reason == "no battery here"


@pytest.mark.parametrize(("name", "content"), [("capacity", "250"), ("capacity", "-1"), ("capacity", "lots")])
def test_an_unbelievable_charge_is_no_charge(tmp_path: Path, name: str, content: str) -> None:
    tree = shutil.copytree(FIXTURES / "power" / "battery-gateway", tmp_path / "sys")
    (tree / "class/power_supply/battery" / name).write_text(content)
    found, (gap,) = read_battery(tree)
    assert found is None and gap.reason


def test_memory_pressure_as_the_kernel_writes_it_and_where_it_does_not(tmp_path: Path) -> None:
    assert read_memory_pressure(FIXTURES / "pressure" / "calm") == 0.0
    assert read_memory_pressure(FIXTURES / "pressure" / "short-of-memory") == 43.17
    missing = read_memory_pressure(tmp_path)
    assert isinstance(missing, Skipped) and "no pressure stall information" in missing.reason
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure/memory").write_text("nonsense\n")
    assert isinstance(read_memory_pressure(tmp_path), Skipped)
    reading = PowerMeter(sys_root=FIXTURES / "power" / "rpi5").sample()
    assert reading.memory_pressure_percent is None and reading.memory_pressure_reason == "not this host's device"


LIMITS = Policy(
    max_temperature_c=80.0, avoid_when_throttled=True, min_battery_percent=20.0, max_memory_pressure_percent=10.0
)


def on(*samples: tuple[float, DeviceState], policy: Policy = LIMITS) -> tuple[Reason, ...]:
    triggers: tuple[Trigger, ...] = ()
    for now, state in samples:
        triggers = next_triggers(triggers, state, policy, now)
    return tuple(trigger.reason for trigger in triggers)


def test_each_limit_has_its_trigger() -> None:
    assert on((0.0, DeviceState())) == ()
    assert on((0.0, DeviceState(temperature_c=79.9))) == ()
    assert on((0.0, DeviceState(temperature_c=80.0))) == (Reason.HOT,)
    assert on((0.0, DeviceState(throttled=True))) == (Reason.THROTTLED,)
    assert on((0.0, DeviceState(battery_percent=20.0, discharging=True))) == (Reason.BATTERY_LOW,)
    assert on((0.0, DeviceState(battery_percent=20.0))) == (Reason.BATTERY_LOW,), "a gauge that says nothing more"
    assert on((0.0, DeviceState(battery_percent=3.0, discharging=False))) == ()
    assert on((0.0, DeviceState(memory_pressure_percent=10.0))) == (Reason.MEMORY_PRESSURE,)
    extreme = DeviceState(temperature_c=120.0, throttled=True, battery_percent=1.0, memory_pressure_percent=90.0)
    assert on((0.0, extreme), policy=Policy()) == (), "nothing leaves for these by default"


def test_a_trigger_outlasts_its_limit_by_a_gap_and_a_while() -> None:
    hot, warm, cool = (DeviceState(temperature_c=value) for value in (80.0, 80.0 - GAP_C + 0.1, 80.0 - GAP_C))
    assert on((0.0, hot), (1.0, warm), (100.0, warm)) == (Reason.HOT,), "within the gap it stays"
    assert on((0.0, hot), (1.0, cool)) == (Reason.HOT,)
    assert on((0.0, hot), (1.0, cool), (1.0 + HOLD_S, cool)) == ()
    assert on((0.0, hot), (1.0, cool), (2.0, hot), (1.0 + HOLD_S, cool)) == (Reason.HOT,), "the while begins again"
    flickering = [(float(second), DeviceState(throttled=second % 2 == 0)) for second in range(60)]
    assert on(*flickering) == (Reason.THROTTLED,)
    assert on((0.0, hot), (1.0, DeviceState()), (1.0 + HOLD_S, DeviceState())) == (), "what isn't known passes nothing"


STATES = st.builds(
    DeviceState,
    temperature_c=st.none() | st.floats(60.0, 100.0),
    throttled=st.none() | st.booleans(),
    battery_percent=st.none() | st.floats(0.0, 100.0),
    discharging=st.none() | st.booleans(),
    memory_pressure_percent=st.none() | st.floats(0.0, 100.0),
)


@given(steps=st.lists(st.tuples(st.floats(0.1, 10.0), STATES), min_size=1, max_size=40))
def test_triggers_go_on_at_once_and_off_only_after_all_was_clear_for_a_while(
    steps: list[tuple[float, DeviceState]],
) -> None:
    now, triggers = 0.0, ()
    beyond_at: dict[Reason, float] = {}
    for pause, state in steps:
        now += pause
        triggers = next_triggers(triggers, state, LIMITS, now)
        reasons = {trigger.reason for trigger in triggers}
        beyond = set(on((0.0, state)))
        assert len(reasons) == len(triggers) and beyond <= reasons
        beyond_at |= dict.fromkeys(beyond, now)
        for reason in reasons:
            assert reason in beyond_at, "nothing is on that never was beyond its limit"
        for reason, at in beyond_at.items():
            assert reason in reasons or now - at >= HOLD_S
        assert all(trigger.since <= now for trigger in triggers)


def test_a_change_is_an_event_with_the_figures() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    clock = iter((0.0, 1.0, 2.0, 2.0 + HOLD_S)).__next__
    strain = Strain(LIMITS, lambda kind, **detail: events.append((kind, detail)), clock)
    calm = PowerReading(at_s=0.0, total_w=None, total_method="unknown", total_source=None, reason="")
    for percent in (50.0, 15.0, 40.0, 40.0):
        strain.look(msgspec.structs.replace(calm, battery=Battery(percent=percent, discharging=True)))
    assert [(kind, detail["reason"], detail["battery_percent"]) for kind, detail in events] == [
        ("device_strained", "battery_low", 15.0),
        ("device_recovered", "battery_low", 40.0),
    ]
    assert strain.reason is None and strain.reasons == ()


def post(url: str, **parameters: Any) -> dict[str, Any]:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a good film"]}
    body = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    with urllib.request.urlopen(f"{url}/v2/models/tiny/infer", body, timeout=20) as response:
        document: dict[str, Any] = json.loads(response.read())
    return document["parameters"]


async def until(happened: Callable[[], Any], limit_s: float = 20.0) -> None:
    async def poll() -> None:
        while not happened():  # noqa: ASYNC110 - a condition in the code under test
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), limit_s)


def test_a_hot_device_sends_what_may_leave_and_says_so(
    start_agent: Any, agent_toml: Callable[..., str], tmp_path: Path
) -> None:
    cloud = start_agent()
    sensors = shutil.copytree(FIXTURES / "power" / "rpi5", tmp_path / "sys")
    zone = next(sensors.glob("class/thermal/thermal_zone*/temp"))
    text = agent_toml(f'[[cloud]]\nname = "c"\nurl = "{cloud.url}"\n[policy]\nmax_temperature_c = 75.0\n')
    settings = parse_settings(text, where="agent.toml", base=tmp_path)

    async def main() -> None:
        agent = Agent(settings, sys_root=sensors)
        serving = asyncio.create_task(agent.run())
        await agent.ready.wait()
        (url,) = agent.listen
        await until(lambda: agent.status().cloud["c"].models["tiny"].usable)
        before = await asyncio.to_thread(post, url)
        assert (before["route"], before["reason"]) == ("local", "no_deadline")
        zone.write_text("81500\n")
        await until(lambda: agent.status().device_state.strained)
        for more in ({}, {"timeout": 5_000_000}):
            there = await asyncio.to_thread(post, url, **more)
            assert (there["route"], there["reason"]) == ("cloud", "hot")
        private = await asyncio.to_thread(post, url, privacy="local-only")
        assert (private["route"], private["reason"]) == ("local", "local_only")
        status = agent.status()
        assert status.device_state.temperature_c == 81.5 and status.device_state.strained == ("hot",)
        (event,) = [event for event in status.events if event.kind == "device_strained"]
        assert event.detail["reason"] == "hot" and event.detail["temperature_c"] == 81.5
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"{url}/metrics").read().decode())
        assert 'aios_device_strained{reason="hot"} 1' in page and "aios_temperature_celsius 81.5" in page
        assert 'reason="hot",status="200"' in page
        agent.shut_down()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    asyncio.run(asyncio.wait_for(main(), 60))
