"""The acts of the demo, each a function from what came before to what was seen."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aios_edge.cli.demo import dataset
from aios_edge.cli.demo.load import Outcome, Sender, closed_loop, offer, poisson_schedule
from aios_edge.cli.demo.plan import CLOUD_PROFILE, DEADLINE_FACTOR, MODEL_NAME, OTHER_PROFILES, OVERLOAD_FACTOR, Plan
from aios_edge.cli.demo.processes import AgentProcess, kill_process, run_json, write_recipe
from aios_edge.cli.demo.score import LoadScore, quantile, score
from aios_edge.cli.demo.watch import Watcher
from aios_edge.errors import AiosEdgeError

MAX_DROP = 0.01
#: A pruned network finds other answers as good: of 2,000 rows one in ten differs, and chance alone makes 0.7 points.
MAX_DROP_STRUCTURED = 0.02
IN_FLIGHT_AT_KILL = 12
LEAST_IN_FLIGHT = 8
RECOVERY_LIMIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What the exporter made: the report, this machine's profile, and the sentences the agent will see."""

    report: Mapping[str, Any]
    profile: str
    folder: Path
    sentences: tuple[dataset.Row, ...]
    structured: Path | None = None  # where this machine's bundle is, when a pruned network was chosen for it
    not_pruned: str | None = None  # why none was, where it was asked for

    def bundle(self, profile: str) -> Path:
        """The bundle made for a profile."""
        folder = self.structured if self.structured is not None and profile == self.profile else self.folder
        return folder / profile

    def chosen(self, profile: str) -> Mapping[str, Any]:
        """The chosen candidate of a profile, as the report has it."""
        candidates: Sequence[Mapping[str, Any]] = self.report["profiles"][profile]["candidates"]
        return next(candidate for candidate in candidates if candidate["chosen"])


def make_bundles(plan: Plan, out: Path, source: str, *, structured: bool = False) -> Workshop:
    """Write data and recipe, then ``aios-edge export`` for three devices and the cloud.

    With ``structured`` this machine's profile is exported once more with ``[prune]``, from the same fine-tuned model.
    """
    splits = dataset.split(dataset.read_package())
    dataset.write_splits(splits, out / "data", validation_rows=plan.validation_rows, test_rows=plan.test_rows)
    search = {"exhaustive": plan.exhaustive}
    recipe = write_recipe(
        out / "data" / "recipe.toml", source, plan.finetune, MODEL_NAME, max_drop=MAX_DROP, search=search
    )
    profile: str = run_json("profiles", "detect")["name"] or "x86-gateway"
    names = dict.fromkeys((profile, *OTHER_PROFILES, CLOUD_PROFILE))
    report = run_json(
        "export", str(recipe), "--profile", ",".join(names), "--out", str(out / "export"), show_progress=True
    )
    workshop = Workshop(
        report=report,
        profile=profile,
        folder=out / "export",
        sentences=splits.test[: plan.distinct_sentences],
    )
    return _with_structured(workshop, plan, out, source) if structured else workshop


def _with_structured(workshop: Workshop, plan: Plan, out: Path, source: str) -> Workshop:
    """The same with a pruned network for this machine, where one is chosen."""
    recipe = write_recipe(
        out / "data" / "structured.toml",
        source,
        plan.finetune,
        MODEL_NAME,
        max_drop=MAX_DROP_STRUCTURED,
        search={"exhaustive": plan.exhaustive, "structures": plan.structures},
        more={"prune": {}, "distill": plan.distill},
    )
    folder, kept = out / "structured", out / "export" / ".cache"
    options = ("--profile", workshop.profile, "--out", str(folder), "--cache", str(kept))
    report = run_json("export", str(recipe), *options, show_progress=True, may_refuse=True)
    return with_pruned(workshop, report, folder)


def with_pruned(workshop: Workshop, report: Mapping[str, Any], folder: Path) -> Workshop:
    """The workshop with what the export with ``[prune]`` made in ``folder``, if that is a pruned network.

    Else all stays as it was: that export allows a larger drop, which the whole network must not gain by. So it does
    where nothing was shipped, because a promise was broken after the choice (on the test split) or before it.
    """
    if report.get("error") is not None:
        return replace(workshop, not_pruned=report["error"])
    candidates: Sequence[Mapping[str, Any]] = report["profiles"][workshop.profile]["candidates"]
    if not any(c["chosen"] and c["structure"] for c in candidates):
        reasons = [f"{c['name']} {c['reason']}" for c in candidates if c["structure"]]
        return replace(workshop, not_pruned="; ".join(reasons) or "no pruned network was tried")
    profiles = {**workshop.report["profiles"], **report["profiles"]}
    return replace(workshop, report={**workshop.report, "profiles": profiles}, structured=folder)


def offline_labels(
    bundles: Mapping[str, Path], sentences: Sequence[dataset.Row], folder: Path
) -> dict[str, tuple[str, ...]]:
    """What each bundle's model says with no server in between: ``aios-edge infer``, one sentence at a time."""
    inputs = folder / "sentences.csv"
    dataset.write_rows(inputs, sentences)

    def labels(bundle: Path) -> tuple[str, ...]:
        answers = run_json("infer", str(bundle), "--file", str(inputs))
        if [answer["input"] for answer in answers] != [row.text for row in sentences]:
            raise AiosEdgeError("aios-edge infer answered other inputs than it was given", where=str(inputs))
        return tuple(answer["label"] for answer in answers)

    with ThreadPoolExecutor() as pool:
        return dict(zip(bundles, pool.map(labels, bundles.values()), strict=True))


@dataclass(frozen=True, kw_only=True)
class Unloaded:
    """Latency of requests one after the other, and answers per second of a busy device."""

    p50_s: float
    p95_s: float
    capacity_per_s: float


def measure_unloaded(sender: Sender, plan: Plan, connections: int) -> Unloaded:
    """Sequential requests for the latency, then a closed loop for the capacity."""
    count = plan.distinct_sentences
    for text in range(8):  # connections, caches
        sender.send(text, time.monotonic(), None)
    outcomes = [sender.send(text % count, time.monotonic(), None) for text in range(plan.latency_samples)]
    failed = [outcome for outcome in outcomes if outcome.status != "answered"]
    if failed:
        raise AiosEdgeError(f"{len(failed)} of {len(outcomes)} sequential requests failed: {failed[0].reason}")
    latencies = [outcome.latency_s for outcome in outcomes]
    capacity = closed_loop(sender, connections, plan.capacity_s, count)
    return Unloaded(p50_s=quantile(latencies, 0.5), p95_s=quantile(latencies, 0.95), capacity_per_s=capacity)


def shortened(plan: Plan, slowdown: float) -> Plan:
    """Fewer sequential requests on the slow device, so that its measurement takes no longer than a good minute."""
    return replace(plan, latency_samples=max(40, int(plan.latency_samples * min(1.0, 8.0 / slowdown))))


def warm_up(sender: Sender) -> None:
    """A few requests, so that service-time model and cloud connection know what they deal with."""
    for text in range(12):
        sender.send(text, time.monotonic(), None)


@dataclass(frozen=True, kw_only=True)
class Overload:
    """One overload run: its load, its deadline, its score."""

    rate_per_s: float
    deadline_s: float
    score: LoadScore


def overload(
    sender: Sender, unloaded: Unloaded, plan: Plan, offline: Mapping[str, Sequence[str]], seed: int = 11
) -> Overload:
    """Open-loop Poisson load at three times the capacity; deadline three times the unloaded p95."""
    rate = OVERLOAD_FACTOR * unloaded.capacity_per_s
    deadline_s = DEADLINE_FACTOR * unloaded.p95_s
    outcomes = offer(sender, poisson_schedule(rate, plan.load_s, seed), plan.distinct_sentences, deadline_s)
    return Overload(rate_per_s=rate, deadline_s=deadline_s, score=score(outcomes, deadline_s, offline))


def lose_cloud(sender: Sender, unloaded: Unloaded, plan: Plan, cloud: AgentProcess, watcher: Watcher) -> float | None:
    """Kill the cloud while the load goes on; seconds until the agent says its breaker opened, or None."""
    opened: list[float] = []
    rate = OVERLOAD_FACTOR * unloaded.capacity_per_s
    schedule = poisson_schedule(rate, 10.0, seed=13)

    def offer_until_opened() -> None:
        offer(sender, schedule, plan.distinct_sentences, DEADLINE_FACTOR * unloaded.p95_s, stop=lambda: bool(opened))

    load = threading.Thread(target=offer_until_opened, name="load-while-cloud-dies")
    load.start()
    watcher.wait_for("/telemetry", time.monotonic(), 3.0)  # the load is under way
    killed_at = time.monotonic()
    cloud.kill()
    heard = watcher.wait_for("/event", killed_at, 8.0, kind="breaker_opened")
    opened.append(time.monotonic())
    load.join()
    return heard.at - killed_at if heard else None


@dataclass(frozen=True)
class Energy:
    """Joules per inference as the device's telemetry has it; None where it has none."""

    j_per_inference: float | None
    method: str | None


def energy(telemetry: Mapping[str, Any] | None) -> Energy:
    """The energy figures of a telemetry message."""
    if telemetry is None:
        return Energy(None, None)
    return Energy(telemetry["energy"]["j_per_inference_active"], telemetry["energy"]["method"])


@dataclass(frozen=True, kw_only=True)
class WorkerKill:
    """What became of the requests in flight when the worker was killed, and how long service was away."""

    in_flight: int
    sent: int
    answers: int
    refused: int
    recovered_s: float | None


def kill_worker(agent: AgentProcess, sender: Sender) -> WorkerKill:
    """kill -9 the worker with at least eight requests in flight; count the answers and time the return."""
    with ThreadPoolExecutor(IN_FLIGHT_AT_KILL) as pool:
        started = time.monotonic()
        futures = [pool.submit(sender.send, text, started, None) for text in range(IN_FLIGHT_AT_KILL)]
        in_flight, pid = _wait_in_flight(agent)
        killed_at = time.monotonic()
        kill_process(pid)
        recovered_s = _wait_recovery(agent, sender, pid, killed_at)
        outcomes: list[Outcome] = [future.result() for future in futures]
    return WorkerKill(
        in_flight=in_flight,
        sent=len(futures),
        answers=sum(outcome.status == "answered" for outcome in outcomes),
        refused=sum(outcome.status == "shed" for outcome in outcomes),
        recovered_s=recovered_s,
    )


def _wait_in_flight(agent: AgentProcess) -> tuple[int, int]:
    """Requests in flight and the worker's pid, once at least eight are in flight."""
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        model = agent.client.status()["models"][MODEL_NAME]
        in_flight = model["queued"] + model["running"]
        if in_flight >= LEAST_IN_FLIGHT:
            return in_flight, model["worker_pid"]
    raise AiosEdgeError(f"never saw {LEAST_IN_FLIGHT} requests in flight", where=agent.url)


def _wait_recovery(agent: AgentProcess, sender: Sender, old_pid: int, killed_at: float) -> float | None:
    """Seconds from the kill until a new worker answered a new request; None if that took too long."""
    while time.monotonic() - killed_at < RECOVERY_LIMIT_S:
        model = agent.client.status()["models"][MODEL_NAME]
        if model["state"] == "ready" and model["worker_pid"] not in (None, old_pid):
            outcome = sender.send(0, time.monotonic(), None)
            if outcome.status == "answered":
                return time.monotonic() - killed_at
        time.sleep(0.01)
    return None
