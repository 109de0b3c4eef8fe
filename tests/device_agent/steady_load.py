"""Clients that ask one request after the other, each with a number of its own, over a Unix socket that may come and go.

Every request ends in its answer, in a refusal, or with its connection; what doesn't is a hang, and fails.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from raw_http import LIMIT_S, Door, Heard, Wire, post

NUMBERS = itertools.count(1)
PAUSE_S = 0.01  # after a refusal, or while nobody listens


def ask(number: int, timeout_us: int = 0) -> bytes:
    """An inference of ``identity_model`` that tells its number."""
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [number]}
    document = {"id": f"n{number}", "parameters": {"timeout": timeout_us}, "inputs": [tensor]}
    return post("/v2/models/id/infer", json.dumps(document).encode())


def soon_s(limit_s: float = 3.0) -> float:
    """What is promised of a machine that has nothing else to do; one with more work than processors may take five times
    as long, and no longer."""
    return limit_s * min(5.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


class SteadyLoad:
    """``with SteadyLoad(door):``; ``ended`` counts how requests did, ``wrong`` what should never happen."""

    def __init__(self, door: Door, clients: int = 4, timeout_us: int = 0) -> None:
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.answered_at = 0.0  # the latest 200, monotonic
        self._door = door
        self._timeout_us = timeout_us
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(clients)]

    def __enter__(self) -> SteadyLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(LIMIT_S + 5)
        if kind is None:
            assert not any(thread.is_alive() for thread in self._threads), "a request hangs"
            assert self.wrong == [], self.wrong[:5]

    def answers(self, kind: str = "local") -> int:
        """How many were answered there so far."""
        with self._lock:
            return self.ended[kind]

    def until(self, condition: Callable[[], bool], limit_s: float) -> float:
        """Wait; how long it took. Fails after ``limit_s``."""
        began = time.monotonic()
        while not condition():
            assert not self.wrong, self.wrong[:5]
            assert time.monotonic() - began < limit_s, f"not within {limit_s:g} s: {dict(self.ended)}"
            time.sleep(0.005)
        return time.monotonic() - began

    def goes_on(self, kind: str = "local", times: float = 1.0) -> float:
        """Until some more requests are answered, within 3 s (:func:`soon_s`), or ``times`` that; how long it took."""
        seen = self.answers(kind)
        return self.until(lambda: self.answers(kind) >= seen + 3, times * soon_s())

    def _client(self) -> None:
        wire: Wire | None = None
        while not self._over.is_set():
            number = next(NUMBERS)
            try:
                if wire is None:
                    wire = self._door.connect()
                wire.say(ask(number, self._timeout_us))
                heard = wire.hear()
            except TimeoutError:
                self._end("hangs", f"request {number} hangs")
                return
            except OSError:
                heard = None
            if heard is None:
                self._end("closed")
                if wire is not None:
                    wire.sock.close()
                wire = None
            else:
                self._judge(number, heard)
            if heard is None or heard.status != 200:
                time.sleep(PAUSE_S)
        if wire is not None:
            wire.sock.close()

    def _judge(self, number: int, heard: Heard) -> None:
        document = heard.document
        if heard.status == 200:
            data = [output["data"] for output in document["outputs"]]
            fits = document["id"] == f"n{number}" and data == [[number]]
            self.answered_at = time.monotonic()
            self._end(document["parameters"]["route"], None if fits else f"request {number} got {document}")
        else:
            self._end(str(heard.status), None if heard.status in (503, 504) else f"request {number} got {heard}")

    def _end(self, how: str, wrong: str | None = None) -> None:
        with self._lock:
            self.ended[how] += 1
            if wrong is not None:
                self.wrong.append(wrong)
