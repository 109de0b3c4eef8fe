"""The worker's loop, over a real socket pair and with a real model: what it prepares beside a run, and in which order
it answers all the same."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aios_edge.profile_files import load_profile
from device_agent import wire
from device_agent.activation import Activated, activate
from device_agent.worker_batch import Job, answer_batch
from device_agent.worker_rounds import serve_runs

WAIT_S = 20.0  # until something is taken for hung


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Any) -> Activated:
    return activate(tiny_bundle.path, load_profile("x86-gateway"), "quick", alone=False)


def texts(*said: str) -> bytes:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(said)], "data": said}
    return msgspec.json.encode({"inputs": [tensor]})


def ids(*row: int) -> bytes:
    names = {"input_ids": row, "attention_mask": [1] * len(row)}
    inputs = [{"name": n, "datatype": "INT64", "shape": [1, len(row)], "data": data} for n, data in names.items()]
    return msgspec.json.encode({"inputs": inputs})


class Supervisor:
    """The other end of the worker's socket. ``slowdown`` as in a :class:`wire.Load`."""

    def __init__(self, activated: Activated, slowdown: float = 1.0) -> None:
        self.sock, self._theirs = wire.pair()
        self.sock.setblocking(True)
        self.sock.settimeout(WAIT_S)
        load = wire.Load(bundle_path="", profile="", generation=3, slowdown=slowdown)
        self._thread = threading.Thread(target=serve_runs, args=(self._theirs, activated, load))
        self._batch_id = 0

    def give(self, *bodies: bytes) -> None:
        self._batch_id += 1
        items, start = [], 0
        for number, body in enumerate(bodies):
            region = wire.Region(start, len(body))
            items.append(wire.RunItem(request_id=number, body=region, json_length=None, deadline_at=None))
            start += len(body)
        wire.send(self.sock, wire.Run(batch_id=self._batch_id, generation=3, items=tuple(items)), b"".join(bodies))

    def hear(self) -> tuple[wire.Message, memoryview]:
        received = wire.receive(self.sock)
        assert received is not None
        return received

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self.sock.close()
        self._theirs.close()


def ready(activated: Activated, *batches: tuple[bytes, ...], slowdown: float = 1.0) -> Supervisor:
    """A worker that finds these batches, which are there before it looks."""
    supervisor = Supervisor(activated, slowdown)
    for bodies in batches:
        supervisor.give(*bodies)
    return supervisor


@pytest.fixture
def watched(tiny: Activated, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is begun and ended, in order."""
    log: list[str] = []

    def noted(name: str, what: Callable[..., Any]) -> Callable[..., Any]:
        def do(*given: Any, **named: Any) -> Any:
            log.append(f"{name} begins")
            try:
                return what(*given, **named)
            finally:
                log.append(f"{name} ends")

        return do

    monkeypatch.setattr(tiny.task, "encode", noted("encode", tiny.task.encode))
    monkeypatch.setattr(tiny.runtime, "run", noted("run", tiny.runtime.run))
    yield log


def until(log: list[str], what: str, times: int) -> None:
    end = time.monotonic() + WAIT_S
    while log.count(what) < times:
        assert time.monotonic() < end, log
        time.sleep(0.001)


@pytest.fixture
def held(tiny: Activated, watched: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Runs wait for it."""
    go, run = threading.Event(), tiny.runtime.run

    def waiting(inputs: Any) -> Any:
        assert go.wait(WAIT_S)
        return run(inputs)

    monkeypatch.setattr(tiny.runtime, "run", waiting)
    yield go
    go.set()


def test_the_next_texts_are_tokenized_while_the_model_runs(
    tiny: Activated, watched: list[str], held: threading.Event
) -> None:
    with ready(tiny, (texts("a good film"),), (texts("a bad film"),)) as supervisor:
        until(watched, "encode ends", 2)
        assert "run ends" not in watched
        held.set()
        assert [supervisor.hear()[0].batch_id for _ in range(2)] == [1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("second", [ids(2, 4, 3), b"{}"], ids=["tensors", "refused"])
def test_what_needs_no_preparation_waits_for_its_turn(
    tiny: Activated, watched: list[str], held: threading.Event, second: bytes
) -> None:
    with ready(tiny, (texts("a good film"),), (second,)) as supervisor:
        wire.send(supervisor.sock, wire.Ping())
        until(watched, "encode ends", 1)
        held.set()
        told = [supervisor.hear()[0] for _ in range(3)]
    assert [done.batch_id for done in told if isinstance(done, wire.Done)] == [1, 2]
    runs = [line for line in watched if line.startswith("run")]
    assert runs == ["run begins", "run ends"] * (2 if second != b"{}" else 1), "never two at once"


def test_it_says_that_it_lives_while_texts_run(tiny: Activated, watched: list[str], held: threading.Event) -> None:
    with ready(tiny, (texts("a good film"),)) as supervisor:
        until(watched, "encode ends", 1)
        wire.send(supervisor.sock, wire.Ping())
        assert isinstance(supervisor.hear()[0], wire.Pong)
        held.set()
        assert isinstance(supervisor.hear()[0], wire.Done)


@pytest.mark.parametrize("batches", [1, 2])
def test_what_is_under_way_is_answered_before_a_stop_ends_it(
    tiny: Activated, watched: list[str], held: threading.Event, batches: int
) -> None:
    with ready(tiny, *[(texts("a good film"),), (texts("a bad film"),)][:batches]) as supervisor:
        wire.send(supervisor.sock, wire.Stop())
        until(watched, "encode ends", batches)
        held.set()
        told = [supervisor.hear()[0] for _ in range(batches)]
        assert [done.batch_id for done in told if isinstance(done, wire.Done)] == [*range(1, batches + 1)]
        supervisor._thread.join(WAIT_S)
        assert not supervisor._thread.is_alive(), "it asks for no more"


def test_a_weaker_device_does_not_prepare_while_it_is_thought_to_run(tiny: Activated, watched: list[str]) -> None:
    with ready(tiny, (texts("a good film"),), (texts("a bad film"),), slowdown=3.0) as supervisor:
        for _ in range(2):
            supervisor.hear()
    assert watched == ["encode begins", "encode ends", "run begins", "run ends"] * 2


BODIES = st.one_of(
    st.lists(st.sampled_from(["good", "a bad film", "zebra", "the plot " * 5]), max_size=20).map(lambda t: texts(*t)),
    st.lists(st.integers(2, 20), min_size=1, max_size=5).map(lambda row: ids(*row)),
    st.sampled_from([b"{}", b"nonsense"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(BODIES, min_size=1, max_size=3).map(tuple), min_size=1, max_size=6))
def test_answers_are_those_of_one_batch_after_the_other(
    tiny: Activated, monkeypatch: pytest.MonkeyPatch, batches: list[tuple[bytes, ...]]
) -> None:
    with monkeypatch.context() as patched:
        run = tiny.runtime.run

        def picky(inputs: Any) -> Any:
            if (inputs["input_ids"] == 1).any():  # [UNK], as a zebra is
                raise ZeroDivisionError
            return run(inputs)

        patched.setattr(tiny.runtime, "run", picky)
        began = time.monotonic()
        with ready(tiny, *batches[:2]) as supervisor:
            told = []
            for number in range(len(batches)):
                told.append(supervisor.hear())
                if number + 2 < len(batches):
                    supervisor.give(*batches[number + 2])
        took_s = time.monotonic() - began
        for number, ((done, payload), bodies) in enumerate(zip(told, batches, strict=True), 1):
            assert isinstance(done, wire.Done) and done.batch_id == number
            jobs = [Job(request_id=n, body=body, json_length=None, deadline_at=None) for n, body in enumerate(bodies)]
            for item, mine in zip(done.items, answer_batch(tiny, jobs, now=0.0), strict=True):
                assert (item.request_id, item.status, item.error) == (mine.request_id, mine.status, mine.error)
                assert bytes(item.outputs.of(payload)) == mine.outputs
        assert sum(done.busy_s for done, _ in told if isinstance(done, wire.Done)) <= took_s, "no moment counts twice"
