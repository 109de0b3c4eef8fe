"""Natural inputs (text) through the model: encode, run, decode, in runs of at most ``max_batch_size`` rows.

onnxruntime runs without Python's lock. Where there are several runs, a thread of its own does them one after the other
(:class:`Runner`), and meanwhile the next rows are tokenized and the last ones decoded: preparing costs a third of a
small model's time, and the model never waits for it but once.
"""

from __future__ import annotations

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


class Runner:
    """Runs the model in a thread of its own: :meth:`ask` as often as :meth:`told`, in the same order. The thread begins
    with the first question and ends with the ``with`` block."""

    def __init__(self, activated: Activated) -> None:
        self._activated = activated
        self._asked: SimpleQueue[Tensors | None] = SimpleQueue()
        self._told: SimpleQueue[_Ran | Exception] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, inputs: Tensors) -> None:
        """Run these next."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="model-runs", daemon=True)
            self._thread.start()
        self._asked.put(inputs)

    def told(self) -> _Ran | Exception:
        """Wait for the first answer that nobody has heard yet."""
        return self._told.get()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._asked.put(None)

    def _serve(self) -> None:
        while (inputs := self._asked.get()) is not None:
            try:
                self._told.put(_run(self._activated, inputs))
            except Exception as error:  # its request is answered for it
                self._told.put(error)


def in_chunks(activated: Activated, raws: Sequence[RawInput], runner: Runner | None) -> Iterator[Chunk]:
    """All rows, longest first, chunk by chunk as they are answered; the next one runs while the caller has a chunk.

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

    if runner is None or len(chunks) == 1:
        for places in chunks:
            prepared = prepare(places)
            yield _finished(activated, prepared, _run(activated, prepared.inputs))
        return
    asked: deque[_Prepared] = deque()
    try:
        for places in chunks:
            if len(asked) == 2:  # one runs, one is ready to
                yield _finished(activated, *_heard(runner, asked))
            prepared = prepare(places)
            runner.ask(prepared.inputs)
            asked.append(prepared)
        while asked:
            yield _finished(activated, *_heard(runner, asked))
    finally:
        while asked:
            asked.popleft()
            runner.told()


def _heard(runner: Runner, asked: deque[_Prepared]) -> tuple[_Prepared, _Ran]:
    told = runner.told()
    prepared = asked.popleft()
    if isinstance(told, Exception):
        raise told
    return prepared, told


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
