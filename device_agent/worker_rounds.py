"""Batches through one model, in the order they come; while one's texts run, the next one is read and tokenized.

That takes a thread for the runs, and the way to it and back costs more than it saves where nobody else waits. So a
batch of a single run goes there only when it was there before it was asked for: then more are likely to come in time.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque

from device_agent import wire
from device_agent.activation import Activated
from device_agent.worker_batch import Answer, Job, answering
from device_agent.worker_memory import ResidentSet
from device_agent.worker_natural import Asked, Runner

_MOST = 2  # under way: one that runs, and one that is prepared


class _Round:
    """A batch on its way: ``answers`` when it is through, else ``waits_for`` what :func:`answering` says."""

    def __init__(
        self, run: wire.Run, payload: memoryview, activated: Activated, runner: Runner, *, beside: bool
    ) -> None:
        self.batch_id = run.batch_id
        self.began_at = time.monotonic()
        self.answers: list[Answer] | None = None
        self.waits_for: Asked | None = None
        jobs = [
            Job(
                request_id=item.request_id,
                body=bytes(item.body.of(payload)),
                json_length=item.json_length,
                deadline_at=item.deadline_at,
            )
            for item in run.items
        ]
        self._answering = answering(
            activated, jobs, now=self.began_at, runner=runner, beside=beside, classes=run.classes
        )

    def go_on(self) -> None:
        """To where it waits next, or to its end."""
        try:
            self.waits_for = next(self._answering)
        except StopIteration as end:
            self.answers = end.value


class _Took:
    """What each batch took. No moment counts twice: what was prepared beside another one took no time of its own."""

    def __init__(self) -> None:
        self._ended_at = 0.0

    def by(self, ended: _Round, slowdown: float) -> float:
        """Seconds that a batch took which ends now. A weaker device is asleep first, so that the rest of this machine
        stays as strong as it is."""
        began_at = max(ended.began_at, self._ended_at)
        if slowdown > 1.0:
            time.sleep((time.monotonic() - began_at) * (slowdown - 1.0))
        self._ended_at = time.monotonic()
        return self._ended_at - began_at


def serve_runs(sock: socket.socket, activated: Activated, load: wire.Load) -> None:
    """Answer what comes through the socket until it is closed or says stop; what came before that is answered first.
    Raises :class:`OSError` when the peer has gone, :class:`ConnectionError` when it speaks nonsense."""
    natural = bool(activated.task.natural_names)
    most = 1 if load.slowdown > 1.0 else _MOST  # nothing runs on a weaker device while this one sleeps for it
    rounds: deque[_Round] = deque()
    took, resident = _Took(), ResidentSet()
    stopping = False
    incoming = select.poll()
    incoming.register(sock, select.POLLIN)
    with Runner(activated) as runner:
        while True:
            if rounds and (stopping or len(rounds) == most or not _may_wait(rounds[0], runner, sock)):
                first = rounds[0]
                if first.answers is None:
                    first.go_on()
                if first.answers is not None:
                    rounds.popleft()
                    busy_s = took.by(first, load.slowdown)
                    _send(sock, load, first.batch_id, first.answers, busy_s=busy_s, rss_bytes=resident.bytes())
                continue
            if stopping:
                return
            beside = bool(rounds) or (natural and bool(incoming.poll(0)))
            if (received := wire.receive(sock)) is None:
                return
            message, payload = received
            stopping = isinstance(message, wire.Stop)
            if isinstance(message, wire.Ping):
                wire.send(sock, wire.Pong(generation=load.generation))
            if isinstance(message, wire.Run) and message.generation == load.generation:
                rounds.append(_Round(message, payload, activated, runner, beside=beside))
                rounds[-1].go_on()


def _may_wait(first: _Round, runner: Runner, sock: socket.socket) -> bool:
    """Whether another message comes before the first batch can go on; waits until that is clear."""
    return first.answers is None and first.waits_for is not None and runner.outlasts(sock, first.waits_for)


def _send(
    sock: socket.socket, load: wire.Load, batch_id: int, answers: list[Answer], *, busy_s: float, rss_bytes: int
) -> None:
    content = bytearray()
    items: list[wire.DoneItem] = []
    for answer in answers:
        outputs = wire.Region(len(content), len(answer.outputs))
        content += answer.outputs
        binary = wire.Region(len(content), len(answer.binary))
        content += answer.binary
        items.append(
            wire.DoneItem(
                request_id=answer.request_id,
                status=answer.status,
                outputs=outputs,
                binary=binary,
                error=answer.error,
                length=answer.length,
                batch_size=answer.batch_size,
                compute_s=answer.compute_s * max(1.0, load.slowdown),
                confidence=answer.confidence,
                classes=answer.classes,
            )
        )
    done = wire.Done(
        batch_id=batch_id,
        generation=load.generation,
        busy_s=busy_s,
        rss_bytes=rss_bytes,
        items=tuple(items),
    )
    wire.send(sock, done, content)
