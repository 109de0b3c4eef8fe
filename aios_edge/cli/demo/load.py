"""Open-loop load: requests leave when a Poisson process says so, whether or not earlier ones were answered.

Latency counts from the scheduled departure, so a stalled server can't hide behind a stalled client.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from aios_edge.client import Client, Overloaded
from aios_edge.errors import AiosEdgeError

CLIENT_THREADS = 96  # more than can be in flight within a few deadlines, so that departures are never held up


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one offered request. ``status``: ``answered``, ``shed`` (503, 504) or ``failed``."""

    text: int  # index into the sentences
    status: str
    latency_s: float
    label: str | None = None
    route: str | None = None
    reason: str | None = None


def poisson_schedule(rate_per_s: float, duration_s: float, seed: int) -> tuple[float, ...]:
    """Departure times within ``[0, duration_s)``; seeded, so that runs with and without a cloud see the same load."""
    generator = random.Random(seed)
    times: list[float] = []
    now = generator.expovariate(rate_per_s)
    while now < duration_s:
        times.append(now)
        now += generator.expovariate(rate_per_s)
    return tuple(times)


class Sender:
    """Sends single sentences from many threads, one kept-alive connection each."""

    def __init__(self, url: str, model: str, sentences: Sequence[str]) -> None:
        self._url = url
        self._model = model
        self._sentences = sentences
        self._local = threading.local()

    def send(self, text: int, due_at: float, deadline_s: float | None) -> Outcome:
        """One request, timed from ``due_at`` (``time.monotonic``)."""
        if not hasattr(self._local, "client"):
            self._local.client = Client(self._url, timeout_s=30.0)
        client: Client = self._local.client
        try:
            (answer,) = client.classify(self._model, [self._sentences[text]], deadline_s=deadline_s)
        except Overloaded:
            return Outcome(text=text, status="shed", latency_s=time.monotonic() - due_at)
        except AiosEdgeError as error:
            return Outcome(text=text, status="failed", latency_s=time.monotonic() - due_at, reason=str(error))
        return Outcome(
            text=text,
            status="answered",
            latency_s=time.monotonic() - due_at,
            label=answer.label,
            route=answer.route,
            reason=answer.reason,
        )


def offer(
    sender: Sender,
    schedule: Sequence[float],
    sentence_count: int,
    deadline_s: float,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Outcome, ...]:
    """Offer the whole schedule and wait for every answer; ``stop`` ends it early."""
    with ThreadPoolExecutor(CLIENT_THREADS, thread_name_prefix="load") as pool:
        start = time.monotonic() + 0.05
        futures = []
        for index, departure in enumerate(schedule):
            if stop():
                break
            time.sleep(max(0.0, start + departure - time.monotonic()))
            futures.append(pool.submit(sender.send, index % sentence_count, start + departure, deadline_s))
        return tuple(future.result() for future in futures)


def closed_loop(sender: Sender, connections: int, duration_s: float, sentence_count: int) -> float:
    """Answers per second when ``connections`` clients each wait for their answer before asking again."""
    end = time.monotonic() + duration_s
    counter = iter(range(10**9))
    lock = threading.Lock()
    answered = 0

    def ask() -> None:
        nonlocal answered
        while (now := time.monotonic()) < end:
            with lock:
                text = next(counter) % sentence_count
            outcome = sender.send(text, now, None)
            with lock:
                answered += outcome.status == "answered"

    start = time.monotonic()
    with ThreadPoolExecutor(connections) as pool:
        for future in [pool.submit(ask) for _ in range(connections)]:
            future.result()
    return answered / (time.monotonic() - start)
