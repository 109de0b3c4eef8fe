from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aios_edge.broker import start_broker
from aios_edge.errors import SettingsError
from aios_edge.mqtt import MqttListener, MqttOptions
from aios_edge.telemetry import StatusBody
from device_agent.power.reading import PowerReading
from device_agent.reporter import MAX_IN_FLIGHT, Reporter, ReporterOptions
from device_agent.values import Completion
from device_agent.window import Gauges

WAIT_S = 15.0


class Meter:
    throttled: bool | None = None

    def sample(self) -> PowerReading:
        return PowerReading(
            at_s=0.0, total_w=4.0, total_method="measured", total_source="VDD_IN", reason=None, throttled=self.throttled
        )


def reporter(folder: Path, url: str | None, meter: Meter | None = None, **more: Any) -> Reporter:
    mqtt = None if url is None else MqttOptions(url=url, backoff_min_s=0.05, backoff_max_s=0.2)
    known: dict[str, Any] = {"interval_s": 0.1, "sample_s": 0.05, "outbox_path": folder / "outbox.sqlite"}
    body = more.pop("body", lambda: StatusBody(agent_version="1", profile="rpi5"))
    options = ReporterOptions(group="g", device="d", mqtt=mqtt, **(known | more))
    return Reporter(options, meter=meter or Meter(), status_body=body, gauges=Gauges)


class Ears:
    """A subscriber whose messages are awaited from the test's loop."""

    def __init__(self, url: str) -> None:
        self._listener = MqttListener(url, "aios/v1/g/d/#")
        self._messages = self._listener.messages(WAIT_S)
        self.heard: list[tuple[str, dict[str, Any]]] = []

    async def until(self, wanted: Callable[[str, dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            message = await asyncio.to_thread(next, self._messages, None)
            assert message is not None, f"silence after {self.heard}"
            topic, body = message.topic.rpartition("/")[2], json.loads(message.payload)
            self.heard.append((topic, body))
            if wanted(topic, body):
                return body

    def close(self) -> None:
        self._listener.close()


async def eventually(done: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S / 0.02)):
        if done():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come to pass")


def running(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def test_status_telemetry_and_events_arrive_and_a_stop_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        with start_broker("mosquitto") as broker:
            ears, it = Ears(broker.url), reporter(tmp_path, broker.url)
            await it.start()
            status = await ears.until(lambda topic, _: topic == "status")
            assert status["status"] == "online" and status["profile"] == "rpi5" and status["boot_id"] == it.boot_id
            it.record(Completion(model="m", route="local", reason="idle", status=200, latency_s=0.01))
            it.event("activated", model="m")
            assert (await ears.until(lambda topic, _: topic == "event"))["detail"] == {"model": "m"}
            told = await ears.until(lambda topic, body: topic == "telemetry" and body["requests"]["offered"] == 1)
            assert told["power"]["total_w"] == 4.0 and told["boot_id"] == it.boot_id
            await it.stop("SIGTERM")
            farewell = await ears.until(lambda topic, body: topic == "status")
            assert (farewell["status"], farewell["why"]) == ("offline", "SIGTERM")
            assert it.counts.published >= 4 and it.counts.outbox.depth == 0
            ears.close()
            late = MqttListener(broker.url, "aios/#")  # retained: whoever comes later knows
            assert json.loads(next(late.messages(WAIT_S)).payload)["why"] == "SIGTERM"
            late.close()

    running(scenario)


def test_what_happened_while_the_broker_was_away_is_delivered_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = start_broker("mosquitto")
        it = reporter(tmp_path, first.url, interval_s=60.0)
        await it.start()
        await eventually(lambda: it.counts.link.connected)
        first.stop()
        await eventually(lambda: not it.counts.link.connected)
        many = 5 * MAX_IN_FLIGHT
        for number in range(many):
            it.event("tick", number=number)
        await eventually(lambda: it.counts.outbox.depth == many)
        with start_broker("mosquitto", port=first.port) as second:
            ears = Ears(second.url)
            await ears.until(lambda topic, body: topic == "event" and body["detail"]["number"] == many - 1)
            numbers = [body["detail"]["number"] for topic, body in ears.heard if topic == "event"]
            # The listener may have come after the first ones; what it heard is in order and without gaps.
            assert numbers == list(range(numbers[0], many))
            await eventually(lambda: it.counts.outbox.depth == 0)
            assert it.counts.published >= many
            assert it.counts.link.connects == 2
            await it.stop("done")
            ears.close()

    running(scenario)


def test_the_log_names_a_broker_once_when_it_is_away_and_once_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "device_agent.reporter")

    def said() -> list[tuple[str, str]]:
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    async def scenario() -> None:
        gone = start_broker("mosquitto")
        gone.stop()
        it = reporter(tmp_path, gone.url, interval_s=60.0)
        await it.start()
        await eventually(lambda: it.counts.link.failed_attempts >= 3)
        ((level, text),) = said()
        assert level == "WARNING" and gone.url in text and "refused" in text
        for _ in range(2):
            with start_broker("mosquitto", port=gone.port):
                await eventually(lambda: said()[-1] == ("INFO", f"connected to {gone.url}, MQTT 5"))
            await eventually(lambda: not it.counts.link.connected and it.counts.link.failed_attempts >= 3)
            assert said()[-1][0] == "WARNING" and "lost" in said()[-1][1]
        with start_broker("mosquitto", port=gone.port):
            await eventually(lambda: said()[-1][0] == "INFO")
            await it.stop("done")
        await asyncio.sleep(0)
        levels = [level for level, _ in said()]
        assert levels == ["WARNING", "INFO"] * 3, "a stop of our own is no loss"

    running(scenario)


def test_an_outbox_left_behind_is_delivered_by_the_next_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = start_broker("mosquitto")
        broker.stop()
        before = reporter(tmp_path, broker.url, interval_s=60.0)
        await before.start()
        before.event("from_before")
        await before.stop("power cut")
        with start_broker("mosquitto", port=broker.port) as again:
            ears, it = Ears(again.url), reporter(tmp_path, again.url, interval_s=60.0)
            await it.start()
            event = await ears.until(lambda topic, body: topic == "event" and body["kind"] == "from_before")
            assert event["boot_id"] == before.boot_id != it.boot_id
            await it.stop("done")
            ears.close()

    running(scenario)


def test_a_changed_status_is_published_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        profiles = ["rpi4"]
        with start_broker("mosquitto") as broker:
            ears = Ears(broker.url)
            it = reporter(tmp_path, broker.url, body=lambda: StatusBody(agent_version="1", profile=profiles[-1]))
            await it.start()
            await ears.until(lambda topic, body: topic == "status" and body["profile"] == "rpi4")
            profiles.append("rpi5")
            it.status_changed()
            await ears.until(lambda topic, body: topic == "status" and body["profile"] == "rpi5")
            await it.stop("done")
            ears.close()

    running(scenario)


def test_throttling_becomes_an_event_when_it_begins_and_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        meter = Meter()
        it = reporter(tmp_path, None, meter)
        await it.start()
        for state, kind in ((True, "throttled"), (False, "throttling_ended")):
            meter.throttled = state
            await eventually(lambda kind=kind: any(event.kind == kind for event in it.recent_events))  # type: ignore[misc]
        assert len(it.recent_events) == 2
        await it.stop("done")

    running(scenario)


def test_without_mqtt_the_last_window_is_kept_and_nothing_is_written(tmp_path: Path) -> None:
    async def scenario() -> None:
        it = reporter(tmp_path, None)
        await it.start()
        await eventually(lambda: it.last is not None and it.last.power.total_w == 4.0)
        assert it.counts.link.reason == "mqtt is not configured"
        await it.stop("done")

    running(scenario)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_silences_neither_agent_nor_reports(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")

    async def scenario() -> None:
        with start_broker("mosquitto") as broker:
            ears, it = Ears(broker.url), reporter(tmp_path, broker.url, outbox_path=tmp_path / "file" / "outbox.sqlite")
            await it.start()
            told = await ears.until(lambda topic, body: topic == "telemetry" and body["outbox"]["error"])
            assert "outbox.sqlite" in told["outbox"]["error"]
            await it.stop("done")
            ears.close()

    running(scenario)


def test_a_meter_or_gauge_that_breaks_does_not_end_the_reports(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Meter):
        def sample(self) -> PowerReading:
            raise RuntimeError("no bus")

    async def scenario() -> None:
        it = reporter(tmp_path, None, Broken())
        await it.start()
        await eventually(lambda: it.last is not None and it.last.seq >= 3)
        await it.stop("done")

    running(scenario)
    assert caplog.text.count("the power meter failed") == 1, "not at every sample"


def test_events_before_the_start_are_not_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        with start_broker("mosquitto") as broker:
            ears, it = Ears(broker.url), reporter(tmp_path, broker.url, interval_s=60.0)
            it.event("early")
            await it.start()
            await ears.until(lambda topic, body: topic == "event" and body["kind"] == "early")
            await it.stop("done")
            ears.close()

    running(scenario)


_AGENT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_reporter import reporter
async def main():
    it = reporter(Path(sys.argv[2]), sys.argv[1], interval_s=60.0)
    await it.start()
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_the_will_of_a_killed_agent_names_its_boot(tmp_path: Path) -> None:
    async def scenario() -> None:
        with start_broker("mosquitto") as broker:
            ears = Ears(broker.url)
            here = str(Path(__file__).parent)
            process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-c", _AGENT, broker.url, str(tmp_path), here]
            )
            online = await ears.until(lambda topic, body: topic == "status" and body["status"] == "online")
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            offline = await ears.until(lambda topic, body: topic == "status" and body["status"] == "offline")
            assert offline["boot_id"] == online["boot_id"] and offline["why"] == "connection lost"
            assert online["bundles"] == [] and online["bundles_reason"] is None
            for unknown in ("bundles", "providers_active"):  # the will was written before anything was live
                assert offline[unknown] is None
            assert "when the agent started" in offline["bundles_reason"]
            assert offline["providers_reason"] == offline["bundles_reason"]
            ears.close()

    running(scenario)


def test_a_device_name_that_cannot_be_a_topic_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"device\.id"):
        Reporter(
            ReporterOptions(group="g", device="a/b"),
            meter=Meter(),
            status_body=lambda: StatusBody(agent_version="1", profile="p"),
            gauges=Gauges,
        )


def test_the_supervisors_side_loads_no_numpy() -> None:
    code = "import sys, device_agent.reporter, device_agent.power.meter; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
