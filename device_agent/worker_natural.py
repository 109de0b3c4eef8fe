"""Natural inputs (text) through the model: encode, run, decode, in runs of at most ``max_batch_size`` rows.

onnxruntime runs without Python's lock. Where there are several runs, a thread of its own does them one after the other
(:class:`Runner`), and meanwhile the next rows are tokenized and the last ones decoded: preparing costs a third of a
small model's time, and while there is something to do the model never waits for it.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import msgspec
from numpy.typing import NDArray

from aios_edge.errors import RequestError, RuntimeUnavailable
from aios_edge.golden import RawInput
from aios_edge.tasks import Prediction
from device_agent.activation import Activated

Tensors = Mapping[str, NDArray[Any]]


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that shared a run: their places in the input, and what became of each. ``compute_s``: encoding, running and
    decoding them, without waiting."""

    places: list[int]
    predictions: tuple[Prediction, ...]
    lengths: tuple[int, ...]
    compute_s: float


class _Prepared(msgspec.Struct, frozen=True):
    places: list[int]
    inputs: Tensors
    encode_s: float


class _Ran(msgspec.Struct, frozen=True):
    outputs: Tensors
    run_s: float


class Asked:
    """Inputs on their way through the model, and what came of them."""

    __slots__ = ("inputs", "ran")

    def __init__(self, inputs: Tensors) -> None:
        self.inputs = inputs
        self.ran: _Ran | Exception | None = None


class Runner:
    """Runs the model in a thread of its own, in the order of :meth:`ask`. The thread begins with the first question and
    ends with the ``with`` block."""

    def __init__(self, activated: Activated) -> None:
        self._activated = activated
        self._asked: SimpleQueue[Asked | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ran = os.eventfd(0, os.EFD_CLOEXEC)  # readable when something has run since it was read

    def ask(self, inputs: Tensors) -> Asked:
        """Run these next."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="model-runs", daemon=True)
            self._thread.start()
        self._asked.put(asked := Asked(inputs))
        return asked

    def told(self, asked: Asked) -> _Ran:
        """Wait until these have run. Raises what running raised."""
        while asked.ran is None:
            os.eventfd_read(self._ran)
        if isinstance(asked.ran, Exception):
            raise asked.ran
        return asked.ran

    def outlasts(self, sock: socket.socket, asked: Asked) -> bool:
        """Whether something comes through a socket while these run; waits until one of both is so."""
        both = select.poll()
        both.register(sock, select.POLLIN)
        both.register(self._ran, select.POLLIN)
        while asked.ran is None:
            ready = [fd for fd, _ in both.poll()]
            if sock.fileno() in ready:
                return True
            os.eventfd_read(self._ran)
        return False

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._asked.put(None)
        if self._thread is None:
            os.close(self._ran)

    def _serve(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                asked.ran = _run(self._activated, asked.inputs)
            except Exception as error:  # its request is answered for it
                asked.ran = error
            os.eventfd_write(self._ran, 1)
        os.close(self._ran)


def in_chunks(
    activated: Activated, raws: Sequence[RawInput], runner: Runner | None, *, beside: bool = False
) -> Iterator[Chunk | Asked | None]:
    """All rows, longest first, chunk by chunk as they are answered; the next one runs while the caller has a chunk.

    Before it waits for the model it yields what it waits for, or, where the caller's own thread is to run it, None.
    A single chunk runs in the runner's thread only ``beside`` other work: the way there and back costs more than it
    saves.

    Sorting keeps rows of similar length together, which saves padding, and makes the result a function of what is in
    the batch and not of the order it came in: a dynamically quantized model answers slightly differently with other
    neighbours. Raises what encoding, running or decoding raises.
    """
    order = sorted(range(len(raws)), key=lambda place: _sort_key(raws[place]))
    step = activated.bundle.manifest.max_batch_size
    chunks = [order[start : start + step] for start in range(0, len(order), step)]

    def prepare(places: list[int]) -> _Prepared:
        began = time.perf_counter()
        inputs = activated.task.encode([raws[place] for place in places])
        return _Prepared(places, inputs, time.perf_counter() - began)

    if runner is None or (len(chunks) == 1 and not beside):
        for places in chunks:
            prepared = prepare(places)
            yield None
            yield _finished(activated, prepared, _run(activated, prepared.inputs))
        return
    under_way: deque[tuple[_Prepared, Asked]] = deque()
    for places in chunks:
        if len(under_way) == 2:  # one runs, one is ready to
            yield under_way[0][1]
            prepared, asked = under_way.popleft()
            yield _finished(activated, prepared, runner.told(asked))
        prepared = prepare(places)
        under_way.append((prepared, runner.ask(prepared.inputs)))
    while under_way:
        yield under_way[0][1]
        prepared, asked = under_way.popleft()
        yield _finished(activated, prepared, runner.told(asked))


def _run(activated: Activated, inputs: Tensors) -> _Ran:
    """Run the model on tensors that were made here: what it has against them is no fault of the client's."""
    began = time.perf_counter()
    try:
        outputs = activated.runtime.run(inputs)
    except RequestError as error:
        raise RuntimeUnavailable(error.what) from error
    return _Ran(outputs, time.perf_counter() - began)


def _finished(activated: Activated, prepared: _Prepared, ran: _Ran) -> Chunk:
    began = time.perf_counter()
    predictions = activated.task.decode(ran.outputs, finite=False)
    lengths = activated.task.lengths(prepared.inputs)
    return Chunk(
        places=prepared.places,
        predictions=predictions,
        lengths=lengths,
        compute_s=prepared.encode_s + ran.run_s + time.perf_counter() - began,
    )


def _sort_key(raw: RawInput) -> tuple[int, RawInput]:
    size = len(raw) if isinstance(raw, str) else sum(len(part) for part in raw)
    return -size, raw
