"""What a second worker buys: the same model with one and with two, in turn, over 1, 2 and 8 connections.

    python benchmarks/workers.py --work bench-out

A raw model of dense layers, with 16 MB of weights, takes some 25 ms of one core for a request and runs one at a time.
Both agents run all the time; who has no turn is idle. The load generator is that of ``serving.py``, on the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import served_models as models
import servers
from load_generator import Load, Result
from onnx import TensorProto, helper, numpy_helper
from servers import Server

RUN_S = 0.025
WIDTH = 512
MATRICES = 16  # of 1 MB, in turn
CONNECTIONS = (1, 2, 8)
WORKERS = (1, 2)

Rounds = Mapping[tuple[int, int], list[Result]]  # by workers and connections


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    layers = max(1, round(2 * MATRICES * RUN_S / takes_s(dense(2 * MATRICES))))
    model = options.work / "repository" / "dense" / "1" / "model.onnx"
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_bytes(dense(layers))
    with contextlib.ExitStack() as running:
        those: dict[int, Server] = {}
        for workers in WORKERS:
            those[workers] = serving(model.parents[2].absolute(), workers, options.work)
            running.callback(those[workers].stop)
        rounds = in_turn(those, options.rounds, options.seconds)
        for server in those.values():
            server.measure_memory()
    failed = sum(result.failed for results in rounds.values() for result in results)
    run_ms = takes_s(dense(layers)) * 1e3
    print(f"{layers} layers, run() {run_ms:.1f} ms; {rounds[1, 1][0].generator}; {failed} failed\n")
    print(table(rounds, those))


def serving(repository: Path, workers: int, work: Path) -> Server:
    """An agent with that model, once all its workers serve."""
    server = servers.agent(
        f"{workers} workers",
        [],
        "dense",
        work,
        models.request_body(1),
        device=f"workers = {workers}",
        more=f'[repository]\npath = "{repository}"',
    )
    end = time.monotonic() + servers.PATIENCE_S
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/status", timeout=10) as response:
            if json.load(response)["models"]["dense"]["workers_serving"] == workers:
                return server
        time.sleep(0.05)
    server.stop()
    raise RuntimeError(f"{server.name}: not all of them serve")


def in_turn(those: Mapping[int, Server], rounds: int, seconds: float) -> Rounds:
    """A first short round warms up and isn't counted."""
    found: dict[tuple[int, int], list[Result]] = defaultdict(list)
    bodies = (models.request_body(1),)
    for number in range(-1, rounds):
        for connections in CONNECTIONS:
            for workers, server in those.items():
                load = Load(
                    port=server.port,
                    path=server.path,
                    bodies=bodies,
                    connections=connections,
                    seconds=seconds if number >= 0 else 1.0,
                )
                result = servers.measured(server, load)
                if number >= 0:
                    found[workers, connections].append(result)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return found


def table(rounds: Rounds, those: Mapping[int, Server]) -> str:
    """Medians; of the gain over one worker in the same round also the least and the most."""
    lines = [
        "| connections | workers | requests/s | beside one worker | p50 | p99 | CPU a request | PSS of all |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for connections in CONNECTIONS:
        for workers, server in those.items():
            mine, one = rounds[workers, connections], rounds[1, connections]
            gain = [result.rate / beside.rate for result, beside in zip(mine, one, strict=True)]
            p50_s, p99_s = (statistics.median(times) for times in zip(*((r.p50_s, r.p99_s) for r in mine), strict=True))
            cpu_s = statistics.median(result.server_cpu_s / result.requests for result in mine)
            lines.append(
                f"| {connections} | {workers} | {statistics.median(result.rate for result in mine):.1f} "
                f"| {statistics.median(gain):.2f} ({min(gain):.2f} to {max(gain):.2f}) | {p50_s * 1e3:.0f} ms "
                f"| {p99_s * 1e3:.0f} ms | {cpu_s * 1e3:.1f} ms | {server.pss_bytes['all'] / 1e6:.0f} MB |"
            )
    return "\n".join(lines)


def dense(layers: int) -> bytes:
    """``input_ids`` INT64 [1, 16] -> ``y`` FP32 [16, 3]: bounded whatever the depth."""
    chance = np.random.default_rng(0)
    sides = {"first": (1, WIDTH), "last": (WIDTH, 3), **{f"w{number}": (WIDTH, WIDTH) for number in range(MATRICES)}}
    constants = {
        name: (chance.standard_normal(side) * side[0] ** -0.5).astype(np.float32) for name, side in sides.items()
    }
    weights = ["first", *(f"w{number % MATRICES}" for number in range(layers)), "last"]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["numbers", "column"], ["h0"]),
    ]
    for number, weight in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [f"h{number}", weight], [f"m{number}"]))
        nodes.append(helper.make_node("Tanh", [f"m{number}"], [f"h{number + 1}"]))
    constants["column"] = np.array([16, 1])
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, 16])],
        [helper.make_tensor_value_info(f"h{len(weights)}", TensorProto.FLOAT, [16, 3])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def takes_s(model: bytes) -> float:
    """Of a bare ``run()`` with one thread, the median."""
    session, ids, took = models.open_session(model, 1), np.ones((1, 16), dtype=np.int64), []
    for _ in range(60):
        began = time.perf_counter()
        session.run(None, {"input_ids": ids})
        took.append(time.perf_counter() - began)
    return statistics.median(took)


if __name__ == "__main__":
    main()
