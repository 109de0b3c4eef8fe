"""Answer a batch of requests with as few model runs as their inputs allow, each request by itself.

Natural requests (text) are encoded and padded together. Tensor requests are concatenated along axis 0 when names,
datatypes and trailing shapes are equal, and are never padded: their shapes are the client's. One bad request, or one
that makes the model fail, never spoils the others: a failed group is run again one by one.
"""

from __future__ import annotations

import itertools
import math
import operator
import sys
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import RequestError
from aios_edge.golden import RawInput
from aios_edge.oip.tensors import DecodedRequest, Tensor, decode_inputs, encode_outputs
from aios_edge.tasks import Prediction
from device_agent.activation import Activated
from device_agent.no_rows import outputs_without_rows
from device_agent.runtime import check_inputs
from device_agent.worker_classes import classes_of_outputs, classes_of_predictions
from device_agent.worker_natural import Asked, Chunk, Runner, in_chunks

Tensors = Mapping[str, NDArray[np.generic]]

MAX_ERROR_CHARS = 500
_size = operator.attrgetter("size")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a batch: its Open Inference Protocol body."""

    request_id: int
    body: bytes
    json_length: int | None
    deadline_at: float | None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request; see :class:`device_agent.wire.DoneItem`."""

    request_id: int
    status: int = 200
    outputs: bytes = b""
    binary: bytes = b""
    error: str | None = None
    length: int = 0
    batch_size: int = 1
    compute_s: float = 0.0
    confidence: float | None = None
    classes: tuple[int, ...] | None = None


class _Work(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded request: ``raw`` for natural input, else ``tensors``. ``outputs``: of one without rows, which never
    runs."""

    request_id: int
    request: DecodedRequest
    raw: tuple[RawInput, ...] = ()
    tensors: Tensors | None = None
    outputs: Tensors | None = None
    rows: int = 1


#: Yields what it waits for: inputs that the runner has, or None where the model is run by who asks for more.
Answering = Generator[Asked | None, None, "list[Answer]"]


def answer_batch(
    activated: Activated, jobs: Sequence[Job], *, now: float, runner: Runner | None = None
) -> list[Answer]:
    """One answer per job, in their order: :func:`answering` from end to end."""
    rounds = answering(activated, jobs, now=now, runner=runner)
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            answers: list[Answer] = end.value
            return answers


def answering(
    activated: Activated,
    jobs: Sequence[Job],
    *,
    now: float,
    runner: Runner | None = None,
    beside: bool = False,
    classes: bool = False,
) -> Answering:
    """Returns one answer per job, in their order. It yields before the model runs: what is done until then may be done
    beside another batch's run.

    ``now`` is CLOCK_MONOTONIC: whoever's deadline has passed isn't run. ``runner``: where texts run that need several
    runs, or ``beside`` others; without it here, one after the other. ``classes``: each row's class is told as well."""
    answers: dict[int, Answer] = {}
    natural: list[_Work] = []
    grouped: dict[object, list[_Work]] = {}
    for job in jobs:
        if job.deadline_at is not None and job.deadline_at <= now:
            answers[job.request_id] = Answer(
                request_id=job.request_id, status=504, error="the deadline passed before the request could run"
            )
            continue
        try:
            work = _decoded(activated, job)
        except Exception as error:
            answers[job.request_id] = _failed(job.request_id, error)
            continue
        if work.outputs is not None:
            answers[job.request_id] = _answered(activated, work, work.outputs, batch_size=0, compute_s=0.0)
        elif work.tensors is None:
            natural.append(work)
        else:
            alone = activated.raw or len(jobs) == 1
            grouped.setdefault(object() if alone else _signature(work.tensors), []).append(work)

    run_tensors = partial(_run_tensors, activated, classes=classes)
    runs: list[tuple[list[_Work], Callable[[list[_Work]], Answering]]] = [
        (group, run_tensors)
        for members in grouped.values()
        for group in _within(members, activated.bundle.manifest.max_batch_size)
    ]
    if natural:
        runs.append((natural, lambda works: _run_natural(activated, works, runner, classes, beside)))
    for works, run in runs:
        for answer in (yield from _attempt(works, run)):
            answers[answer.request_id] = answer
    return [answers[job.request_id] for job in jobs]


def _attempt(works: list[_Work], run: Callable[[list[_Work]], Answering]) -> Answering:
    """Run a group; if that fails, each member alone, so that only the culprit fails."""
    try:
        return (yield from run(works))
    except Exception as error:
        if len(works) == 1:
            return [_failed(works[0].request_id, error)]
    found: list[Answer] = []
    for work in works:
        found += yield from _attempt([work], run)
    return found


def _failed(request_id: int, error: Exception) -> Answer:
    """What the client may know: a fault of its request in our words; of any other only that it happened."""
    if isinstance(error, RequestError):
        return Answer(request_id=request_id, status=error.http_status, error=str(error)[:MAX_ERROR_CHARS])
    # The supervisor's log gets kind and text; to a client they could tell paths, or data of others in the batch.
    print(f"request {request_id} failed: {type(error).__name__}: {error}"[:2000], file=sys.stderr, flush=True)
    return Answer(request_id=request_id, status=500, error="the model failed on this input; the device's log says more")


def _decoded(activated: Activated, job: Job) -> _Work:
    """Raises :class:`RequestError` for whatever is wrong with a request."""
    task, specs = activated.task, activated.runtime.inputs
    # A body without JSON is the model's only input, or, where it has several, the natural one.
    request = decode_inputs(job.body, job.json_length, specs if len(specs) == 1 else task.natural_inputs)
    raw = task.raw_tensors(request.inputs)
    if raw is not None:
        return _Work(request_id=job.request_id, request=request, raw=raw)
    tensors = {name: tensor.array for name, tensor in request.inputs.items()}
    datatypes, declared_empty = activated.runtime.datatypes, activated.runtime.declared_empty
    if not request.inputs.keys() <= datatypes.keys():
        unknown = [name for name in request.inputs if name not in datatypes]
        natural = f"{' and '.join(task.natural_names)}, or " if task.natural_names else ""
        raise RequestError(
            f"the model has no input {', '.join(map(repr, unknown))[:200]}",
            remedy=f"Send {natural}the model's own tensors: {', '.join(datatypes)}",
        )
    outputs = None
    if not (activated.raw or all(map(_size, tensors.values()))):
        outputs = outputs_without_rows(tensors, specs, activated.runtime.outputs)
    for name, tensor in request.inputs.items():  # arrays don't tell BF16 from UINT16
        if datatypes.get(name, tensor.datatype) != tensor.datatype:
            raise RequestError(f"is {tensor.datatype}, the model takes {datatypes[name]}", where=f"input {name!r}")
        # Some kernels of onnxruntime divide by the number of rows, which ends the process.
        if not (tensor.array.size or outputs or activated.takes_empty or name in declared_empty):
            raise RequestError("the tensor is empty", where=f"input {name!r}", remedy="Send at least one element")
    if outputs is not None:
        check_inputs(specs, tensors)
    first = next(iter(tensors.values()), None)
    rows = 1 if first is None or not first.ndim else first.shape[0]
    return _Work(request_id=job.request_id, request=request, tensors=tensors, outputs=outputs, rows=rows)


def _signature(tensors: Tensors) -> object:
    """Equal for tensors that can be concatenated along axis 0; scalars and unequal row counts stay alone."""
    if len(tensors) == 1:
        ((name, array),) = tensors.items()
        return (name, array.dtype.char, array.shape[1:]) if array.ndim else object()
    rows = {array.shape[0] if array.ndim else None for array in tensors.values()}
    if len(rows) != 1 or None in rows:
        return object()
    return tuple(sorted([(name, array.dtype.char, array.shape[1:]) for name, array in tensors.items()]))


def _within(works: list[_Work], max_batch_size: int) -> list[list[_Work]]:
    """Groups of at most ``max_batch_size`` rows; a single request that is larger than that stays alone."""
    if len(works) == 1:
        return [works]
    groups: list[list[_Work]] = []
    rows = 0
    for work in works:
        if not groups or rows + work.rows > max_batch_size:
            groups.append([])
            rows = 0
        groups[-1].append(work)
        rows += work.rows
    return groups


def _run_tensors(activated: Activated, works: list[_Work], *, classes: bool) -> Answering:
    yield None
    started_at = time.perf_counter()
    tensors = [work.tensors or {} for work in works]
    if len(works) == 1:
        outputs = [_run_rows(activated, tensors[0])]
    else:
        joined = {name: np.concatenate([each[name] for each in tensors]) for name in tensors[0]}
        outputs = _split(activated.runtime.run(joined), [work.rows for work in works])
    compute_s = time.perf_counter() - started_at
    return [
        _answered(activated, work, output, batch_size=len(works), compute_s=compute_s, classes=classes)
        for work, output in zip(works, outputs, strict=True)
    ]


def _answered(
    activated: Activated, work: _Work, outputs: Tensors, *, batch_size: int, compute_s: float, classes: bool = False
) -> Answer:
    datatypes = activated.runtime.output_datatypes
    return _encoded(
        work,
        {name: Tensor(datatypes[name], array) for name, array in outputs.items()},
        length=_length(work.tensors or {}),
        batch_size=batch_size,
        compute_s=compute_s,
        classes=classes_of_outputs(outputs, activated.bundle.manifest) if classes else None,
    )


def _run_rows(activated: Activated, tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    """One request's tensors in runs of at most ``max_batch_size`` rows: the memory of a run grows with its rows, and
    one request must not cost the worker its life. A model without free rows runs once, and so does a raw one."""
    manifest = activated.bundle.manifest
    step = manifest.max_batch_size
    rows = {array.shape[0] if array.ndim else 0 for array in tensors.values()}
    if activated.raw or len(rows) != 1 or max(rows) <= step:
        return dict(activated.runtime.run(tensors))
    if not all(spec.shape[:1] == (-1,) for spec in (*manifest.inputs, *manifest.outputs)):
        return dict(activated.runtime.run(tensors))
    parts = [
        activated.runtime.run({name: array[start : start + step] for name, array in tensors.items()})
        for start in range(0, max(rows), step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _split(outputs: Tensors, rows: Sequence[int]) -> list[dict[str, NDArray[np.generic]]]:
    """One part of each output per request; an output without a row per input row can't be shared out."""
    total = sum(rows)
    for name, array in outputs.items():
        if not array.ndim or array.shape[0] != total:
            raise ValueError(f"output {name} has shape {array.shape} for {total} rows")
    ends = itertools.accumulate(rows)
    return [
        {name: array[end - size : end] for name, array in outputs.items()} for size, end in zip(rows, ends, strict=True)
    ]


def _length(tensors: Tensors) -> int:
    """The cost of a tensor request in tokens: columns of the widest 2-D input."""
    return max([array.shape[1] for array in tensors.values() if array.ndim == 2], default=0)


def _run_natural(
    activated: Activated, works: list[_Work], runner: Runner | None, classes: bool, beside: bool
) -> Answering:
    """All rows of all requests together; each request is answered as soon as its last row is."""
    places = [(work, row) for work in works for row in range(len(work.raw))]
    found: dict[int, list[tuple[Prediction, int] | None]] = {work.request_id: [None] * len(work.raw) for work in works}
    missing = {work.request_id: len(work.raw) for work in works}
    compute_s = dict.fromkeys(found, 0.0)
    shared = dict.fromkeys(found, 1)
    answers = [_classified(activated, work, [], 0, 0.0, classes) for work in works if not work.raw]
    for chunk in in_chunks(activated, [work.raw[row] for work, row in places], runner, beside=beside):
        if not isinstance(chunk, Chunk):
            yield chunk
            continue
        here = {places[place][0].request_id: places[place][0] for place in chunk.places}
        for place, prediction, length in zip(chunk.places, chunk.predictions, chunk.lengths, strict=True):
            work, row = places[place]
            found[work.request_id][row] = prediction, length
            missing[work.request_id] -= 1
        for number, work in here.items():
            compute_s[number] += chunk.compute_s
            shared[number] = max(shared[number], len(here))
            if not missing[number]:
                rows = [row for row in found[number] if row is not None]
                answers.append(_classified(activated, work, rows, shared[number], compute_s[number], classes))
    return answers


def _classified(
    activated: Activated,
    work: _Work,
    rows: list[tuple[Prediction, int]],
    batch_size: int,
    compute_s: float,
    classes: bool,
) -> Answer:
    """The answer to a natural request from those to its rows."""
    predictions = [prediction for prediction, _ in rows]
    tensors = activated.task.prediction_tensors(predictions)
    try:
        _check_classes(predictions, work.request, tensors)
    except RequestError as error:
        return _failed(work.request_id, error)
    answer = _encoded(
        work,
        tensors,
        length=max((length for _, length in rows), default=0),
        batch_size=batch_size,
        compute_s=compute_s,
        classes=classes_of_predictions(predictions) if classes else None,
    )
    return msgspec.structs.replace(answer, confidence=_confidence(predictions)) if answer.status == 200 else answer


def _confidence(predictions: Sequence[Prediction]) -> float | None:
    """Of the row that the model is least sure of."""
    scores = (prediction.score for prediction in predictions)
    return min((score if math.isfinite(score) else 0.0 for score in scores), default=None)


def _check_classes(predictions: Sequence[Prediction], request: DecodedRequest, names: Collection[str]) -> None:
    """In JSON a missing label would be an empty one, and its score nothing at all: whoever can be told asks again."""
    row = next((row for row, prediction in enumerate(predictions) if not math.isfinite(prediction.score)), None)
    if row is None:
        return
    for output in request.wanted(names):
        if output.name in names and not request.wants_binary(output):
            raise RequestError(
                f"the model's answer to row {row} is NaN, which JSON can't carry",
                status=422,
                where=f"output {output.name[:80]!r}",
                remedy="Ask for it as binary data (binary_data)",
            )


def _encoded(
    work: _Work,
    tensors: Mapping[str, Tensor],
    *,
    length: int,
    batch_size: int,
    compute_s: float,
    classes: tuple[int, ...] | None,
) -> Answer:
    """The answer with its tensors, or why just this client can't have them the way it asked."""
    try:
        outputs, binary = encode_outputs(tensors, work.request)
    except RequestError as error:
        return _failed(work.request_id, error)
    return Answer(
        request_id=work.request_id,
        outputs=outputs,
        binary=binary,
        length=length,
        batch_size=batch_size,
        compute_s=compute_s,
        classes=classes,
    )
