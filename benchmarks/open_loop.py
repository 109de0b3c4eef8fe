"""Open-loop load over HTTP/1.1 keep-alive connections: requests leave on schedule, whether or not others were answered.

    python benchmarks/open_loop.py PLAN.json

A process of its own: one Python thread over epoll. A request for which no connection is free gets a new one, so nothing
waits in the generator. What it was late by itself is told for each request, and its processor time. A request's time
counts from the schedule, and the agent is given what is then left of its deadline.
"""

from __future__ import annotations

import gc
import math
import random
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from load_generator import Connection

BURST_S = 1.0  # on, and then off
PATIENCE_S = 5.0  # after the last deadline; who isn't answered then never will be
LEAD_S = 1.0  # to start the process and read the plan


class Departure(msgspec.Struct, frozen=True, array_like=True):
    """One request: when it leaves, after the beginning, and by when it wants its answer, after that."""

    at_s: float
    deadline_s: float
    private: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to send. ``begin_at`` is a time of CLOCK_MONOTONIC; ``inputs`` and ``private_inputs`` are JSON lists."""

    port: int
    path: str
    begin_at: float
    inputs: str
    private_inputs: str
    departures: tuple[Departure, ...]


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """What became of a request, in seconds after the beginning; ``status`` 0: the connection broke, or no answer came.
    ``sound``: not 200, or the outputs that were asked for."""

    at_s: float
    deadline_s: float
    sent_s: float
    done_s: float
    status: int
    route: str | None = None
    reason: str | None = None
    sound: bool = True

    @property
    def overdue_s(self) -> float:
        """How long after its deadline it was answered or refused; negative: before."""
        return self.done_s - self.at_s - self.deadline_s

    @property
    def in_time(self) -> bool:
        """Answered before its deadline."""
        return self.status == 200 and self.overdue_s <= 0


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """All outcomes, in the order of the schedule; ``cpu_s`` is the generator's own processor time."""

    outcomes: tuple[Outcome, ...]
    cpu_s: float
    connections: int


def schedule(
    rate_per_s: float,
    seconds: float,
    deadlines_s: tuple[float, float],
    *,
    bursts: bool = False,
    private_share: float = 0.0,
    seed: int = 0,
) -> tuple[Departure, ...]:
    """A Poisson process; with ``bursts`` only in every other second. Deadlines between the two, as many within each
    factor of two, so that tight ones aren't rare."""
    chance = random.Random(seed)
    least, most = (math.log(each) for each in deadlines_s)
    found: list[Departure] = []
    busy_s = 0.0  # on a clock that stands still while the load is off
    while True:
        busy_s += chance.expovariate(rate_per_s)
        at_s = busy_s + (busy_s // BURST_S) * BURST_S if bursts else busy_s
        if at_s >= seconds:
            return tuple(found)
        deadline_s = math.exp(chance.uniform(least, most))
        found.append(Departure(at_s, deadline_s, chance.random() < private_share))


class Run:
    """The generator at work; begins at ``begin_at``."""

    def __init__(self, port: int, path: str, inputs: tuple[str, str], departures: Sequence[Departure]) -> None:
        self.begin_at = time.monotonic() + LEAD_S
        plan = Plan(
            port=port,
            path=path,
            begin_at=self.begin_at,
            inputs=inputs[0],
            private_inputs=inputs[1],
            departures=tuple(departures),
        )
        with tempfile.NamedTemporaryFile(suffix=".json", delete=False) as file:
            file.write(msgspec.json.encode(plan))
        self._plan = Path(file.name)
        self._process = subprocess.Popen([sys.executable, __file__, file.name], stdout=subprocess.PIPE)

    def wait(self) -> Sent:
        """Until everything was answered."""
        out, _ = self._process.communicate()
        self._plan.unlink()
        if self._process.returncode:
            raise RuntimeError(f"the load generator failed with exit code {self._process.returncode}")
        return msgspec.json.decode(out, type=Sent)


class _Call(Connection):
    """A connection and the request that is on its way; None while it is idle."""

    departure: Departure | None = None
    sent_s: float = 0.0


class _Parameters(msgspec.Struct):
    route: str | None = None
    reason: str | None = None


class _Output(msgspec.Struct):
    name: str
    data: list[float]


class _Document(msgspec.Struct):
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)
    outputs: list[_Output] = []


_documents = msgspec.json.Decoder(_Document)


class _Generator:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._selector = selectors.EpollSelector()
        self._idle: list[_Call] = []
        self._head = f"POST {plan.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()
        self.outcomes: list[Outcome] = []
        self.connections = 0
        self.waiting = 0

    def now_s(self) -> float:
        return time.monotonic() - self._plan.begin_at

    def send(self, departure: Departure) -> None:
        call = self._idle.pop() if self._idle else self.connect()
        plan = self._plan
        sent_s = self.now_s()
        timeout_us = max(int((departure.at_s + departure.deadline_s - sent_s) * 1e6), 1)
        inputs, privacy = (plan.private_inputs, ',"privacy":"local-only"') if departure.private else (plan.inputs, "")
        body = f'{{"parameters":{{"timeout":{timeout_us}{privacy}}},"inputs":{inputs}}}'.encode()
        call.departure, call.sent_s = departure, sent_s
        self.waiting += 1
        try:
            call.send(b"%bContent-Length: %d\r\n\r\n%b" % (self._head, len(body), body))
        except OSError:
            self.drop(call)

    def connect(self) -> _Call:
        call = _Call(self._plan.port)
        self.connections += 1
        self._selector.register(call.socket, selectors.EVENT_READ, call)
        return call

    def drop(self, call: _Call) -> None:
        """Its connection is of no use any more."""
        self._selector.unregister(call.socket)
        call.socket.close()
        if call.departure is None:
            self._idle.remove(call)
        else:
            self.note(call, call.departure, 0, b"")

    def receive(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(max(timeout_s, 0.0)):
            call: Any = key.data
            try:
                answer = call.answer()
            except OSError:
                self.drop(call)
                continue
            if answer is not None and call.departure is not None:
                self.note(call, call.departure, *answer)
                self._idle.append(call)

    def note(self, call: _Call, departure: Departure, status: int, body: bytes) -> None:
        done_s = self.now_s()
        call.departure = None
        self.waiting -= 1
        try:
            document = _documents.decode(body) if status else _Document()
        except (msgspec.MsgspecError, UnicodeDecodeError):
            document = _Document()
        sound = status != 200 or [(each.name, len(each.data)) for each in document.outputs] == [("logits", 3)]
        told = document.parameters
        self.outcomes.append(
            Outcome(departure.at_s, departure.deadline_s, call.sent_s, done_s, status, told.route, told.reason, sound)
        )

    def give_up(self) -> None:
        """Who waits now is never answered."""
        for key in list(self._selector.get_map().values()):
            if key.data.departure is not None:
                self.drop(key.data)


def main(path: str) -> None:
    """The generator's process."""
    plan = msgspec.json.decode(Path(path).read_bytes(), type=Plan)
    generator = _Generator(plan)
    for _ in range(16):
        generator._idle.append(generator.connect())
    gc.freeze()
    gc.disable()  # a collection among so many outcomes would hold up departures
    for departure in plan.departures:
        while (ahead_s := departure.at_s - generator.now_s()) > 0:
            generator.receive(ahead_s)
        generator.receive(0.0)
        generator.send(departure)
    end_s = max((each.at_s + each.deadline_s for each in plan.departures), default=0.0) + PATIENCE_S
    while generator.waiting and (left_s := end_s - generator.now_s()) > 0:
        generator.receive(left_s)
    generator.give_up()
    outcomes = tuple(sorted(generator.outcomes, key=lambda outcome: outcome.at_s))
    sent = Sent(outcomes=outcomes, cpu_s=time.process_time(), connections=generator.connections)
    sys.stdout.buffer.write(msgspec.json.encode(sent))


if __name__ == "__main__":
    main(sys.argv[1])
