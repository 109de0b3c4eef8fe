"""A model with several workers, and a real agent around it: batches at once, a death that is one's, every change."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from identity_model import write_identity
from mqtt_listener import Listener
from quick_constants import UNREHEARSED
from raw_http import Door
from steady_load import SteadyLoad
from swapping import client, failing_model, traffic
from test_affinity import affinities, profile
from test_fault_loops import runs

from aios_edge.broker import start_broker
from aios_edge.cli.agent import describe
from device_agent.worker_memory import proportional_bytes

TWO = "workers = 2"
SLOW = "[emulate]\nslowdown = 150.0"  # a batch takes a tenth of a second or more


def tiny(status: Any) -> Any:
    return status["models"]["tiny"]


def pids(status: Any, model: str = "tiny") -> list[int]:
    return [worker["pid"] for worker in status["models"][model]["workers"] if worker["serves"]]


def both(agent: Any, model: str = "tiny") -> list[int]:
    """Wait until two serve; their process ids."""
    found: list[int] = agent.until(lambda status: (ids := pids(status, model)) and len(ids) == 2 and ids)
    return found


def kill_one(agent: Any, number: int, model: str = "tiny") -> None:
    """The death of one of two is noticed when this returns."""
    pid = both(agent, model)[number]
    os.kill(pid, signal.SIGKILL)
    agent.until(lambda status: pid not in pids(status, model))


@pytest.fixture
def place(tmp_path: Path, make_bundle: Any) -> Path:
    """Where agent.toml's bundle lies; version 1.0.0 at first."""
    path: Path = make_bundle(tmp_path / "bundle").path
    return path


def test_two_batches_run_at_once_and_one_alone_never_waits(start_agent: Any, small_batches: Path) -> None:
    agent = start_agent(SLOW, bundle=small_batches, device=TWO, constants=UNREHEARSED)
    both(agent)
    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(agent.infer) for _ in range(5)]
        agent.until(lambda status: [worker["running"] for worker in tiny(status)["workers"]] == [1, 1])
        assert [future.result()[0] for future in futures] == [200] * 5
    status = tiny(agent.status())
    assert status["workers_serving"] == 2 and status["worker_pid"] in pids(agent.status())
    assert all(worker["rss_bytes"] > 1e6 and worker["detail"] is None for worker in status["workers"])
    page = agent.text("/metrics")
    assert 'aios_workers{model="tiny"} 2' in page
    both_bytes = sum(worker["rss_bytes"] for worker in status["workers"])
    assert f'aios_worker_resident_bytes{{model="tiny"}} {both_bytes}' in page
    first, second = pids(agent.status())
    assert agent.stop() == 0
    assert not runs(first) and not runs(second)


def test_telemetry_tells_of_each_that_serves(start_agent: Any) -> None:
    with start_broker() as broker, Listener(broker) as heard:
        agent = start_agent(f'[mqtt]\nurl = "{broker.url}"\ninterval_s = 0.1', device=TWO)
        ids = both(agent)
        agent.infer()

        def told() -> Any:
            return heard.of("telemetry")[-1][1]["memory"]

        heard.until(lambda: bool(heard.of("telemetry")) and len(told()["workers"]["tiny"]) == 2)
        assert [worker["pid"] for worker in told()["workers"]["tiny"]] == ids
        sizes = [worker["rss_bytes"] for worker in told()["workers"]["tiny"]]
        assert min(sizes) > 1e6 and told()["workers_rss_bytes"] == {"tiny": sum(sizes)}
        kill_one(agent, 0)
        heard.until(lambda: told()["workers"]["tiny"][0]["pid"] not in ids)
        assert agent.stop() == 0


def test_a_worker_that_is_killed_costs_its_batch_and_nobody_else_feels_it(
    start_agent: Any, small_batches: Path
) -> None:
    agent = start_agent(SLOW, bundle=small_batches, device=TWO, constants=UNREHEARSED)
    for victim in (0, 1):
        before = both(agent)
        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(agent.infer) for _ in range(6)]
            agent.until(lambda status: [worker["running"] for worker in tiny(status)["workers"]] == [1, 1])
            os.kill(before[victim], signal.SIGKILL)
            seen = agent.until(lambda status: tiny(status)["workers_serving"] == 1 and status)
            assert tiny(seen)["state"] == seen["state"] == "ready" and agent.get("/v2/health/ready")
            assert pids(seen) == [tiny(seen)["worker_pid"]] == [before[1 - victim]]
            assert "1 of 2 workers: was killed by SIGKILL" in "\n".join(describe(seen))
            reasons = [future.result()[1]["parameters"]["reason"] for future in futures]
        assert [future.result()[0] for future in futures] == [200] * 6
        assert reasons.count("retried") == 1
        assert set(before) & set(both(agent)) == {before[1 - victim]}
        assert tiny(agent.status())["restarts"] == victim + 1
    crashes, backs = agent.events("worker_crashed"), agent.events("worker_recovered")
    assert [(crash["in_flight"], crash["serving"]) for crash in crashes] == [(1, 1)] * 2
    assert len(backs) == 2 and all(back["away_s"] > 0 for back in backs)
    assert agent.stop() == 0


def test_who_asks_while_workers_are_killed_hears_of_none(start_agent: Any, tmp_path: Path) -> None:
    write_identity(tmp_path / "repository" / "id" / "1")
    path = Path(f"/tmp/aios-workers-{os.getpid()}.sock")
    more = f'[repository]\npath = "{tmp_path / "repository"}"\n[emulate]\nslowdown = 10.0'
    agent = start_agent(more, http=f'unix_socket = "{path}"', device=TWO)
    both(agent, "id")
    with SteadyLoad(Door(unix=path)) as load:
        load.goes_on()
        for turn in range(4):
            kill_one(agent, turn % 2, "id")
            load.goes_on()
    assert set(load.ended) == {"local"}, load.ended
    assert agent.until(lambda status: status["models"]["id"]["restarts"] == 4)
    assert "Traceback" not in agent.log() and agent.stop() == 0


def test_both_may_die_and_the_model_comes_back(start_agent: Any) -> None:
    agent = start_agent(device=TWO)
    for pid in both(agent):
        os.kill(pid, signal.SIGKILL)
    code, document, _ = agent.infer()  # which may have met them both in their last moments
    assert code == 200 or document["parameters"]["reason"] == "worker_lost"
    agent.until(lambda status: tiny(status)["restarts"] == 2 and tiny(status)["workers_serving"] == 2)
    assert agent.infer()[0] == 200 and len(agent.events("worker_crashed")) == 2
    assert agent.stop() == 0


def test_a_swap_changes_all_workers_and_loses_no_request(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent(bundle=place, device=TWO)
    old = both(agent)
    make_bundle(place, version="1.1.0")
    with traffic(agent) as seen:
        client(agent).load_model("tiny")
        new = pids(agent.status())
        assert len(new) == 2 and not set(new) & set(old), "as many serve as before, from the change on"
    assert {version for version, _ in seen} == {"1.0.0", "1.1.0"}
    agent.until(lambda _: not any(runs(pid) for pid in old))
    client(agent).unload_model("tiny")
    assert not any(runs(pid) for pid in new)
    client(agent).load_model("tiny")
    both(agent)
    assert agent.stop() == 0


def test_a_bundle_that_gives_its_place_back_gives_it_to_as_many_workers(
    start_agent: Any, place: Path, make_bundle: Any, tiny_parts: Any, tmp_path: Path
) -> None:
    agent = start_agent(bundle=place, device=TWO)
    both(agent)
    files = failing_model(tiny_parts, tmp_path)
    size = sum(path.stat().st_size for path in files.values())
    measured = msgspec.structs.replace(tiny_parts["manifest"]["measured"], size_bytes=size)
    make_bundle(place, version="1.1.0", files=files, measured=measured, promises={"size_bytes": size})
    with traffic(agent) as seen:
        client(agent).load_model("tiny")
    assert seen["1.1.0", b"positive"]
    agent.until(lambda _: agent.infer("a strange film") and agent.events("rolled_back"), limit_s=30)
    both(agent)
    assert agent.infer("a strange film")[1]["model_version"] == "1.0.0"
    assert agent.stop() == 0


def test_another_number_takes_over_without_losing_a_request(start_agent: Any) -> None:
    agent = start_agent("workers = 1\n[policy]\nprobation_s = 0.1")
    text, before = agent.config.read_text(), agent.status()["models"]["tiny"]["worker_pid"]

    def ask_for(workers: str) -> None:
        agent.config.write_text(text.replace("workers = 1", workers))
        agent.process.send_signal(signal.SIGHUP)

    with traffic(agent):
        ask_for("workers = 2")
        assert before not in both(agent)
    two = both(agent)
    with traffic(agent):
        ask_for("")  # the device's, and nobody's
        agent.until(lambda status: len(tiny(status)["workers"]) == 1 and tiny(status)["workers_serving"] == 1)
    agent.until(lambda _: not any(runs(pid) for pid in two))
    assert [event["changed"] for event in agent.events("policy_changed")] == [
        "bundle[0].workers 1 -> 2",
        "bundle[0].workers 2 -> none",
    ]
    ask_for("workers = 1\nweight = 2.0")
    (refused,) = agent.until(lambda _: agent.events("policy_refused"))
    assert "bundle[0].weight 1.0 -> 2.0" in refused["error"]
    assert len(agent.events("swapped")) == 2 and not agent.events("worker_crashed")
    assert agent.stop() == 0


def test_a_trial_is_of_one_worker_and_all_take_over(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent("[policy]\nshadow_share = 1.0\ntrial_requests = 40", bundle=place, device=TWO)
    old = both(agent)
    make_bundle(place, version="1.1.0")
    client(agent).load_model("tiny")
    assert pids(agent.status()) == old
    with traffic(agent) as seen:
        agent.until(lambda _: agent.events("swapped"), limit_s=30)
        new = pids(agent.status())
        assert len(new) == 2 and not set(new) & set(old)
    (passed,) = agent.events("trial_passed")
    assert passed["compared"] == passed["answers"] >= 40 and passed["disagreed"] == 0, "both tell their labels"
    assert {version for version, _ in seen} == {"1.0.0", "1.1.0"}
    agent.until(lambda _: not any(runs(pid) for pid in old))
    assert agent.stop() == 0


def test_a_crash_too_many_starts_nobody_and_ends_nobody(start_agent: Any) -> None:
    agent = start_agent("[policy]\nquarantine_crashes = 3\nquarantine_pause_s = 600.0", device=TWO)
    for _ in range(3):
        kill_one(agent, 1)
    (event,) = agent.until(lambda _: agent.events("quarantined"))
    assert event["serving"] == 1 and event["crashes"] == 3
    status = tiny(agent.status())
    assert status["state"] == "ready" and status["workers_serving"] == 1
    assert status["workers"][1]["detail"] == "was killed by SIGKILL while idle"
    assert agent.infer()[0] == 200, "which ends it"
    for number in (0, 1, 0):
        kill_one(agent, number)
    agent.until(lambda _: len(agent.events("quarantined")) == 2)
    agent.post("/v2/repository/models/tiny/load")  # as does an operator
    both(agent)
    assert agent.stop() == 0


def test_a_quarantined_models_last_worker_takes_it_along_until_it_is_loaded(start_agent: Any) -> None:
    agent = start_agent("[policy]\nquarantine_crashes = 3\nquarantine_pause_s = 600.0", device=TWO)
    for number in (1, 0, 1):
        kill_one(agent, number)
    agent.until(lambda _: agent.events("quarantined"))
    (last,) = pids(agent.status())
    os.kill(last, signal.SIGKILL)
    agent.until(lambda status: tiny(status)["state"] == "quarantined")
    code, document, _ = agent.infer()
    assert code == 503 and document["parameters"]["reason"] == "quarantined"
    agent.post("/v2/repository/models/tiny/load")
    assert agent.infer()[0] == 200
    both(agent)
    assert agent.stop() == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU")
def test_each_has_cpus_of_its_own_where_the_profile_pins_them(start_agent: Any, tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    agent = start_agent(profile=profile(tmp_path, f'cpu_affinity = {cpus}\nworkers = "auto"'))
    assert sorted(map(sorted, (cpu for pid in both(agent) for cpu in affinities(pid)))) == [[cpu] for cpu in cpus]
    assert tiny(agent.status())["activation"]["cpus"] == [cpus[0]], "it was measured as it runs"
    assert agent.stop() == 0


def test_within_a_budget_further_workers_give_way_to_models(start_agent: Any, make_bundle: Any, tmp_path: Path) -> None:
    paths = [make_bundle(tmp_path / name, name=name).path for name in ("tiny", "second")]
    more = f'[[bundle]]\npath = "{paths[1]}"\nworkers = 1\n'
    agent = start_agent(more, bundle=paths[0], device=TWO)
    held = sum(proportional_bytes(pid) or 0 for pid in (*both(agent), *pids(agent.status(), "second")))
    assert agent.stop() == 0

    budget = f"[policy]\nmemory_budget_bytes = {int(0.8 * held)}"
    agent = start_agent(more + budget, bundle=paths[0], device=TWO)
    told = agent.until(lambda status: tiny(status)["workers"][1]["detail"])
    assert told == "memory_budget_bytes leaves no room for another worker"
    assert [len(pids(agent.status(), name)) for name in ("tiny", "second")] == [1, 1]
    agent.post("/v2/repository/models/second/unload")
    both(agent)  # its room is free
    agent.post("/v2/repository/models/second/load")
    assert [len(pids(agent.status(), name)) for name in ("tiny", "second")] == [1, 1]
    assert agent.infer()[0] == agent.infer(model="second")[0] == 200
    assert not [event for event in agent.events("unloaded") if event.get("reason") == "memory_budget"]
    assert agent.stop() == 0
