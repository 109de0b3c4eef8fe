"""What the agent adds as its queue, its models and its requests grow: three tables, and the same as a plot.

Queue: so many connections, each with one request at a time; what doesn't run waits. Processor time a request, since
wall time is mostly that of the wait. ``with a deadline`` each is judged by what waits before it. Models: p50 of one of
them over one connection while the others are idle. Payload: p50 over one connection, less the model's own time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import load_generator
import msgspec
import numpy as np
import served_models as models
import servers
from growth_plot import Curve, Panel, drawn
from load_generator import Load, Result
from servers import Server

WAITING = (1, 4, 16, 64, 250)  # policy.queue_limit is 256
LOADED = (1, 5, 10, 25, 50)
ROWS = (1, 10, 100, 1000, 10_000, 100_000, 200_000)  # some 0.1 KB to 10 MB of JSON
LONG_ROWS = 10_000  # from here on an answer takes a good part of a second
DEADLINE_US = 60_000_000


def growth_part(work: Path, model: Path, tiny: Path, rounds: int, threads: int) -> None:
    """Measure all three, print them, and draw ``growth.svg``."""
    with _agent(work, [tiny], "growth") as server:
        queue = _queue(server, rounds)
        payload = _payload(server, model, rounds, threads)
    loaded = _loaded(work, model, rounds)
    (work / "growth.svg").write_text(drawn((queue, loaded, payload)), encoding="utf-8")
    print(f"\nthe same as a plot: {work / 'growth.svg'}")


def _queue(server: Server, rounds: int) -> Panel:
    plain = models.request_body(1)
    document = msgspec.json.decode(plain)
    dated = msgspec.json.encode(document | {"parameters": {"timeout": DEADLINE_US}}).decode()
    costs: dict[str, list[float]] = {"without a deadline": [], "with a deadline": []}
    print("\n| connections | supervisor, CPU µs a request without a deadline | with a deadline |\n|---:|---:|---:|")
    for connections in WAITING:
        for name, body in (("without a deadline", plain), ("with a deadline", dated)):
            load = Load(port=server.port, path=server.path, bodies=(body,), connections=connections, seconds=1.0)
            seen = [_measured(server, load) for _ in range(rounds)]
            costs[name].append(statistics.median(result.first_cpu_s / result.requests for result in seen) * 1e6)
        print(f"| {connections} | " + " | ".join(f"{column[-1]:.0f}" for column in costs.values()) + " |")
    curves = [Curve(name, list(zip(WAITING, column, strict=True))) for name, column in costs.items()]
    return Panel("requests here at once", "supervisor, CPU µs a request", curves)


def _loaded(work: Path, model: Path, rounds: int) -> Panel:
    body, points = models.request_body(1), []
    print(
        "\n| loaded models | p50, 1 connection | ready | PSS of the supervisor | of all |\n|---:|---:|---:|---:|---:|"
    )
    for count in LOADED:
        bundles = [models.write_tiny_bundle(work / "bundles" / f"tiny-{k}", model, f"tiny-{k}") for k in range(count)]
        with _agent(work, bundles, f"tiny-{count - 1}") as server:
            load = Load(port=server.port, path=server.path, bodies=(body,), connections=1, seconds=1.0)
            p50_s = statistics.median(load_generator.run(load).p50_s for _ in range(rounds))
            server.measure_memory()
        points.append((count, p50_s * 1e6))
        first, whole = (server.pss_bytes[key] / 1e6 for key in ("first", "all"))
        print(f"| {count} | {p50_s * 1e6:.0f} µs | {server.ready_s:.2f} s | {first:.1f} MB | {whole:.1f} MB |")
    return Panel("loaded models", "p50, µs", [Curve("one is asked, the others are idle", points)])


def _payload(server: Server, model: Path, rounds: int, threads: int) -> Panel:
    session, points = models.open_session(model, threads), []
    print("\n| request | bare run() | p50 less that |\n|---|---:|---:|")
    for rows in ROWS:
        body, ids = models.request_body(rows), np.ones((rows, models.INPUTS), dtype=np.int64)
        bare_s = _timed(lambda: session.run(None, {"input_ids": ids}))  # noqa: B023
        seconds = 1.0 if rows < LONG_ROWS else 6.0
        load = Load(port=server.port, path=server.path, bodies=(body,), connections=1, seconds=seconds)
        seen = [load_generator.run(load) for _ in range(rounds)]
        if any(result.failed or result.p50_s <= bare_s for result in seen):
            print(
                f"| {len(body)} bytes, {rows} rows | {bare_s * 1e6:.0f} µs | not measured: no answer in {seconds:g} s |"
            )
            continue
        over_s = statistics.median(result.p50_s for result in seen) - bare_s
        points.append((len(body), over_s * 1e6))
        print(f"| {len(body)} bytes, {rows} rows | {bare_s * 1e6:.0f} µs | {over_s * 1e6:.0f} µs |")
    linear = [(points[2][0], points[2][1]), (points[-1][0], points[2][1] * points[-1][0] / points[2][0])]
    return Panel(
        "bytes of a request", "p50 less run(), µs", [Curve("over HTTP, JSON", points), Curve("linear", linear)]
    )


@contextmanager
def _agent(work: Path, bundles: Sequence[Path], model: str) -> Iterator[Server]:
    name = "tiny" if model == "growth" else model
    server = servers.agent(f"ours, {model}", bundles, name, work, models.request_body(1))
    try:
        yield server
    finally:
        server.stop()


def _measured(server: Server, load: Load) -> Result:
    pids = servers.tree(server.process.pid)
    before = servers.cpu_s(pids[:1])
    result = load_generator.run(load)
    return msgspec.structs.replace(result, first_cpu_s=servers.cpu_s(pids[:1]) - before)


def _timed(run: Callable[[], object]) -> float:
    """Median seconds of a call, over a fifth of a second or five calls."""
    run()
    times: list[float] = []
    end = time.perf_counter() + 0.2
    while len(times) < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
