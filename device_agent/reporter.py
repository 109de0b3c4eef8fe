"""What the agent says about itself, and the way it gets to the broker.

    meter, completions -> TelemetryWindow -> outbox -> MQTT (at least once, in order, few in flight)
    status             -> MQTT, retained, again at every connect and change; the will says offline

Everything that blocks runs in one thread of its own, in order: a slow flash or sensor delays reports, not requests.
All methods belong to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from aios_edge.mqtt import Delivery, LinkState, MqttLink, MqttOptions, Publication
from aios_edge.telemetry import Event, OutboxFigures, Scalar, Status, StatusBody, Telemetry, rfc3339
from aios_edge.topics import Topics
from device_agent.outbox import Kind, Outbox, OutboxMessage, OutboxStats
from device_agent.power.reading import PowerReading
from device_agent.values import Completion
from device_agent.window import Gauges, TelemetryWindow

_log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 10  # paho and mosquitto both stop at 20 unacknowledged messages
_WILL_REASON = "not known: this message was written when the agent started"


class Meter(Protocol):
    """What the reporter needs of :class:`device_agent.power.meter.PowerMeter`."""

    def sample(self) -> PowerReading:
        """One reading; may block."""
        ...


class ReporterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``mqtt`` None: nothing leaves the device, the last window is kept for ``/status``.

    ``drain_s`` bounds each of the two waits at the end: for the outbox, and for the offline status.
    """

    group: str
    device: str
    mqtt: MqttOptions | None = None
    interval_s: float = 10.0
    sample_s: float = 1.0
    outbox_path: Path = Path("state/outbox.sqlite")
    outbox_bytes: int = 16_000_000
    outbox_synchronous: Literal["NORMAL", "FULL"] = "NORMAL"
    drain_s: float = 2.0


class ReporterCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Since the start: messages the broker acknowledged, those it refused (and the last reason), and the outbox."""

    published: int
    refused: int
    refused_reason: str | None
    link: LinkState
    outbox: OutboxStats


class Reporter:
    """Raises :class:`SettingsError` for a device name or broker address that can't work."""

    def __init__(
        self,
        options: ReporterOptions,
        *,
        meter: Meter,
        status_body: Callable[[], StatusBody],
        gauges: Callable[[], Gauges],
        on_reading: Callable[[PowerReading], None] = lambda reading: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.boot_id = uuid.uuid4().hex
        self.topics = Topics(options.group, options.device)
        self.recent_events: deque[Event] = deque(maxlen=50)
        self.last: Telemetry | None = None
        self.last_reading: PowerReading | None = None
        self._options, self._meter = options, meter
        self._status_body, self._gauges, self._on_reading = status_body, gauges, on_reading
        self._clock, self._wall = clock, wall
        self._window = TelemetryWindow(clock())
        self._seq = self._published = self._refused = 0
        self._refused_reason: str | None = None
        self._said: StatusBody | None = None  # the status that was handed to this connection
        self._outbox: Outbox | None = None
        self._link: MqttLink | None = None
        self._in_flight: set[int] = set()
        self._sent_up_to = 0
        self._connected = False  # as this thread was told, a moment behind the link's own state
        self._away_said = False  # to the log, which isn't told of every attempt
        self._stopping = False
        self._epoch = 0  # counts connections: an acknowledgement of an earlier one frees no slot of this one
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._early: list[tuple[Kind, str, bytes]] = []  # events before start()
        # One thread: what is put first is stored first. The meter has its own, since a sensor may hang.
        self._disk = ThreadPoolExecutor(1, "reporter-disk")
        self._sensors = ThreadPoolExecutor(1, "reporter-meter")

    @property
    def counts(self) -> ReporterCounts:
        """What has left so far, and what waits."""
        off = LinkState(reason="mqtt is not configured" if self._options.mqtt is None else "not started")
        return ReporterCounts(
            published=self._published,
            refused=self._refused,
            refused_reason=self._refused_reason,
            link=self._link.state if self._link else off,
            outbox=self._outbox.stats if self._outbox else OutboxStats(),
        )

    async def start(self) -> None:
        """Open the outbox, begin to connect, sample and report. An absent broker is no error."""
        loop = asyncio.get_running_loop()
        options = self._options
        if options.mqtt is not None:
            body = msgspec.structs.replace(
                self._status_body(),
                providers_active=None,
                providers_reason=_WILL_REASON,
                bundles=None,
                bundles_reason=_WILL_REASON,
            )
            will = self._status("offline", "connection lost", body)
            self._link = MqttLink(options.mqtt, call=loop.call_soon_threadsafe, will=will, on_state=self._link_changed)
            self._outbox = await loop.run_in_executor(self._disk, self._open_outbox)
            for kind, topic, payload in self._early:
                self._store(kind, topic, payload)
            self._early.clear()
            self._link.start()
            self._tasks.append(asyncio.create_task(self._pump(), name="reporter-pump"))
        self._tasks.append(asyncio.create_task(self._sample(), name="reporter-sample"))
        self._tasks.append(asyncio.create_task(self._report(), name="reporter-report"))

    def record(self, completion: Completion) -> None:
        """Count one request that ended."""
        self._window.add(completion)

    def unauthorized(self, address: str) -> None:
        """Count one that had no known key."""
        self._window.unauthorized(address)

    def event(self, kind: str, **detail: Scalar) -> None:
        """Say that something happened; survives a broker that is away."""
        event = Event(ts=rfc3339(self._wall()), boot_id=self.boot_id, kind=kind, detail=detail)
        self.recent_events.append(event)
        if self._options.mqtt is not None:
            self._store("event", self.topics.event, msgspec.json.encode(event))
        self.status_changed()

    def status_changed(self) -> None:
        """Publish the status again if it differs from what the broker was told."""
        if self._link is None or not self._connected:
            return
        body = self._status_body()
        if body != self._said and self._link.publish(self._status("online", "running", body), self._delivered):
            self._said = body

    async def stop(self, why: str) -> None:
        """Send the last window, wait a moment for the outbox, say offline with the reason, disconnect."""
        for task in self._tasks:
            if task.get_name() != "reporter-pump":
                task.cancel()
        self._close_window()
        loop = asyncio.get_running_loop()
        if self._link is not None and self._outbox is not None:
            await loop.run_in_executor(self._disk, lambda: None)  # all that was put is stored now
            await self._until(lambda: self._outbox is None or not self._outbox.stats.depth)
            gone = asyncio.Event()
            farewell = self._status("offline", why, self._status_body())
            self._stopping = True
            if self._link.publish(farewell, lambda _: gone.set()):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(gone.wait(), self._options.drain_s)
            await loop.run_in_executor(None, self._link.stop)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._outbox is not None:
            await loop.run_in_executor(self._disk, self._outbox.close)
        self._disk.shutdown(wait=False)
        self._sensors.shutdown(wait=False)

    # Measuring.

    async def _sample(self) -> None:
        loop = asyncio.get_running_loop()
        throttled: bool | None = None
        failed = False
        while True:
            try:
                reading = await loop.run_in_executor(self._sensors, self._meter.sample)
            except Exception as error:
                if not failed:  # at each sample it would fill the log
                    _log.warning("the power meter failed: %s", error, exc_info=not isinstance(error, OSError))
                failed = True
                await asyncio.sleep(self._options.sample_s)
                continue
            failed = False
            self.last_reading = reading
            self._window.add(reading)
            self._on_reading(reading)
            if reading.throttled is not None and reading.throttled != bool(throttled):
                kind = "throttled" if reading.throttled else "throttling_ended"
                self.event(kind, flags=", ".join(reading.throttled_flags), total_w=reading.total_w)
            throttled = reading.throttled if reading.throttled is not None else throttled
            await asyncio.sleep(self._options.sample_s)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(self._options.interval_s)
            try:
                self._close_window()
                self.status_changed()
            except Exception:  # one bad gauge must not end all reports
                _log.exception("a telemetry window could not be reported")

    def _close_window(self) -> None:
        self._seq += 1
        stats = self._outbox.stats if self._outbox else OutboxStats()
        self.last = self._window.close(
            self._clock(),
            ts=rfc3339(self._wall()),
            boot_id=self.boot_id,
            seq=self._seq,
            gauges=self._gauges(),
            outbox=OutboxFigures(
                depth=stats.depth,
                depth_bytes=stats.depth_bytes,
                dropped_telemetry=stats.dropped_telemetry,
                dropped_events=stats.dropped_events,
                error=stats.error,
            ),
        )
        if self._options.mqtt is not None:
            self._store("telemetry", self.topics.telemetry, msgspec.json.encode(self.last))

    # Storing and sending.

    def _open_outbox(self) -> Outbox:
        options = self._options
        return Outbox(options.outbox_path, max_bytes=options.outbox_bytes, synchronous=options.outbox_synchronous)

    def _store(self, kind: Kind, topic: str, payload: bytes) -> None:
        outbox = self._outbox
        if outbox is None:
            self._early.append((kind, topic, payload))
            return
        loop = asyncio.get_running_loop()

        def put() -> None:
            stored = outbox.put(kind, topic, payload)
            refused = not stored and outbox.stats.error is not None
            loop.call_soon_threadsafe(self._stored, refused, topic, payload)

        self._disk.submit(put)

    def _stored(self, disk_refused: bool, topic: str, payload: bytes) -> None:
        if disk_refused and self._link is not None:  # a full disk needn't silence a device that has its broker
            self._link.publish(Publication(topic=topic, payload=payload), self._delivered)
        self._wake.set()

    async def _pump(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            room = MAX_IN_FLIGHT - len(self._in_flight)
            if self._link is None or self._outbox is None or not self._connected or room <= 0:
                continue
            epoch = self._epoch
            batch = await loop.run_in_executor(self._disk, self._outbox.next, self._sent_up_to, room)
            for message in batch:
                if epoch != self._epoch or not self._send(message, epoch):
                    break  # a new connection starts from the oldest again

    def _send(self, message: OutboxMessage, epoch: int) -> bool:
        assert self._link is not None
        publication = Publication(topic=message.topic, payload=message.payload, qos=message.qos)
        self._in_flight.add(message.id)
        if not self._link.publish(publication, lambda delivery: self._acknowledged(message.id, epoch, delivery)):
            self._in_flight.discard(message.id)
            return False
        self._sent_up_to = message.id
        return True

    def _acknowledged(self, message_id: int, epoch: int, delivery: Delivery) -> None:
        self._delivered(delivery)
        if epoch == self._epoch:
            self._in_flight.discard(message_id)
        outbox, loop = self._outbox, asyncio.get_running_loop()
        if outbox is None:
            return

        def forget() -> None:
            # A refused message too: it would be refused for ever, and hold up those behind it.
            outbox.acknowledge(message_id)
            loop.call_soon_threadsafe(self._wake.set)

        with contextlib.suppress(RuntimeError):  # acknowledged while stopping: sent once more at the next start
            self._disk.submit(forget)

    def _delivered(self, delivery: Delivery) -> None:
        if delivery.ok:
            self._published += 1
        else:
            self._refused += 1
            self._refused_reason = delivery.reason

    def _link_changed(self, state: LinkState) -> None:
        self._epoch += 1
        self._in_flight.clear()
        self._sent_up_to = 0
        self._said = None
        self._log_link(state, was_connected=self._connected)
        self._connected = state.connected
        if state.connected:
            self.status_changed()
        self._wake.set()

    def _log_link(self, state: LinkState, *, was_connected: bool) -> None:
        url = self._options.mqtt.url if self._options.mqtt is not None else None
        if state.connected:
            if not was_connected:
                _log.info("connected to %s, MQTT %s", url, state.protocol)
            self._away_said = False
        elif not self._away_said and not self._stopping:
            what = "lost the connection to" if was_connected else "can't connect to"
            _log.warning("%s %s: %s; tried again until it works", what, url, state.reason)
            self._away_said = True

    def _status(self, status: Literal["online", "offline"], why: str, body: StatusBody) -> Publication:
        message = Status(
            ts=rfc3339(self._wall()),
            status=status,
            why=why,
            group=self._options.group,
            device=self._options.device,
            boot_id=self.boot_id,
            **{name: getattr(body, name) for name in body.__struct_fields__},
        )
        return Publication(topic=self.topics.status, payload=msgspec.json.encode(message), qos=1, retain=True)

    async def _until(self, done: Callable[[], bool]) -> None:
        """Wait for ``done`` while connected, at most ``drain_s``. Pumping goes on meanwhile."""
        deadline = asyncio.get_running_loop().time() + self._options.drain_s
        while not done() and asyncio.get_running_loop().time() < deadline:
            if self._link is None or not self._link.state.connected:
                return
            await asyncio.sleep(0.02)
