"""How fast and how large a candidate is on this machine."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from aios_edge.errors import ResourceError, RuntimeUnavailable
from aios_edge.manifest import SessionSpec
from exporters import memory
from exporters.encode import Sample
from exporters.ort import Session

SHAPES = ((1, 32), (1, 128), (16, 32))
BATCH_SIZES = (1, 2, 4, 8)
#: A larger batch must make each item this much cheaper than the next smaller one did.
BATCH_GAIN = 0.05
_BUDGET_S = 0.8
_MIN_ROUNDS, _MAX_ROUNDS = 5, 60


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one shape, candidate and fp32 (onnxruntime's defaults) in turn.

    ``speedup`` is the median of the rounds' own ratios: the two runs of a round are neighbours in time, so what slows
    the machine down for a while slows both.
    """

    batch: int
    length: int
    threads: int
    p50: float
    p95: float
    fp32_p50: float
    speedup: float
    samples: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate's cost on this machine. ``peak_rss_bytes`` is the most that the process which weighed it held."""

    timings: tuple[Timing, ...]
    rss_bytes: int | None
    peak_rss_bytes: int | None = None
    max_batch_size: int
    per_item_s: dict[str, float]

    def timing(self, batch: int, length: int, threads: int) -> Timing | None:
        """The timing of a shape, or None."""
        wanted = (batch, length, threads)
        return next((t for t in self.timings if (t.batch, t.length, t.threads) == wanted), None)


def measure(
    model: Path, spec: SessionSpec, fp32: Path, fp32_spec: SessionSpec, conditions: tuple[tuple[int, int, int], ...]
) -> Measured:
    """Time every (batch, length, threads), find the useful batch size, and weigh the process."""
    sessions: dict[int, tuple[Session, Session]] = {}
    for *_, threads in conditions:
        if threads not in sessions:
            sessions[threads] = Session(model, spec, threads=threads), Session(fp32, fp32_spec, threads=threads)
    timings = tuple(_time(*sessions[threads], batch, length, threads) for batch, length, threads in conditions)
    _, length, threads = conditions[0]
    one = sessions[threads][0]
    per_item = {batch: _per_item(one, batch, length) for batch in BATCH_SIZES}
    rss_bytes, peak_rss_bytes = weigh(model, spec, length)
    return Measured(
        timings=timings,
        rss_bytes=rss_bytes,
        peak_rss_bytes=peak_rss_bytes,
        max_batch_size=useful_batch_size(per_item),
        per_item_s={str(batch): cost for batch, cost in per_item.items()},
    )


def useful_batch_size(per_item_s: dict[int, float]) -> int:
    """The largest batch that still gains :data:`BATCH_GAIN` per item over the next smaller one; at least 1. Pure."""
    best, *larger = sorted(per_item_s)
    for batch in larger:
        if per_item_s[batch] > per_item_s[best] * (1 - BATCH_GAIN):
            break
        best = batch
    return best


def weigh(model: Path, spec: SessionSpec, length: int) -> tuple[int | None, int | None]:
    """Resident bytes of a fresh process with only this model in it, after requests of ``length`` tokens, and at most.

    None where /proc doesn't say. Raises :class:`ResourceError` where there was no memory for it.
    """
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [
        sys.executable,
        "-m",
        "exporters.measure_rss",
        str(model),
        msgspec.json.encode(spec).decode(),
        str(length),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [_end_of(done.returncode)])[-1]
        if done.returncode == -signal.SIGKILL or memory.says_ran_out(last):
            what = f"out of memory; the process that weighs {model.name} {_end_of(done.returncode)}"
            raise ResourceError(what, where="stage measure", remedy=memory.remedy("measure"))
        raise RuntimeUnavailable(f"the memory of {model.name} could not be measured ({last})", where="measure")
    figures = done.stdout.split()
    return (int(figures[0]), int(figures[1])) if len(figures) == 2 else (None, None)


def _end_of(code: int) -> str:
    """How a child ended. Nobody but the kernel kills it, which it does where memory runs out."""
    if code == -signal.SIGKILL:
        return "was killed, as the kernel does when memory runs out"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def tokens(names: tuple[str, ...], batch: int, length: int) -> Sample:
    """A batch of plausible tensors: small token ids, no padding."""
    ids = np.random.default_rng(0).integers(1, 20, (batch, length), dtype=np.int64)
    filled = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: filled[name] for name in names}


def _time(candidate: Session, fp32: Session, batch: int, length: int, threads: int) -> Timing:
    """Both in turn, so that a busy moment hits both."""
    inputs = tokens(candidate.input_names, batch, length)
    seen: list[float] = []
    base: list[float] = []
    for session in (candidate, fp32):
        session.run(inputs)
    end = time.perf_counter() + _BUDGET_S
    while len(seen) < _MIN_ROUNDS or (time.perf_counter() < end and len(seen) < _MAX_ROUNDS):
        for session, times in ((candidate, seen), (fp32, base)):
            start = time.perf_counter()
            session.run(inputs)
            times.append(time.perf_counter() - start)
    p50, fp32_p50 = statistics.median(seen), statistics.median(base)
    return Timing(
        batch=batch,
        length=length,
        threads=threads,
        p50=p50,
        p95=float(np.quantile(seen, 0.95)),
        fp32_p50=fp32_p50,
        speedup=statistics.median(slow / quick for slow, quick in zip(base, seen, strict=True)),
        samples=len(seen),
    )


def _per_item(session: Session, batch: int, length: int) -> float:
    inputs = tokens(session.input_names, batch, length)
    times: list[float] = []
    end = time.perf_counter() + _BUDGET_S / 4
    while len(times) < _MIN_ROUNDS or (time.perf_counter() < end and len(times) < _MAX_ROUNDS):
        start = time.perf_counter()
        session.run(inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / batch
