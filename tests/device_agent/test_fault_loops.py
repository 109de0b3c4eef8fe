"""``kill -9`` of worker, agent, cloud and broker, again and again while clients ask.

Each request is answered, refused, or loses its connection, and never hangs; what was killed is used again within 3 s of
being back; nothing piles up. ``make test`` has a few rounds of each, ``make test-long`` many.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from identity_model import write_identity
from mqtt_listener import Listener
from raw_http import Door
from steady_load import SteadyLoad, soon_s

from aios_edge.broker import start_broker
from aios_edge.mqtt import STEADY_S

rounds = pytest.mark.parametrize("rounds", [2, pytest.param(60, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("faults") / "repository"
    write_identity(folder / "id" / "1")
    return f'[repository]\npath = "{folder}"\n'


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def start(start_agent: Any, more: str, name: str, **options: Any) -> Any:
    path = Path(f"/tmp/aios-faults-{name}-{os.getpid()}.sock")
    agent = start_agent(more, http=f'unix_socket = "{path}"', **options)
    agent.door = Door(unix=path)
    return agent


def threads_and_descriptors(agent: Any) -> tuple[int, int, int]:
    """Of the agent's process, and its children."""
    root = Path(f"/proc/{agent.process.pid}")
    children = (root / "task" / str(agent.process.pid) / "children").read_text().split()
    descriptors = list((root / "fd").iterdir())
    return len(list((root / "task").iterdir())), len(descriptors), len(children)


def nothing_piled_up(agent: Any, before: tuple[int, int, int]) -> None:
    """After the load: what one more round takes must not be there sixty times. asyncio's pool may have grown."""

    def same() -> bool:
        threads, descriptors, children = threads_and_descriptors(agent)
        return threads <= before[0] + 4 and descriptors <= before[1] + 4 and children == before[2]

    end = time.monotonic() + 10
    while not same():
        assert time.monotonic() < end, (before, threads_and_descriptors(agent))
        time.sleep(0.02)
    status = agent.status()
    assert status["in_flight"] == status["in_flight_bytes"] == 0
    assert "Traceback" not in agent.log()


def worker_of(agent: Any) -> int:
    pid: int | None = agent.status()["models"]["id"]["worker_pid"]
    assert pid is not None
    return pid


def runs(pid: int) -> bool:
    """Whether a process is there, and not only waits for whoever adopted it to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@rounds
def test_kill_9_of_the_worker(start_agent: Any, repository: str, rounds: int) -> None:
    agent = start(start_agent, f"{repository}[emulate]\nslowdown = 10.0", "worker")
    before = threads_and_descriptors(agent)
    with SteadyLoad(agent.door) as load:
        load.goes_on()
        for _ in range(rounds):
            os.kill(worker_of(agent), signal.SIGKILL)
            load.goes_on()
    assert set(load.ended) <= {"local", "503"} and load.ended["503"] <= 2 * rounds, load.ended
    crashes, backs = agent.events("worker_crashed"), agent.events("worker_recovered")
    assert agent.status()["models"]["id"]["restarts"] == rounds
    if rounds == 2:  # the status has the last fifty events only
        assert len(crashes) == len(backs) == rounds
    assert all(back["away_s"] < soon_s() for back in backs)
    nothing_piled_up(agent, before)
    assert agent.stop() == 0


@rounds
def test_kill_9_of_the_agent(start_agent: Any, repository: str, rounds: int) -> None:
    """Restarted as a service manager would. What it had to tell reaches the broker, once, or word for word again."""
    with start_broker() as broker, Listener(broker) as heard:
        more = f'{repository}[mqtt]\nurl = "{broker.url}"\ninterval_s = 0.1'
        agent = start(start_agent, more, "agent")
        with SteadyLoad(agent.door) as load:
            for _ in range(rounds):
                load.goes_on()
                heard.until(partial(heard.has_windows, 3, boot_of(agent)))  # more, and events, are on their way
                worker = worker_of(agent)
                agent.process.kill()
                agent.process.wait()
                agent = start(start_agent, "", "agent", again=agent)
                load.goes_on()
                assert not runs(worker), "a worker outlived its agent"
        assert set(load.ended) <= {"local", "closed", "503"} and load.ended["closed"] <= 1000 * rounds
        agent.until(lambda status: status["mqtt"]["link"]["connected"] and not status["mqtt"]["outbox"]["depth"])
        assert agent.status()["mqtt"]["outbox"]["quarantined"] is None
        assert agent.stop() == 0
        heard.until(lambda: heard.last_status()["why"] == "stopped")
    with sqlite3.connect(agent.config.parent / "state" / "outbox.sqlite") as outbox:
        assert outbox.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert outbox.execute("SELECT COUNT(*) FROM message").fetchall() == [(0,)]
    heard.no_window_is_missing_or_told_twice(rounds + 1)


@pytest.mark.parametrize("rounds", [1, pytest.param(60, marks=pytest.mark.long)])
def test_kill_9_of_the_broker(start_agent: Any, repository: str, rounds: int) -> None:
    port = free_port()
    broker = start_broker(port=port)
    agent = start(start_agent, f'{repository}[mqtt]\nurl = "{broker.url}"\ninterval_s = 0.1', "broker")
    agent.until(lambda status: status["mqtt"]["link"]["connected"])
    before = threads_and_descriptors(agent)
    with SteadyLoad(agent.door, clients=2) as load:
        for _ in range(rounds):
            began = time.monotonic()
            if rounds > 1:  # whoever is hung up on again and again waits longer and longer, and is right to
                load.until(lambda began=began: time.monotonic() > began + STEADY_S, 2 * STEADY_S)
            load.goes_on()
            broker.process.kill()
            broker.process.wait()
            agent.until(lambda status: not status["mqtt"]["link"]["connected"])
            load.goes_on()
            broker = start_broker(port=port)
            agent.until(lambda status: status["mqtt"]["link"]["connected"], limit_s=soon_s())
            agent.until(
                lambda status: status["mqtt"]["outbox"]["depth"] <= 2, limit_s=soon_s()
            )  # and ten come each second
    assert set(load.ended) == {"local"}, load.ended
    assert agent.log().count("lost the connection to") == agent.log().count("connected to mqtt") - 1 == rounds
    nothing_piled_up(agent, before)
    assert agent.stop() == 0
    broker.stop()


@rounds
def test_kill_9_of_the_cloud(start_agent: Any, repository: str, rounds: int) -> None:
    port = free_port()
    cloud = start(start_agent, repository, "cloud", bind=f"127.0.0.1:{port}")
    more = f"""{repository}[policy]\nbreaker_backoff_s = 0.1\nbreaker_backoff_max_s = 0.5\nqueue_limit = 1
[[cloud]]\nname = "c"\nurl = "{cloud.url}"\nmodel_map = {{id = "id"}}\n[emulate]\nslowdown = 200.0"""
    agent = start(start_agent, more, "device")  # slow, and a queue of one: more than two clients overflow
    agent.until(lambda status: status["cloud"]["c"]["models"]["id"]["usable"])
    before = threads_and_descriptors(agent)
    with SteadyLoad(agent.door, clients=5) as load:
        for _ in range(rounds):
            load.goes_on("cloud")
            load.goes_on("local")
            cloud.process.kill()
            cloud.process.wait()
            load.goes_on("503")
            load.goes_on("local")
            cloud = start(start_agent, "", "cloud", again=cloud)
        load.goes_on("cloud")
    assert set(load.ended) <= {"local", "cloud", "503"}, load.ended
    nothing_piled_up(agent, before)
    assert agent.stop() == 0 and cloud.stop() == 0


@pytest.mark.long
def test_whatever_is_killed_in_whatever_order(start_agent: Any, repository: str) -> None:
    """One agent through all of it, two things at a time, of which each takes processor time from the other's return.
    The same seed each time, so that a failure can be looked into."""
    dice = random.Random(7)
    ports = free_port(), free_port()
    broker = start_broker(port=ports[0])
    cloud = start(start_agent, repository, "any-cloud", bind=f"127.0.0.1:{ports[1]}")
    more = f"""{repository}[policy]\nbreaker_backoff_s = 0.1\nbreaker_backoff_max_s = 0.5\nqueue_limit = 1
[mqtt]\nurl = "{broker.url}"\ninterval_s = 0.1
[[cloud]]\nname = "c"\nurl = "{cloud.url}"\nmodel_map = {{id = "id"}}\n[emulate]\nslowdown = 100.0"""
    agent = start(start_agent, more, "any-agent")
    agent.until(lambda status: status["cloud"]["c"]["models"]["id"]["usable"])
    before = threads_and_descriptors(agent)
    with SteadyLoad(agent.door, clients=5) as load:
        for _ in range(60):
            kinds = dice.sample(["worker", "broker", "cloud"], 2)
            if "cloud" in kinds:
                cloud.process.kill()
                cloud.process.wait()
            if "broker" in kinds:
                broker.process.kill()
                broker.process.wait()
            if "worker" in kinds:
                os.kill(worker_of(agent), signal.SIGKILL)
            load.goes_on(times=3)
            if "broker" in kinds:
                broker = start_broker(port=ports[0])
            if "cloud" in kinds:
                cloud = start(start_agent, "", "any-cloud", again=cloud)
            load.goes_on("cloud", times=3)
    assert set(load.ended) <= {"local", "cloud", "503"}, load.ended
    agent.until(
        lambda status: status["mqtt"]["link"]["connected"] and not status["mqtt"]["outbox"]["depth"], limit_s=40
    )
    nothing_piled_up(agent, before)
    assert agent.stop() == 0 and cloud.stop() == 0
    broker.stop()


def boot_of(agent: Any) -> str:
    boot: str = agent.status()["boot_id"]
    return boot
