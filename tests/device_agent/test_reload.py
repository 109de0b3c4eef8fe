"""A policy that is replaced while the agent runs: whole, between two decisions, or not at all."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.errors import ResourceError
from aios_edge.profile_files import load_profile
from device_agent import Agent, load_settings, state_dir
from device_agent.budget_book import BudgetBook, Limit
from device_agent.cloud import CloudPool
from device_agent.cloud_settings import CloudEndpoint
from device_agent.hosting import check_policy
from device_agent.policy_in_force import AT_START, PolicyInForce, policy_digest
from device_agent.power.reading import PowerReading
from device_agent.reload import NAME, Reload
from device_agent.settings import BundleEntry, Device, Emulate, Http, Policy, Settings, parse_settings
from device_agent.settings_change import LIVE_OF_CLOUD, differences
from device_agent.strain import Strain
from device_agent.trace import InForce
from device_agent.trace_reader import TraceLines
from device_agent.trace_writer import TraceWriter
from device_agent.values import Reason

DEVICE = Device(id="d", profile="x86-gateway")
CLOUD = CloudEndpoint(name="c", url="http://c", requests_per_day=10)
OLD = Settings(device=DEVICE, cloud=(CLOUD,), bundle=(BundleEntry(path=Path("b")),))


def changed(**tables: Any) -> dict[str, bool]:
    return {one.key: one.live for one in differences(OLD, msgspec.structs.replace(OLD, **tables))}


OTHER: dict[str, Any] = {"trace": Path("t"), "hedge": True, "avoid_when_throttled": True}


@pytest.mark.parametrize("name", Policy.__struct_fields__)
def test_every_limit_of_the_policy_is_live_but_its_trace(name: str) -> None:
    other = msgspec.structs.replace(OLD.policy, **{name: OTHER.get(name, 0.5)})
    assert changed(policy=other) == {f"policy.{name}": name not in AT_START}
    assert (policy_digest(other) == policy_digest(OLD.policy)) is (name in AT_START)


def test_of_a_cloud_amounts_are_live_and_of_the_rest_nothing_is() -> None:
    for key in LIVE_OF_CLOUD:
        cloud = (msgspec.structs.replace(CLOUD, **{key: 7}),)
        live = getattr(CLOUD, key) is not None  # a new budget takes a restart
        assert changed(cloud=cloud) == {f"cloud.c.{key}": live}
    for key, other in (("requests_per_day", None), ("url", "http://d")):
        assert changed(cloud=(msgspec.structs.replace(CLOUD, **{key: other}),)) == {f"cloud.c.{key}": False}
    assert changed(cloud=()) == {"cloud": False}
    assert changed(bundle=()) == {"bundle": False} and changed(http=Http(bind="127.0.0.1:1")) == {"http.bind": False}
    assert changed(emulate=Emulate(slowdown=2.0), policy=Policy(hedge=True)) == {
        "policy.hedge": True,
        "emulate.slowdown": False,
    }
    assert changed() == {}


def test_of_the_device_and_of_a_bundle_the_number_of_workers_is_live() -> None:
    (entry,) = OLD.bundle
    more = msgspec.structs.replace(entry, workers="auto")
    assert changed(bundle=(more,)) == {"bundle[0].workers": True}
    assert changed(bundle=(msgspec.structs.replace(more, weight=2.0),)) == {
        "bundle[0].workers": True,
        "bundle[0].weight": False,
    }
    assert changed(bundle=(msgspec.structs.replace(more, path=Path("c")),)) == {"bundle": False}
    assert changed(device=msgspec.structs.replace(DEVICE, workers=2, group="g")) == {
        "device.workers": True,
        "device.group": False,
    }


@given(limit=st.integers(1, 9), deadline_s=st.none() | st.integers(1, 9), rows=st.integers(1, 9))
def test_a_digest_is_of_the_values_however_they_are_written(limit: int, deadline_s: int | None, rows: int) -> None:
    lines = [f"queue_limit = {limit}", f"max_rows = {rows}"]
    lines += [] if deadline_s is None else [f"default_deadline_s = {deadline_s}.0"]

    def read(lines: list[str]) -> Policy:
        text = "\n".join(['[device]\nid = "d"\nprofile = "p"\n[policy]', *lines])
        return parse_settings(text, where="x", base=Path("/")).policy

    first, second = read(lines), read([line.replace(".0", "") for line in reversed(lines)])
    assert policy_digest(first) == policy_digest(second)
    assert policy_digest(read([*lines, "hedge = true"])) != policy_digest(first)


def test_what_lasts_longer_than_a_decision_follows_at_once() -> None:
    events: list[str] = []
    strain = Strain(Policy(max_temperature_c=80.0), lambda kind, **_: events.append(kind))
    reading = PowerReading(
        at_s=0.0, total_w=None, total_method="unknown", total_source=None, reason=None, battery=None, thermal=()
    )
    rules = PolicyInForce(Policy(max_temperature_c=80.0))
    rules.follow(strain.follow)
    rules.replace(Policy(avoid_when_throttled=True))
    assert events == [], "nothing was sampled yet"
    strain.look(msgspec.structs.replace(reading, throttled=True))
    assert strain.reason is Reason.THROTTLED and events == ["device_strained"]
    rules.replace(Policy())
    assert strain.reason is None and events == ["device_strained", "device_recovered"], "without another sample"

    async def pool() -> None:
        pool = CloudPool((CLOUD,), Policy(breaker_failures=3), lambda kind, **_: events.append(kind))
        endpoint = pool.endpoints["c"]
        endpoint.health.failed("x")
        other = msgspec.structs.replace(CLOUD, weight=3.0, timeout_s=1.5, requests_per_day=2)
        pool.follow(Policy(breaker_failures=2), (other,))
        assert endpoint.weight == 3.0 and endpoint.account.budgets()["requests"].per_day == 2
        assert endpoint.breaker.state == "closed", "what failed before is remembered, and counted by the new rule"
        endpoint.health.failed("x")
        assert endpoint.breaker.state == "open"

    asyncio.run(pool())


def test_what_was_spent_of_a_budget_stays_spent() -> None:
    async def main() -> None:
        book = BudgetBook({"c": {"requests": Limit(per_day=10)}}, lambda: 5.0)
        assert await book.spend("c", {"requests": 6.0})
        book.resize("c", {"requests": Limit(per_day=7)})
        assert book.left("c", "requests") == 1.0
        book.resize("c", {"requests": Limit(per_day=3)})
        assert book.left("c", "requests") == 0.0 and not book.affords("c", {"requests": 1.0})

    asyncio.run(main())


def test_each_part_of_a_trace_defines_the_policies_it_names(tmp_path: Path) -> None:
    async def main() -> None:
        from test_replay import line

        writer = TraceWriter(tmp_path / "trace", 6_000)
        for name in ("a", "b"):
            writer.define(InForce(digest=name, since="", values={}))
        for name in "abab" * 10:
            writer.write(msgspec.structs.replace(line(), policy=name))
            writer._flush()
        await writer.stop()

    asyncio.run(main())
    assert (tmp_path / "trace.1").is_file()
    for part in ("trace", "trace.1"):
        known: list[str] = []
        for each in TraceLines(tmp_path / part):
            if isinstance(each, InForce):
                known.append(each.digest)
            elif (digest := getattr(each, "policy", None)) is not None:
                assert digest in known
        assert len(known) == len(set(known)), "each once"


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    asked = [sys.executable, "-m", "aios_edge.cli.main", "agent", "reload", "--config", *map(str, words)]
    return subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)


def rewrite(agent: Any, old: str, new: str) -> None:
    text = agent.config.read_text()
    assert old in text
    agent.config.write_text(text.replace(old, new))


def test_requests_in_flight_are_each_decided_by_one_policy(start_agent: Any, tmp_path: Path) -> None:
    """The deadline is given at the desk, what the router is asked is traced further on: both by the same policy."""
    trace = tmp_path / "trace"
    agent = start_agent(f'[policy]\ntrace = "{trace}"\nmax_rows = 3\n')
    turns = 12
    over = threading.Event()
    statuses: Counter[int] = Counter()

    def ask() -> None:
        while not over.is_set():
            statuses[agent.infer("a good film")[0]] += 1

    digests = [agent.status()["policy"]["digest"]]
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for turn in range(turns):
            line = "default_deadline_s = 30.0"
            rewrite(agent, *(("max_rows = 3", f"max_rows = 3\n{line}") if turn % 2 == 0 else (f"\n{line}", "")))
            agent.process.send_signal(signal.SIGHUP)
            agent.until(lambda status: status["policy"]["digest"] != digests[-1])
            digests.append(agent.status()["policy"]["digest"])
        over.set()
        for each in asking:
            each.result()
    assert set(statuses) == {200} and sum(statuses.values()) > turns
    assert len(set(digests)) == 2 and digests[0] == digests[2]
    assert len(agent.events("policy_changed")) == turns
    assert agent.status()["totals"]["local"] == sum(statuses.values())
    assert agent.stop() == 0
    lines = [json.loads(each) for each in trace.read_text().splitlines()]
    defined = {each["digest"]: each["values"] for each in lines if each["type"] == "policy"}
    asked = [each for each in lines if each["type"] == "request"]
    assert len(asked) == sum(statuses.values()) and set(defined) == set(digests) == {each["policy"] for each in asked}
    for each in asked:
        assert ("deadline_at" in each) is (defined[each["policy"]]["default_deadline_s"] is not None)


def test_what_cannot_change_or_be_read_changes_nothing_and_is_said(start_agent: Any) -> None:
    agent = start_agent("[policy]\nmax_rows = 2\n")
    good = agent.config.read_text()
    assert agent.infer(["a", "b"])[0] == 200 and agent.infer(["a", "b", "c"])[0] == 413
    policy = agent.status()["policy"]
    assert policy["values"]["max_rows"] == 2 and policy["last_reload"] is None

    def refused(number: int) -> str:
        agent.process.send_signal(signal.SIGHUP)
        agent.until(lambda status: len(agent.events("policy_refused")) == number)
        now = agent.status()["policy"]
        assert (now["digest"], now["since"]) == (policy["digest"], policy["since"])
        assert now["last_reload"]["outcome"] == "refused"
        assert agent.infer(["a", "b", "c"])[0] == 413
        error = agent.events("policy_refused")[-1]["error"]
        assert now["last_reload"]["error"] == error and error.splitlines()[0] in agent.log()
        return str(error)

    agent.config.write_text(good.replace("max_rows = 2", "max_rows = 9") + "[emulate]\nslowdown = 3.0\n")
    assert "emulate.slowdown 1.0 -> 3.0" in refused(1)
    agent.config.write_text(good.replace("max_rows = 2", "max_rows = -9"))
    assert "must be greater than 0" in refused(2)
    agent.config.write_text(good.replace("max_rows = 2", "max_rows = "))
    assert "TOML" in refused(3)
    agent.config.unlink()
    assert "can't be read" in refused(4)
    agent.config.write_text(good.replace("max_rows = 2", "max_rows = 3"))
    agent.process.send_signal(signal.SIGHUP)
    agent.until(lambda status: status["policy"]["values"]["max_rows"] == 3)
    assert agent.infer(["a", "b", "c"])[0] == 200
    (event,) = agent.events("policy_changed")
    assert event["changed"] == "policy.max_rows 2 -> 3" and event["before"] == policy["digest"] != event["digest"]
    assert agent.stop() == 0


def test_the_command_says_what_became_of_it(start_agent: Any, tmp_path: Path, agent_toml: Callable[..., str]) -> None:
    agent = start_agent("[policy]\nqueue_limit = 9\n[mqtt]\nurl = 'mqtt://127.0.0.1:1'\ninterval_s = 0.1\n")
    done = command(agent.config)
    assert done.returncode == 0 and "nothing changed" in done.stdout, done.stderr
    rewrite(agent, "queue_limit = 9", "queue_limit = 8\nhedge = true")
    done = command(agent.config, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["outcome"] == "changed"
    assert document["changed"] == ["policy.queue_limit 9 -> 8", "policy.hedge false -> true"]
    assert document["digest"] == agent.status()["policy"]["digest"]
    rewrite(agent, "interval_s = 0.1", "interval_s = 0.2")
    done = command(agent.config)
    assert done.returncode == 2 and "mqtt.interval_s 0.1 -> 0.2" in done.stderr and "in force" not in done.stdout
    rewrite(agent, "queue_limit = 8", "queue_limit = 0")
    done = command(agent.config)
    assert done.returncode == 2 and "queue_limit" in done.stderr
    assert len(agent.events("policy_refused")) == 1, "what is wrong by itself doesn't trouble the agent"
    other = agent.config.with_name("other.toml")
    other.write_text(agent.config.read_text().replace("queue_limit = 0", "queue_limit = 5"))
    done = command(other)
    assert done.returncode == 2 and str(agent.config) in done.stderr
    folder = agent.config.parent / "state"
    assert state_dir.holder(folder) == agent.process.pid
    assert agent.stop() == 0
    assert state_dir.holder(folder) is None and not (folder / NAME).exists()
    done = command(other)
    assert done.returncode == 1 and "no agent runs here" in done.stderr


def test_an_agent_that_finds_the_folder_in_use_leaves_the_others_word_alone(start_agent: Any) -> None:
    agent = start_agent("[policy]\nqueue_limit = 9\n")
    again = [sys.executable, "-m", "aios_edge.cli.main", "agent", "run", "--config", str(agent.config)]
    second = subprocess.run(again, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 1 and "in use by another agent" in second.stderr
    rewrite(agent, "queue_limit = 9", "queue_limit = 8")
    assert command(agent.config).returncode == 0
    assert agent.status()["policy"]["values"]["queue_limit"] == 8
    assert agent.stop() == 0


def test_who_cannot_hear_a_signal_is_not_sent_one(tiny_bundle: Any, tmp_path: Path) -> None:
    """An agent in another thread of somebody's program, which SIGHUP would end."""
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[device]\nid = "d"\nprofile = "x86-gateway"\n[http]\nbind = "127.0.0.1:0"\n'
        f'[[bundle]]\npath = "{tiny_bundle.path}"\n'
    )
    settings = load_settings(config)
    answers: list[subprocess.CompletedProcess[str]] = []

    async def main() -> None:
        agent = Agent(settings, config=config)
        running = asyncio.create_task(agent.run())
        await agent.ready.wait()
        answers.append(await asyncio.to_thread(command, config))
        agent.shut_down()
        await running

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    thread.join()
    assert answers[0].returncode == 1 and "doesn't say that it listens" in answers[0].stderr


def test_a_number_that_a_killed_agent_left_is_nobodys(start_agent: Any) -> None:
    agent = start_agent()
    agent.process.kill()
    agent.process.wait()
    assert (agent.config.parent / "state" / NAME).is_file()
    done = command(agent.config)
    assert done.returncode == 1 and "no agent runs here" in done.stderr


def test_whose_a_folder_is_may_not_be_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_dir.holder(tmp_path) is None
    with state_dir.hold(tmp_path):
        assert state_dir.holder(tmp_path) == os.getpid()
        (tmp_path / state_dir.LOCK).write_bytes(b"")  # as on a full disk
        with pytest.raises(ResourceError, match="could not write its process id"):
            state_dir.holder(tmp_path)
    assert state_dir.holder(tmp_path) is None

    def refused(*given: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # root may read everything
    with pytest.raises(ResourceError, match=r"can't be told \(Permission denied\)"):
        state_dir.holder(tmp_path)


def test_a_policy_that_this_device_cannot_keep_is_refused(tmp_path: Path, agent_toml: Callable[..., str]) -> None:
    profile = msgspec.structs.replace(load_profile("x86-gateway"), isolation="thread")
    config = tmp_path / "agent.toml"
    config.write_text(agent_toml())
    settings = load_settings(config)
    settings.device.state_dir.mkdir()
    rules = PolicyInForce(settings.policy)
    told: list[str] = []

    async def main() -> None:
        pool = CloudPool((), settings.policy, lambda kind, **_: None)
        check = partial(check_policy, profile=profile)
        reload = Reload(config, settings, rules, pool, lambda kind, **_: told.append(kind), check=check)
        config.write_text(agent_toml("[policy]\nmemory_budget_bytes = 1000"))
        reload.ask()
        assert reload._task is not None
        await reload._task
        assert reload.last is not None
        assert "memory_budget_bytes needs worker processes" in str(reload.last.error)
        assert told == ["policy_refused"] and rules.policy == settings.policy == reload.settings.policy
        await reload.stop()

    asyncio.run(main())


def test_who_asks_while_it_is_read_is_heard_afterwards(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    text = '[device]\nid = "d"\nprofile = "x86-gateway"\n[policy]\nqueue_limit = {}\n'
    config.write_text(text.format(1))
    settings = parse_settings(config.read_text(), where="x", base=tmp_path)
    settings.device.state_dir.mkdir()
    rules = PolicyInForce(settings.policy, wall=itertools.count().__next__)

    async def main() -> None:
        pool = CloudPool((), settings.policy, lambda kind, **_: None)
        reload = Reload(config, settings, rules, pool, lambda kind, **_: None, check=lambda _: None)
        reload.begin()
        for limit in range(2, 40):
            config.write_text(text.format(limit))
            reload.ask()
            await asyncio.sleep(0)
        while reload._task is not None and not reload._task.done():
            await asyncio.wait((reload._task,))
        assert rules.policy.queue_limit == 39, "the last word of the file"
        await reload.stop()

    asyncio.run(main())
