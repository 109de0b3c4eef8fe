"""The agent beside a bare echo and other Python servers: latency, throughput, memory, start, growth of overhead.

    python benchmarks/serving.py --work DIR [--rounds 7] [--seconds 4] [--peers mlserver,litserve] [--parts load,growth]
    python benchmarks/serving.py --work DIR --parts text --bundle BUNDLE
    python benchmarks/serving.py --work DIR --parts compare --before TREE

All servers have the same tiny ONNX model (an MLP of 16 inputs), one thread for it and one worker, and get the same
requests: HTTP, JSON, a closed loop over 1, 8 and 32 keep-alive connections. In each round every server has its turn,
one after the other; a ratio is that of neighbours within a round, and the median over rounds is printed. Absolute
figures mean something on a quiet machine only; of all figures processor time depends least on what else runs. The load
generator shares the cores; its own processor time is printed.

``load``     all servers; memory (PSS) and time from the start to the first answer.
``growth``   the agent's p50 with the size of the request and with the number of loaded models.
``text``     text in, label out, mixed lengths: beside a bare ``run()``, without length bucketing, and beside other
             servers (``serving_text.py``).
``compare``  this tree and another one (before a change, say) in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import load_generator
import numpy as np
import served_models as models
import servers
from load_generator import Load, Result
from servers import Server
from serving_text import text_part

from aios_edge.host import describe, inspect_host

CONNECTIONS = (1, 8, 32)
ROWS = (1, 10, 100, 1000, 10_000)  # some 0.1 KB to 0.5 MB of JSON
LOADED = (1, 10, 25)
THREADS = 1
ECHO, PROCESS, THREAD = "echo", "ours, worker process", "ours, in a thread"

#: server -> connections -> one result a round
Rounds = dict[str, dict[int, list[Result]]]


def main() -> None:
    """Run the parts that are asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="environments, models and logs are kept there")
    parser.add_argument("--parts", default="load,growth")
    parser.add_argument("--peers", default="mlserver,litserve,bentoml,ray_serve")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each server's turn; wrk counts whole ones")
    parser.add_argument("--bundle", type=Path, help="of the text part: a text classifier's")
    parser.add_argument("--before", type=Path, help="of the compare part: the other tree")
    options = parser.parse_args()
    work = options.work.absolute()
    load = "busy" if Path("/proc/loadavg").read_text().split()[0] > "0.5" else "quiet"
    print(f"{describe(inspect_host())}; the machine was {load} before the run; {options.rounds} rounds")
    model = models.write_mlp(work / "tiny.onnx")
    tiny = models.write_tiny_bundle(work / "bundles" / "tiny", model, "tiny")
    for part in options.parts.split(","):
        if part == "load":
            load_part(work, model, tiny, [name for name in options.peers.split(",") if name], options)
        elif part == "growth":
            growth_part(work, model, tiny, options)
        elif part == "text":
            text_part(work, [name for name in options.peers.split(",") if name], options)
        elif part == "compare":
            compare_part(work, tiny, options)
        else:
            parser.error(f"there is no part {part!r}")


def load_part(work: Path, model: Path, tiny: Path, peers: list[str], options: argparse.Namespace) -> None:
    """The first table: everybody, all numbers of connections; then memory and start."""
    body = models.request_body(1)
    with contextlib.ExitStack() as running:

        def start(make: Callable[[], Server]) -> Server | None:
            try:
                server = make()
            except (RuntimeError, OSError) as error:
                print(f"skipped: {error}", file=sys.stderr)
                return None
            running.callback(server.stop)
            return server

        ours = start(lambda: servers.agent(PROCESS, [tiny], "tiny", work, body))
        assert ours is not None
        started = [
            start(lambda: servers.echo(work, body, len(ours.answer))),
            ours,
            start(lambda: servers.agent(THREAD, [tiny], "tiny", work, body, isolation="thread")),
            *(start(lambda name=name: servers.peer(name, model, THREADS, work, body)) for name in peers),  # type: ignore[misc]
        ]
        those = [server for server in started if server is not None]
        rounds = in_turn(those, [body], options)
        for server in those:
            server.measure_memory()
    print(f"\nrequest {len(body)} bytes, answer of ours and echo {len(ours.answer)} bytes; {generators(rounds)}\n")
    print(load_table(rounds))
    print(
        "\n| server | first answer after | PSS of the first process | PSS of all its processes |\n|---|---:|---:|---:|"
    )
    for server in those:
        first, whole = (server.pss_bytes[key] / 1e6 for key in ("first", "all"))
        print(f"| {server.name} | {server.ready_s:.2f} s | {first:.1f} MB | {whole:.1f} MB |")


def in_turn(those: Iterable[Server], bodies: list[str], options: argparse.Namespace) -> Rounds:
    """Rounds over servers and numbers of connections; a first short turn of each warms up and isn't counted."""
    those = list(those)
    found: Rounds = {server.name: defaultdict(list) for server in those}
    for number in range(-1, options.rounds):
        for connections in CONNECTIONS:
            for server in those:
                load = Load(
                    port=server.port,
                    path=server.path,
                    bodies=tuple(bodies),
                    connections=connections,
                    seconds=options.seconds if number >= 0 else 1.0,
                )
                result = servers.measured(server, load)
                if number >= 0:
                    found[server.name][connections].append(result)
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    return found


def load_table(rounds: Rounds) -> str:
    """Medians over rounds; ratios to the echo's neighbour of the same round."""
    lines = [
        "| server | p50, 1 connection | of echo's | p99 | of echo's | requests/s, 1 | 8 | of echo's | 32 | of echo's "
        "| failed | CPU µs a request at 1 / 32, first process | all | generator, cores at 1 / 8 / 32 |",
        "|---|" + "---:|" * 13,
    ]
    for name, by_connections in rounds.items():
        one, eight, many = (by_connections[connections] for connections in CONNECTIONS)
        beside = rounds[ECHO]
        cores = " / ".join(f"{median(r.cpu_s / r.seconds for r in results):.2f}" for results in (one, eight, many))
        lines.append(
            f"| {name} | {median(r.p50_s for r in one) * 1e6:.0f} µs | {ratio(one, beside[1], p50):.2f} "
            f"| {median(r.p99_s for r in one) * 1e6:.0f} µs | {ratio(one, beside[1], p99):.2f} "
            f"| {median(r.rate for r in one):.0f} "
            f"| {median(r.rate for r in eight):.0f} | {ratio(eight, beside[8], rate):.2f} "
            f"| {median(r.rate for r in many):.0f} | {ratio(many, beside[32], rate):.2f} "
            f"| {sum(r.failed for results in by_connections.values() for r in results)} "
            f"| {micros(one, first_cpu):.0f} / {micros(many, first_cpu):.0f} "
            f"| {micros(one, all_cpu):.0f} / {micros(many, all_cpu):.0f} | {cores} |"
        )
    return "\n".join(lines)


def growth_part(work: Path, model: Path, tiny: Path, options: argparse.Namespace) -> None:
    """What overhead does with the size of a request and the number of loaded models."""
    body = models.request_body(1)
    session = models.open_session(model, THREADS)
    print(
        "\n| request | bare run() | echo p50 | ours, worker process p50 | ours, in a thread p50 |\n|---|" + "---:|" * 4
    )
    with contextlib.ExitStack() as running:
        those = [
            servers.agent(PROCESS, [tiny], "tiny", work, body),
            servers.agent(THREAD, [tiny], "tiny", work, body, isolation="thread"),
        ]
        for server in those:
            running.callback(server.stop)
        for rows in ROWS:
            body = models.request_body(rows)
            answer = servers.post(those[0].port, those[0].path, body)
            bare = servers.echo(work, body, len(answer))
            p50s: dict[str, list[float]] = defaultdict(list)
            for _ in range(options.rounds):
                for server in (bare, *those):
                    load = Load(port=server.port, path=server.path, bodies=(body,), connections=1, seconds=1.0)
                    p50s[server.name].append(load_generator.run(load).p50_s)
            bare.stop()
            ids = np.ones((rows, models.INPUTS), dtype=np.int64)
            columns = [timed(lambda: session.run(None, {"input_ids": ids}))]  # noqa: B023
            columns += [median(p50s[server.name]) for server in (bare, *those)]
            print(f"| {len(body)} bytes, {rows} rows | " + " | ".join(f"{c * 1e6:.0f} µs" for c in columns) + " |")
    body = models.request_body(1)
    print("\n| loaded models | p50, 1 connection | requests/s, 32 | ready | PSS of the supervisor | of all |")
    print("|---|" + "---:|" * 5)
    for count in LOADED:
        bundles = [models.write_tiny_bundle(work / "bundles" / f"tiny-{k}", model, f"tiny-{k}") for k in range(count)]
        server = servers.agent(f"ours with {count} models", bundles, f"tiny-{count - 1}", work, body)
        try:
            ones, many = [], []
            for _ in range(options.rounds):
                for connections, into in ((1, ones), (32, many)):
                    load = Load(port=server.port, path=server.path, bodies=(body,), connections=connections, seconds=1)
                    into.append(load_generator.run(load))
            server.measure_memory()
        finally:
            server.stop()
        first, whole = (server.pss_bytes[key] / 1e6 for key in ("first", "all"))
        print(
            f"| {count} | {median(r.p50_s for r in ones) * 1e6:.0f} µs | {median(r.rate for r in many):.0f} "
            f"| {server.ready_s:.2f} s | {first:.1f} MB | {whole:.1f} MB |"
        )


def compare_part(work: Path, tiny: Path, options: argparse.Namespace) -> None:
    """Two trees in turn, worker process and thread; ratios are after / before of neighbours."""
    body = models.request_body(1)
    with contextlib.ExitStack() as running:
        pairs: list[tuple[Server, Server]] = []
        for name, isolation in ((PROCESS, "process"), (THREAD, "thread")):
            after = servers.agent(f"{name}, after", [tiny], "tiny", work, body, isolation=isolation)
            running.callback(after.stop)
            before = servers.agent(
                f"{name}, before", [tiny], "tiny", work, body, isolation=isolation, checkout=options.before.absolute()
            )
            running.callback(before.stop)
            pairs.append((before, after))
        rounds = in_turn([server for pair in pairs for server in pair], [body], options)
        for server in (server for pair in pairs for server in pair):
            server.measure_memory()
    print(f"\n{generators(rounds)}; after / before, median of {options.rounds} rounds (least … most)\n")
    print(
        "| | p50, 1 connection | p99 | requests/s, 8 | 32 | CPU a request at 1, supervisor | all | at 32, supervisor ",
        end="",
    )
    print("| all | PSS of the supervisor | of all |\n|---|" + "---:|" * 10)
    for before, after in pairs:
        old, new = rounds[before.name], rounds[after.name]
        shown = [spread(new[1], old[1], p50), spread(new[1], old[1], p99)]
        shown += [spread(new[8], old[8], rate), spread(new[32], old[32], rate)]
        shown += [spread(new[n], old[n], figure) for n in (1, 32) for figure in (first_cpu, all_cpu)]
        shown += [
            f"{before.pss_bytes[key] / 1e6:.1f} → {after.pss_bytes[key] / 1e6:.1f} MB" for key in ("first", "all")
        ]
        print(f"| {after.name.removesuffix(', after')} | " + " | ".join(shown) + " |")


def p50(result: Result) -> float:
    """Half of the answers came within this."""
    return result.p50_s


def p99(result: Result) -> float:
    """All but one in a hundred did."""
    return result.p99_s


def rate(result: Result) -> float:
    """Requests a second."""
    return result.rate


def first_cpu(result: Result) -> float:
    """Processor time of the server's first process for each request."""
    return result.first_cpu_s / result.requests


def all_cpu(result: Result) -> float:
    """Processor time of all the server's processes for each request."""
    return result.server_cpu_s / result.requests


def micros(those: list[Result], figure: Callable[[Result], float]) -> float:
    """The median over rounds, in µs."""
    return median(figure(result) for result in those) * 1e6


def ratios(those: list[Result], beside: list[Result], figure: Callable[[Result], float]) -> list[float]:
    """Of neighbours within each round."""
    return [figure(a) / figure(b) for a, b in zip(those, beside, strict=True)]


def ratio(those: list[Result], beside: list[Result], figure: Callable[[Result], float]) -> float:
    """The median over rounds."""
    return statistics.median(ratios(those, beside, figure))


def spread(those: list[Result], beside: list[Result], figure: Callable[[Result], float]) -> str:
    """Median, least and most of the rounds' ratios."""
    found = ratios(those, beside, figure)
    return f"{statistics.median(found):.2f} ({min(found):.2f} … {max(found):.2f})"


def median(values: Iterable[float]) -> float:
    """Of any iterable."""
    return statistics.median(list(values))


def timed(run: Callable[[], object]) -> float:
    """Median seconds of 50 runs."""
    seconds = []
    for _ in range(50):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def generators(rounds: Rounds) -> str:
    """Which load generators were used."""
    names = {r.generator for by in rounds.values() for results in by.values() for r in results}
    return f"load generator: {', '.join(sorted(names))}"


if __name__ == "__main__":
    main()
