"""The door for things that only speak MQTT: ``infer/{model}`` in, an answer at the response topic out.

A connection of its own, so that a flood of requests holds up neither status nor telemetry. Behind it is the same desk
as behind HTTP: priorities, deadlines, privacy and limits hold here as there. What is being answered is bounded, and
beyond that refused at once; what hasn't been looked at yet is bounded by the link; what goes out, by :class:`Answers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from aios_edge.errors import AiosEdgeError, RequestError
from aios_edge.mqtt import LinkState, MqttLink, MqttOptions
from aios_edge.mqtt_message import Publication
from aios_edge.oip.envelope import error_body
from aios_edge.telemetry import MqttInferFigures
from aios_edge.topics import Topics
from device_agent.answer import shed_answer
from device_agent.http import Reply, retry_after
from device_agent.mqtt_answers import KEEP_S, Answers
from device_agent.mqtt_request import JSON_LENGTH, Asked, Came, ReplyTo, answer, hints, light, read, reply_to
from device_agent.seldom import Seldom
from device_agent.values import Completion, Reason, Shed

log = logging.getLogger("device_agent.mqtt")
_seldom = Seldom(log)

MAX_OPEN = 256  # requests that are being answered; the desk has limits by model and by bytes beside it
_HEAD_BYTES = 65_536  # of a message around its payload
_LAST_S = 2.0  # for the last answers, when the agent stops


class Asker(Protocol):
    """Who asks. Everything that came is told one of the two, whatever becomes of it."""

    async def ask(self, came: Came, read: Callable[[], Asked]) -> Reply:
        """Answer a request; raises :class:`AiosEdgeError` for what is refused, as ``read`` does for what is none."""

    def shed(self, came: Came, reply: Reply) -> Reply:
        """There is no room to answer it: what it is told, ``reply`` unless more stands against it."""


class MqttDoor:
    """``record`` is told of every inference that ended. :meth:`start` raises :class:`SettingsError` for options that
    can't work."""

    def __init__(
        self,
        options: MqttOptions,
        topics: Topics,
        asker: Asker,
        *,
        max_body_bytes: int,
        keep_bytes: int,
        record: Callable[[Completion], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._topics = topics
        self._asker = asker
        self._max_body_bytes = max_body_bytes
        self._record = record
        self._clock = clock
        self._link: MqttLink | None = None
        self._answers = Answers(self._publish, max_bytes=keep_bytes, clock=clock)
        self._open: set[asyncio.Task[None]] = set()
        self._asked = self._shed = self._ignored = 0
        self._said: str | None = None
        self._connects = 0

    @property
    def link(self) -> LinkState:
        """The connection as it is now."""
        return self._link.state if self._link is not None else LinkState()

    def figures(self) -> MqttInferFigures:
        """What came and went since the start."""
        answers = self._answers
        return MqttInferFigures(
            asked=self._asked,
            answered=answers.delivered,
            shed=self._shed,
            ignored=self._ignored,
            lost=answers.lost,
            lost_reason=answers.lost_reason,
            in_flight=len(self._open),
            waiting=len(answers),
        )

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._link = MqttLink(
            self._options,
            call=asyncio.get_running_loop().call_soon_threadsafe,
            on_state=self._link_changed,
            on_message=self._heard,
            on_unreadable=self._unreadable,
            max_packet_bytes=2 * self._max_body_bytes + _HEAD_BYTES,  # what is a little too long is told so
        )
        self._link.subscribe(self._topics.infer_filter, 1, retained=False)
        self._link.start()

    async def drain(self) -> None:
        """Wait for those that are being answered now."""
        if self._open:
            await asyncio.wait(set(self._open))

    async def stop(self) -> None:
        """The desk takes nothing any more: give the last answers, and leave."""
        if self._link is None:
            return
        if self._open:
            _, late = await asyncio.wait(self._open, timeout=_LAST_S)
            for task in late:
                task.cancel()
        if len(self._answers) and self._link.state.connected:
            gone = asyncio.Event()
            self._answers.on_empty = gone.set
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(gone.wait(), _LAST_S)
        await asyncio.to_thread(self._link.stop)
        if lost := len(self._answers) + self._answers.lost:
            log.warning("%d answers never reached the broker", lost)

    # In

    def _heard(self, message: Publication) -> None:
        if message.retain:  # of who knows when: it would be asked again at every connection
            self._ignored += 1
            return
        self._asked += 1
        message = light(message)
        if len(self._open) < MAX_OPEN:
            task = asyncio.get_running_loop().create_task(self._serve(message), name="mqtt-infer")
            self._open.add(task)
            task.add_done_callback(self._open.discard)
            return
        self._shed += 1
        shed = shed_answer(Shed(Reason.QUEUE_FULL, 1.0))
        body = error_body(str(shed.error), {"route": None, "reason": shed.reason.value})
        reply = Reply(status=shed.status, body=body, headers=(retry_after(1.0),))
        self._post(self._asker.shed(self._came(message), reply), message, self._clock())

    def _came(self, message: Publication) -> Came:
        return Came(topic=message.topic, model=self._topics.model(message.topic), size_bytes=len(message.payload))

    def _unreadable(self, why: str) -> None:
        self._ignored += 1
        _seldom.warn(
            "unreadable", "%s: a message can't be read, and isn't answered: %s", self._topics.infer_filter, why
        )

    async def _serve(self, message: Publication) -> None:
        came_at = self._clock()
        to = reply_to(message)
        try:
            understood = partial(read, message, to, self._topics, max_body_bytes=self._max_body_bytes)
            reply = await self._asker.ask(self._came(message), understood)
        except AiosEdgeError as error:
            reply = _refusal(error)
        except Exception:
            log.exception("a request at %s failed", message.topic)
            reply = Reply(status=500, body=error_body("an internal error; the agent's log has it"))
        try:
            self._post(reply, message, came_at, to)
        finally:
            if reply.completion is not None:
                self._record(reply.completion)

    # Out

    def _post(self, reply: Reply, message: Publication, came_at: float, to: ReplyTo | None = None) -> None:
        to, known, now = to or reply_to(message), hints(message), self._clock()
        if self.link.protocol == "3.1.1" and any(name == JSON_LENGTH.encode() for name, _ in reply.headers):
            what = "MQTT 3.1.1 can't say where the binary tensors of an answer begin"
            reply = _refusal(RequestError(what, remedy="Ask for JSON, or use MQTT 5"))

        def instead(reason: str) -> Publication:
            error = RequestError(f"the broker took no answer of {len(reply.body)} bytes: {reason}", status=413)
            return answer(_refusal(error), message, to, known, waited_s=self._clock() - came_at)

        within = [limit for limit in (message.properties.expiry_s, known.timeout_s) if limit is not None]
        self._answers.post(
            answer(reply, message, to, known, waited_s=now - came_at),
            worthless_at=came_at + min(within, default=KEEP_S),
            instead=instead if reply.status < 400 else None,
        )

    def _publish(self, message: Publication, on_delivered: Callable[..., None]) -> bool:
        return self._link is not None and self._link.publish(message, on_delivered)

    def _link_changed(self, state: LinkState) -> None:
        if state.connected and state.reason is not None and state.reason != self._said:
            self._said = state.reason
            log.error("%s: nobody is answered over MQTT: %s", self._topics.infer_filter, state.reason)
        if not state.connected or state.connects != self._connects:
            self._connects = state.connects
            self._answers.link_changed(connected=state.connected)


def _refusal(error: AiosEdgeError) -> Reply:
    return Reply(status=error.http_status, body=error_body(str(error)))
