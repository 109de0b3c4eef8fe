"""The whole demo, top to bottom."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from aios_edge.broker import start_broker
from aios_edge.cli.demo import acts
from aios_edge.cli.demo.load import Sender
from aios_edge.cli.demo.plan import CLOUD_PROFILE, CLOUD_UTILISATION, MODEL_NAME, OVERLOAD_FACTOR, Plan
from aios_edge.cli.demo.processes import AgentConfig, free_port
from aios_edge.cli.demo.score import emulation_slowdown
from aios_edge.cli.demo.screen import Screen, milliseconds
from aios_edge.cli.demo.summary import Summary
from aios_edge.cli.demo.watch import Watcher

SHOWN_SENTENCES = 6


def run(plan: Plan, out: Path, source: str, screen: Screen, *, fast: bool, structured: bool = False) -> Summary:
    """All acts; raises what goes wrong. Every process it starts has ended when it returns or raises."""
    started = time.monotonic()

    screen.act("Workshop: fine-tune, compress, verify, choose")
    workshop = acts.make_bundles(plan, out, source, structured=structured)
    screen.candidates(workshop)
    if workshop.not_pruned is not None:
        screen.not_pruned(workshop.not_pruned)
    texts = [row.text for row in workshop.sentences]
    local_bundle = workshop.bundle(workshop.profile)
    cloud_bundle = workshop.bundle(CLOUD_PROFILE)

    with ExitStack() as running:
        screen.act("Device: broker, cloud and agent")
        broker = running.enter_context(start_broker())
        watcher = Watcher(broker.url, "aios/#")
        running.callback(watcher.close)
        cloud_config = AgentConfig(
            device="cloud",
            profile=CLOUD_PROFILE,
            bundle=cloud_bundle,
            port=free_port(),
            broker_url=broker.url,
            interval_s=plan.telemetry_interval_s,
        )
        cloud = running.enter_context(cloud_config.start(out / "cloud"))
        device = AgentConfig(
            device="edge",
            profile=workshop.profile,
            bundle=local_bundle,
            port=free_port(),
            broker_url=broker.url,
            interval_s=plan.telemetry_interval_s,
            cloud_url=cloud.url,
            model=MODEL_NAME,
        )
        screen.say(f"  {broker.kind} on {broker.url} · cloud on {cloud.url} with {CLOUD_PROFILE}")
        offline = acts.offline_labels({"local": local_bundle, "cloud": cloud_bundle}, workshop.sentences, out)

        with device.start(out / "edge") as agent:
            screen.say(
                f"  agent on {agent.url} with {workshop.profile}: its contract was checked here before it went live"
            )
            for row in workshop.sentences[:SHOWN_SENTENCES]:
                (answer,) = agent.client.classify(MODEL_NAME, [row.text])
                mark = "✓" if answer.label == row.label else "✗"
                screen.say(f"    {mark} {answer.label:8} {answer.score:.2f} {answer.route} · {row.text[:56]}")
            native = acts.measure_unloaded(Sender(agent.url, MODEL_NAME, texts), plan, connections=2)
            screen.unloaded("this machine", native)
            # The window that the closed loop filled: nothing but this device's own work is in its joules.
            busy = watcher.wait_for("/edge/telemetry", time.monotonic(), 3 * plan.telemetry_interval_s)
            energy = acts.energy(busy.body if busy else None)
            if busy:
                screen.telemetry(busy.body)
        cloud_figures = acts.measure_unloaded(Sender(cloud.url, MODEL_NAME, texts), plan, connections=2)
        screen.unloaded("the cloud", cloud_figures)

        screen.act("Overload: three times what the device can do")
        slowdown = emulation_slowdown(
            native.capacity_per_s, cloud_figures.capacity_per_s, OVERLOAD_FACTOR, CLOUD_UTILISATION
        )
        screen.say(
            f"  Emulating a weaker device: every batch takes {slowdown:.1f} x its measured compute time, so that the "
            "cloud on this same machine has the capacity to take the rest."
        )
        weak = replace(device, slowdown=slowdown)
        with replace(weak, cloud_url=None).start(out / "edge") as agent:
            sender = Sender(agent.url, MODEL_NAME, texts)
            unloaded = acts.measure_unloaded(sender, acts.shortened(plan, slowdown), connections=4)
            screen.unloaded("the emulated device", unloaded)
            alone = acts.overload(sender, unloaded, plan, offline)
            screen.overload("without a cloud", alone)
        with weak.start(out / "edge") as agent:
            sender = Sender(agent.url, MODEL_NAME, texts)
            acts.warm_up(sender)
            helped = acts.overload(sender, unloaded, plan, offline)
            screen.overload("with the cloud", helped)
            heard = watcher.latest("/edge/telemetry")
            if heard:
                screen.telemetry(heard.body)

            screen.act("Faults: the cloud is killed, then the worker")
            breaker_opened_s = acts.lose_cloud(sender, unloaded, plan, cloud, watcher)
            screen.say(
                "  cloud killed under load: "
                + (
                    "the breaker did not open"
                    if breaker_opened_s is None
                    else f"breaker open after {milliseconds(breaker_opened_s)}, and said so over MQTT"
                )
            )
            kill = acts.kill_worker(agent, sender)
            screen.worker(kill)

    chosen = workshop.chosen(workshop.profile)
    score = helped.score
    return Summary(
        profile=workshop.profile,
        candidate=chosen["name"],
        test_accuracy=chosen["test"]["metrics"]["accuracy"],
        fp32_size_bytes=workshop.report["baseline"]["size_bytes"],
        size_bytes=chosen["size_bytes"],
        speedup=chosen["speedup"],
        accuracy_drop=chosen["test"]["drop"]["value"],
        agreement=chosen["test"]["agreement"],
        deadline_s=helped.deadline_s,
        emulated_slowdown=slowdown,
        offered=score.offered,
        admitted=score.admitted,
        shed=score.shed,
        cloud_share=score.cloud_share,
        deadline_hit_rate_with_cloud=score.hit_rate,
        deadline_hit_rate_without_cloud=alone.score.hit_rate,
        breaker_opened_s=breaker_opened_s,
        worker_killed_in_flight=kill.in_flight,
        worker_lost_requests=kill.sent - kill.answers - kill.refused,
        worker_recovered_s=kill.recovered_s,
        energy_j_per_inference=energy.j_per_inference,
        energy_method=energy.method,
        mqtt_messages=watcher.count,
        wall_s=round(time.monotonic() - started, 1),
        fast=fast,
        structured=structured,
        pruned=bool(chosen["structure"]),
        not_pruned=workshop.not_pruned,
    )
