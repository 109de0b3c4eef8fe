"""Whatever happens to workers, clients and deadlines, an answer is the one to its own request, and there is one.

Each request carries a number that its answer tells again: a raw model returns it, one that runs batches makes two
figures of it that no other number has. Many connections ask at once, pipelined and kept, while workers are killed and
other clients leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from identity_model import write_identity
from raw_http import post

NEGATIVE, POSITIVE = 14, 4  # where these words begin in the vocabulary of the tiny bundle
NUMBERS = itertools.count(1)

Ending = Literal["stays", "closes", "resets", "half-closes"]


@dataclass(frozen=True)
class Round:
    """Requests in one piece. ``wide``: a body too long for one datagram to the worker."""

    model: Literal["id", "tiny"]
    count: int
    timeout_us: int
    wide: bool


@dataclass(frozen=True)
class ClientPlan:
    door: Literal["tcp", "unix"]
    rounds: tuple[Round, ...]
    ending: Ending


ROUNDS = st.builds(
    Round,
    model=st.sampled_from(["id", "tiny"]),
    count=st.integers(1, 8),
    timeout_us=st.sampled_from([0, 0, 0, 1, 3_000, 30_000, 5_000_000]),
    wide=st.sampled_from([False, False, False, True]),
)
CLIENTS = st.builds(
    ClientPlan,
    door=st.sampled_from(["tcp", "unix"]),
    rounds=st.lists(ROUNDS, min_size=1, max_size=5).map(tuple),
    ending=st.sampled_from(["stays", "stays", "closes", "resets", "half-closes"]),
)
KILLS = st.lists(st.tuples(st.sampled_from(["id", "tiny"]), st.integers(1, 40)), max_size=3)


def tiny_ids(number: int) -> list[int]:
    """One negative word, and one positive word a few times."""
    negative, positive, times = number % 10, number // 10 % 10, number // 100 % 40 + 1
    return [NEGATIVE + negative] + [POSITIVE + positive] * times


def tiny_logits(number: int) -> tuple[float, float]:
    """What the tiny bundle makes of them: the mean of the words' weights."""
    negative, positive, times = number % 10, number // 10 % 10, number // 100 % 40 + 1
    return (4 + 0.5 * negative) / (times + 1), (4 + 0.5 * positive) * times / (times + 1)


def request(round_: Round, number: int) -> bytes:
    data = [number] * (9000 if round_.wide else 1) if round_.model == "id" else tiny_ids(number)
    shape = [len(data)] if round_.model == "id" else [1, len(data)]
    names = ("x",) if round_.model == "id" else ("input_ids", "attention_mask")
    inputs = [
        {
            "name": name,
            "datatype": "INT64",
            "shape": shape,
            "data": data if name != "attention_mask" else [1] * len(data),
        }
        for name in names
    ]
    document = {"id": f"n{number}", "parameters": {"timeout": round_.timeout_us}, "inputs": inputs}
    if round_.wide and round_.model == "tiny":
        document["parameters"]["note"] = "x" * 80_000  # type: ignore[index]
    return post(f"/v2/models/{round_.model}/infer", json.dumps(document).encode())


def check(round_: Round, number: int, status: int, document: Any) -> bool:
    """Its own number, or a refusal that a deadline, a full queue or a lost worker explains; whether it's the number."""
    if status != 200:
        assert status in (503, 504), (status, document)
        assert document["error"] and document["parameters"]["route"] is None
        assert round_.timeout_us or document["parameters"]["reason"] in ("worker_lost", "queue_full"), document
        return False
    assert document["id"] == f"n{number}", document
    (output,) = (output for output in document["outputs"] if output["name"] in ("y", "logits"))
    if round_.model == "id":
        assert output["data"] == [number] * (9000 if round_.wide else 1)
    else:
        for mine, told in zip(tiny_logits(number), output["data"], strict=True):
            assert math.isclose(mine, told, abs_tol=1e-4), (number, told)
    return True


async def hear(reader: asyncio.StreamReader) -> tuple[int, Any]:
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(head.split(" ", 2)[1])
        if status >= 200:
            break
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    return status, json.loads(await reader.readexactly(length))


class Crowd:
    """Clients that ask at once, and whoever kills workers among them."""

    def __init__(self, agent: Any, kills: list[tuple[str, int]]) -> None:
        self._agent = agent
        self._kills = kills
        self.answers = self.answered_200 = 0
        self.tasks: list[asyncio.Task[None]] = []

    async def client(self, plan: ClientPlan) -> None:
        host, port = self._agent.url.removeprefix("http://").split(":")
        path = self._agent.socket_path
        reader, writer = await (
            asyncio.open_unix_connection(path) if plan.door == "unix" else asyncio.open_connection(host, int(port))
        )
        for turn, round_ in enumerate(plan.rounds):
            numbers = [next(NUMBERS) for _ in range(round_.count)]
            last = turn == len(plan.rounds) - 1
            writer.write(b"".join(request(round_, number) for number in numbers))
            if last and plan.ending == "half-closes":
                writer.write_eof()
            if last and plan.ending in ("closes", "resets"):
                heard = random.Random(numbers[0]).randrange(round_.count)
                for number in numbers[:heard]:
                    check(round_, number, *await hear(reader))
                if plan.ending == "resets":
                    writer.transport.abort()
                break
            for number in numbers:
                self.answered_200 += check(round_, number, *await hear(reader))
                await self._count()
        if plan.ending == "half-closes":
            assert await reader.read() == b"", "an answer that nobody asked for"
        if plan.ending == "stays":
            writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await hear(reader) == (200, {"live": True}), "an answer that nobody asked for"
        writer.close()

    async def _count(self) -> None:
        self.answers += 1
        for model, _ in [kill for kill in self._kills if kill[1] == self.answers]:
            self.tasks.append(asyncio.create_task(asyncio.to_thread(kill_worker, self._agent, model)))


def kill_worker(agent: Any, model: str) -> None:
    """One of them, at random."""
    pids = [worker["pid"] for worker in agent.status()["models"][model]["workers"] if worker["pid"]]
    if pids:
        pid = random.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def crowd(agent: Any, plans: list[ClientPlan], kills: list[tuple[str, int]]) -> int:
    here = Crowd(agent, kills)
    await asyncio.gather(*(here.client(plan) for plan in plans))
    await asyncio.gather(*here.tasks)
    return here.answered_200


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def agent(request: pytest.FixtureRequest, start_agent: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Batches take some milliseconds, so that requests wait and kills hit them. Kills of a model that nobody asks are
    crashes in a row: they are to cost no quarantine here, and no long pause."""
    folder = tmp_path_factory.mktemp("own")
    write_identity(folder / "repository" / "id" / "1")
    path = Path(f"/tmp/aios-own-{os.getpid()}.sock")
    policy = "[policy]\nqueue_limit = 40\nquarantine_crashes = 0\n"
    more = f'[repository]\npath = "{folder / "repository"}"\n{policy}[emulate]\nslowdown = 20.0'
    device, constants = f"workers = {request.param}", {"device_agent.restart.LONGEST_PAUSE_S": 0.5}
    agent = start_agent(more, http=f'unix_socket = "{path}"', device=device, constants=constants)
    agent.socket_path = path
    yield agent
    assert "Traceback" not in agent.log()
    assert agent.stop() == 0


def through_all_that(agent: Any, examples: int) -> Callable[[], None]:
    answered_200 = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # another run of the same plan is another run of its races
        suppress_health_check=list(HealthCheck),
    )
    @given(plans=st.lists(CLIENTS, min_size=2, max_size=16), kills=KILLS)
    def run(plans: list[ClientPlan], kills: list[tuple[str, int]]) -> None:
        nonlocal answered_200
        answered_200 += asyncio.run(asyncio.wait_for(crowd(agent, plans, kills), 60))
        agent.until(
            lambda status: (
                status["in_flight"] == status["in_flight_bytes"] == 0
                and all(model["state"] == "ready" and not model["queued"] for model in status["models"].values())
            )
        )

    def run_and_count() -> None:
        run()
        assert answered_200 > examples, "refusals are right for each, and wrong for all"

    return run_and_count


def test_every_answer_is_its_requests_own_and_there_is_one(agent: Any) -> None:
    through_all_that(agent, 8)()


@pytest.mark.long
def test_every_answer_is_its_requests_own_many_times(agent: Any) -> None:
    through_all_that(agent, 300)()
