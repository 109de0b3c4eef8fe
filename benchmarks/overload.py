"""The agent under more load than it can take: who is admitted is in time, what is shed is what had to be.

    python benchmarks/overload.py --work DIR [--seconds 60] [--factors 1,2,3,5,10] [--parts device,cloud]

One model whose time grows with the rows of a batch: some 2 ms for one in a thread of onnxruntime, five times that with
``[emulate] slowdown``, asleep, so that the generator's core isn't the model's. Capacity is measured first, and again
after each row: a closed loop without deadlines. Load is open loop (``open_loop.py``); deadlines are 2 to 20 times the
unloaded p95, as many within each factor of two. The machine is shared with the load generator, whose lateness and
processor time are in the table; of all figures only shares mean something elsewhere.

``device``   no cloud; Poisson, and bursts (a second on, a second off), at multiples of the capacity.
``cloud``    twice the capacity beside a cloud that is lost, slow, flapping or corrupt in the middle third of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import load_generator
import msgspec
import open_loop
import scripted_cloud
import served_models as models
import servers
from load_generator import Load
from open_loop import Departure, Outcome, Sent
from overload_score import GRACE_S, Capacity, Score, cloud_misses, score
from scripted_cloud import Cloud, Script
from servers import Server

from aios_edge import open_bundle
from aios_edge.host import describe, inspect_host
from device_agent.metadata import model_metadata
from device_agent.trace_reader import TraceLines

MODEL = "steady"
PATH = f"/v2/models/{MODEL}/infer"
ROW_S = 0.002
SLOWDOWN = 5.0
MAX_BATCH = 4
DEADLINES = (2.0, 20.0)  # times the unloaded p95
WARM_UP_S = 2.0
SECRET = "777777"  # a number that is in private requests only
PRIVATE_SHARE = 0.2
BREAKER_FAILURES = 3  # in a row, policy.breaker_failures as it comes
CLOUD_FACTOR = 2.0
LOST = "lost"
TRACE_BYTES = 64_000_000  # all of a row


def main() -> None:
    """Run the parts that are asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="models and logs are kept there")
    parser.add_argument("--parts", default="device,cloud")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each row; 60 or more for a figure that counts")
    parser.add_argument("--factors", default="1,2,3,5,10", help="offered, times the capacity")
    parser.add_argument("--closed-seconds", type=float, default=5.0, help="of each measurement of the capacity")
    options = parser.parse_args()
    work = options.work.absolute()
    busy = "busy" if Path("/proc/loadavg").read_text().split()[0] > "0.5" else "quiet"
    print(f"{describe(inspect_host())}; the machine was {busy} before the run; {options.seconds:g} s a row")
    layers = models.steady_layers(ROW_S)
    model = models.write_steady(work / f"steady-{layers}.onnx", layers)
    bundle = models.write_tiny_bundle(work / "bundles" / f"steady-{layers}", model, MODEL, max_batch_size=MAX_BATCH)
    for part in options.parts.split(","):
        if part == "device":
            device_part(work, bundle, options)
        elif part == "cloud":
            cloud_part(work, bundle, options)
        else:
            parser.error(f"there is no part {part!r}")


def device_part(work: Path, bundle: Path, options: argparse.Namespace) -> None:
    """The first table: shapes of load and multiples of the capacity."""
    with running(work, bundle, "device") as server:
        p95_s = unloaded_p95_s(server)
        capacity = closed_loop(server, options.closed_seconds)
        print(f"\nThe unloaded p95 is {p95_s * capacity:.2f} times what a request takes at capacity; {_range(p95_s)}\n")
        print(
            "| load | offered, of capacity | admitted | in time of admitted | given up / late "
            "| late of those with margin | shed | more than the bound, worst window "
            "| than an ideal queue | goodput of capacity | of an ideal queue's | later than deadline + 50 ms | worst "
            "| p99 lateness | failed | generator late, p99 / worst | its cores | agent's, all / supervisor |\n|---|"
            + "---:|"
            * 17
        )
        for bursts in (False, True):
            for factor in (float(each) for each in options.factors.split(",")):
                plan = open_loop.schedule(
                    factor * capacity, options.seconds, _deadlines(p95_s), bursts=bursts, seed=round(10 * factor)
                )
                sent, cores = offered(server, plan, options.seconds)
                after = closed_loop(server, options.closed_seconds)
                row = score(sent.outcomes, Capacity(before=capacity, after=after), p95_s, options.seconds)
                name = f"{'bursts' if bursts else 'Poisson'} {factor:g}x"
                mean = (capacity + after) / 2
                print(_device_row(name, row, len(plan) / options.seconds / mean, p95_s, sent, cores), flush=True)
                capacity = after


def offered(server: Server, plan: tuple[Departure, ...], seconds: float) -> tuple[Sent, tuple[float, float, float]]:
    """Offer a schedule; what became of it, and cores taken: the generator's, all the agent's, its supervisor's."""
    pids = servers.tree(server.process.pid)
    first, whole = servers.cpu_s(pids[:1]), servers.cpu_s(pids)
    sent = open_loop.Run(server.port, PATH, _inputs(), plan).wait()
    taken = sent.cpu_s, servers.cpu_s(pids) - whole, servers.cpu_s(pids[:1]) - first
    return sent, (taken[0] / seconds, taken[1] / seconds, taken[2] / seconds)


def cloud_part(work: Path, bundle: Path, options: argparse.Namespace) -> None:
    """The second table: each way in which a cloud fails, with an agent of its own."""
    print(
        f"\n{CLOUD_FACTOR:g} times the capacity, {PRIVATE_SHARE:.0%} of it local-only; the cloud fails in the middle "
        "third\n\n| cloud | in time, before / while / after | shed, before / while / after "
        "| later than deadline + 50 ms | worst | missed because of it | breaker opened | answers damaged "
        "| private bodies out, cloud's count / agent's | of bodies | generator late, p99 / worst |\n|---|"
        + "---:|"
        * 10
    )
    for failing in (LOST, scripted_cloud.SLOW, scripted_cloud.FLAPPING, scripted_cloud.CORRUPT):
        port = servers.free_port()
        metadata = msgspec.json.encode(model_metadata(open_bundle(bundle).manifest)).decode()
        script = Script(
            port=port, metadata=metadata, answer=_cloud_answer(), secret=SECRET, heard=str(work / f"heard-{failing}")
        )
        cloud = Cloud(script, work / "clouds" / failing)
        settings = f'[[cloud]]\nname = "c"\nurl = "http://127.0.0.1:{port}"\n'
        trace = work / f"trace-{failing}"
        trace.unlink(missing_ok=True)
        try:
            with running(work, bundle, failing, settings, f'trace = "{trace}"\ntrace_bytes = {TRACE_BYTES}') as server:
                _until_usable(server)
                p95_s = unloaded_p95_s(server)
                capacity = closed_loop(server, options.closed_seconds)
                plan = open_loop.schedule(
                    CLOUD_FACTOR * capacity, options.seconds, _deadlines(p95_s), private_share=PRIVATE_SHARE, seed=7
                )
                run = open_loop.Run(server.port, PATH, _inputs(), plan)
                lost_at = misbehave_at(run.begin_at + options.seconds / 3, cloud, failing)
                back_at = misbehave_at(run.begin_at + options.seconds * 2 / 3, cloud, scripted_cloud.OK)
                sent, status = run.wait(), _status(server)
            missed = cloud_misses(TraceLines(trace), lost_at, back_at)
            lost_s, back_s = lost_at - run.begin_at, back_at - run.begin_at
            print(_cloud_row(failing, sent, lost_s, back_s, missed, cloud, status), flush=True)
        finally:
            cloud.kill()


def misbehave_at(at: float, cloud: Cloud, how: str) -> float:
    """Wait for that moment (CLOCK_MONOTONIC) and change the cloud; the moment before the change."""
    time.sleep(max(at - time.monotonic(), 0.0))
    began = time.monotonic()
    if how == LOST:
        cloud.kill()
    elif cloud.lost:
        cloud.start()
    else:
        cloud.tell(how)
    return began


@contextlib.contextmanager
def running(work: Path, bundle: Path, name: str, more: str = "", policy: str = "") -> Iterator[Server]:
    """An agent with the model, warmed up."""
    slow = f"{more}[emulate]\nslowdown = {SLOWDOWN}\n"
    server = servers.agent(f"overload-{name}", [bundle], MODEL, work, models.request_body(1), more=slow, policy=policy)
    try:
        closed_loop(server, WARM_UP_S)
        yield server
    finally:
        server.stop()


def closed_loop(server: Server, seconds: float) -> float:
    """Requests a second without deadlines, with enough connections for full batches."""
    body = models.request_body(1)
    load = Load(port=server.port, path=PATH, bodies=(body,), connections=4 * MAX_BATCH, seconds=seconds)
    return load_generator.run(load).rate


def unloaded_p95_s(server: Server, count: int = 200) -> float:
    """One request after the other over one connection."""
    body = models.request_body(1)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    took = []
    for _ in range(count):
        began = time.perf_counter()
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        connection.getresponse().read()
        took.append(time.perf_counter() - began)
    connection.close()
    return sorted(took)[count * 95 // 100]


def _device_row(
    name: str, row: Score, offered_share: float, p95_s: float, sent: Sent, cores: tuple[float, float, float]
) -> str:
    cells = [
        f"{offered_share:.2f}",
        f"{row.admitted / row.offered:.1%}",
        f"{row.kept:.2%}",
        f"{row.admitted - row.in_time - row.late} / {row.late}",
        f"{row.promised_late} of {row.promised}",
        f"{row.shed / row.offered:.1%}",
        f"{row.excess:+.1%}",
        f"{row.excess_to_ideal:+.1%}",
        f"{row.capacity_share:.1%}",
        f"{row.ideal_share:.1%}",
        f"{row.overdue} of {row.offered}",
        _ms(row.worst_overdue_s),
        f"{row.p99_overdue_s / p95_s:.2f} p95",
        str(row.failed),
        _lateness(sent),
        f"{cores[0]:.2f}",
        f"{cores[1]:.2f} / {cores[2]:.2f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _cloud_row(name: str, sent: Sent, lost_s: float, back_s: float, missed: int, cloud: Cloud, status: Any) -> str:
    thirds = (
        [outcome for outcome in sent.outcomes if outcome.at_s < lost_s],
        [outcome for outcome in sent.outcomes if lost_s <= outcome.at_s < back_s],
        [outcome for outcome in sent.outcomes if outcome.at_s >= back_s],
    )
    bodies, private = cloud.heard()
    opened = sum(event["kind"] == "breaker_opened" for event in status["events"])
    cells = [
        " / ".join(_share(part, lambda outcome: outcome.in_time) for part in thirds),
        " / ".join(_share(part, lambda outcome: outcome.status != 200) for part in thirds),
        f"{sum(outcome.overdue_s > GRACE_S for outcome in sent.outcomes)} of {len(sent.outcomes)}",
        _ms(max(outcome.overdue_s for outcome in sent.outcomes)),
        f"{missed} (threshold {BREAKER_FAILURES})",
        str(opened),
        str(sum(not outcome.sound for outcome in sent.outcomes)),
        f"{private} / {status['privacy']['private_payloads_sent']}",
        str(bodies),
        _lateness(sent),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _share(outcomes: list[Outcome], which: Any) -> str:
    return f"{sum(map(which, outcomes)) / max(len(outcomes), 1):.1%}"


def _lateness(sent: Sent) -> str:
    late = sorted(outcome.sent_s - outcome.at_s for outcome in sent.outcomes)
    return f"{_ms(late[len(late) * 99 // 100])} / {_ms(late[-1])}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _range(p95_s: float) -> str:
    least, most = (_ms(each) for each in _deadlines(p95_s))
    return f"deadlines {least} to {most}"


def _deadlines(p95_s: float) -> tuple[float, float]:
    return DEADLINES[0] * p95_s, DEADLINES[1] * p95_s


def _inputs() -> tuple[str, str]:
    """The request's tensors as JSON, and those of a request that must not leave."""
    tensors = json.loads(models.request_body(1))["inputs"]
    plain = json.dumps(tensors)
    tensors[0]["data"][0] = int(SECRET)
    return plain, json.dumps(tensors)


def _cloud_answer() -> str:
    output = {"name": "logits", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.0, 3.0]}
    return json.dumps({"model_name": MODEL, "model_version": "1.0.0", "outputs": [output]})


def _status(server: Server) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/status", timeout=10) as response:
        return json.loads(response.read())


def _until_usable(server: Server) -> None:
    end = time.monotonic() + servers.PATIENCE_S
    while not _status(server)["cloud"]["c"]["models"][MODEL]["usable"]:
        if time.monotonic() > end:
            raise RuntimeError("the agent never found its cloud usable")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
