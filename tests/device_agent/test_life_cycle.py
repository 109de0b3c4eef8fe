"""Bundles that come, go and change while a real agent serves real clients."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from quick_constants import UNREHEARSED
from swapping import CLIENTS, client, failing_model, ids, memory_mapped, post, slow_model, traffic
from tritonclient.utils import InferenceServerException

SLOW = "[emulate]\nslowdown = 150.0"  # a batch takes a tenth of a second or more
NEW_LABELS = ("bad", "good")


@pytest.fixture
def place(tmp_path: Path, make_bundle: Any) -> Path:
    """Where agent.toml's bundle lies; version 1.0.0 at first."""
    path: Path = make_bundle(tmp_path / "bundle").path
    return path


def index(agent: Any) -> list[tuple[str, str, str, str]]:
    models = client(agent).get_model_repository_index()
    return [(model["name"], model["version"], model["state"], model["reason"]) for model in models]


def test_unload_answers_who_is_here_ends_the_worker_and_load_brings_it_back(
    start_agent: Any, tmp_path: Path, make_bundle: Any
) -> None:
    agent = start_agent(SLOW, bundle=make_bundle(tmp_path / "bundle", max_batch_size=1).path, constants=UNREHEARSED)
    door = client(agent)
    bundle_id, pid = ids(agent)
    assert memory_mapped(pid)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(agent.infer) for _ in range(8)]
        agent.until(lambda status: status["models"]["tiny"]["queued"] >= 5)
        door.unload_model("tiny", unload_dependents=True)
        assert [future.result()[0] for future in futures] == [200] * 8
    assert not memory_mapped(pid)
    assert index(agent) == [("tiny", "1.0.0", "UNAVAILABLE", "unloaded")]
    status, document, _ = agent.infer()
    assert status == 404 and "tiny is unloaded" in document["error"]
    assert not door.is_model_ready("tiny") and not door.is_server_ready()
    status = agent.status()
    assert status["models"] == {} and status["refused"] == [] and status["unloaded"][0]["bundle_id"] == bundle_id
    assert status["state"] == "ready", "it was asked for"
    assert not [*(agent.config.parent / "state" / "bundles").iterdir()]
    door.unload_model("tiny")

    with ThreadPoolExecutor(2) as pool:  # the second finds it there
        assert [*pool.map(lambda _: post(agent, "load")[0], range(2))] == [200, 200]
    assert agent.infer()[0] == 200 and door.is_model_ready("tiny") and ids(agent)[0] == bundle_id
    assert index(agent) == [("tiny", "1.0.0", "READY", "")]
    before = ids(agent)
    door.load_model("tiny")
    assert ids(agent) == before, "nothing changed there"
    assert len(agent.events("activated")) == 2 and len(agent.events("unloaded")) == 1
    assert agent.stop() == 0


def test_what_can_not_be_loaded_is_said(start_agent: Any, place: Path) -> None:
    agent = start_agent(bundle=place)
    door = client(agent)
    for change in (door.load_model, door.unload_model):
        with pytest.raises(InferenceServerException, match="there is no model 'other'") as told:
            change("other")
        assert told.value.status() == "404"
    with pytest.raises(InferenceServerException, match="load with 'config' is not available") as told:
        door.load_model("tiny", config="{}")
    assert told.value.status() == "400"
    for body, status in ((b"", 200), (b"{}", 200), (b"[]", 400), (b"{", 400), (b'{"parameters": 1}', 400)):
        assert post(agent, "load", body)[0] == status, body
    assert post(agent, "load", b"") == (200, {"name": "tiny", "load": True})
    assert agent.stop() == 0


def test_a_swap_loses_no_request(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent(bundle=place)
    old, pid = ids(agent)
    new = make_bundle(place, version="1.1.0", labels=NEW_LABELS).bundle_id
    with traffic(agent) as seen:
        client(agent).load_model("tiny")
        of_old = seen["1.0.0", b"positive"]
    assert set(seen) == {("1.0.0", b"positive"), ("1.1.0", b"good")}, "each by the one or by the other"
    assert seen["1.0.0", b"positive"] - of_old <= CLIENTS, "new requests go to the new one"
    assert ids(agent)[0] == new and not memory_mapped(pid)
    (swapped,) = agent.events("swapped")
    assert (swapped["from"], swapped["to"]) == (old, new) and swapped["took_s"] > 0
    assert (swapped["from_version"], swapped["to_version"]) == ("1.0.0", "1.1.0")
    assert agent.get("/v2/models/tiny")["labels"] == list(NEW_LABELS)
    probation = agent.status()["models"]["tiny"]["probation"]
    assert probation["previous"] == old and 0 < probation["ends_in_s"] <= 60 and probation["failures"] == 0
    assert agent.events("rolled_back") == [] and set(agent.status()["totals"]) == {"local"}
    assert agent.stop() == 0


def test_a_swap_answers_who_waits_for_the_old_worker(start_agent: Any, tmp_path: Path, make_bundle: Any) -> None:
    place = make_bundle(tmp_path / "bundle", max_batch_size=1).path
    agent = start_agent(SLOW, bundle=place, constants=UNREHEARSED)
    make_bundle(place, version="1.1.0", max_batch_size=1)
    pid = ids(agent)[1]
    with ThreadPoolExecutor(24) as pool:
        futures = [pool.submit(agent.infer) for _ in range(24)]
        agent.until(lambda status: status["models"]["tiny"]["queued"] >= 20)
        client(agent).load_model("tiny")
        answers = [future.result() for future in futures]
    assert {(status, document["model_version"]) for status, document, _ in answers} == {(200, "1.0.0")}
    assert not memory_mapped(pid) and agent.infer()[1]["model_version"] == "1.1.0"
    assert set(agent.status()["totals"]) == {"local"}
    assert agent.stop() == 0


def test_a_refused_bundle_leaves_the_old_one_serving(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent(bundle=place)
    before = ids(agent)
    make_bundle(place, version="1.1.0")
    with (place / "model.onnx.data").open("r+b") as damaged:
        damaged.write(b"\xff")
    with traffic(agent) as seen:
        status, document = post(agent, "load")
    assert status == 422 and document["parameters"] == {"check": "digest"}
    assert document["error"].startswith("[digest] ") and "sha256" in document["error"]
    assert set(seen) == {("1.0.0", b"positive")} and ids(agent) == before
    (refused,) = agent.events("bundle_refused")
    assert refused["check"] == "digest" and agent.status()["state"] == "ready"

    make_bundle(place, name="other", version="1.1.0")
    assert post(agent, "load")[1]["parameters"] == {"check": "name"} and ids(agent) == before

    os.kill(before[1], signal.SIGKILL)
    agent.until(lambda status: status["models"]["tiny"]["restarts"] == 1 and status["state"] == "ready")
    assert agent.infer()[1]["model_version"] == "1.0.0", "a worker comes back with the bundle that was checked"
    assert ids(agent)[0] == before[0] and agent.events("contract_broken") == []
    assert agent.stop() == 0


def test_a_bundle_refused_at_the_start_may_be_repaired_and_loaded(
    start_agent: Any, place: Path, tmp_path: Path, make_bundle: Any
) -> None:
    second = make_bundle(tmp_path / "second", name="second").path
    whole = (second / "model.onnx").read_bytes()
    (second / "model.onnx").write_bytes(b"damaged")
    agent = start_agent(f'[[bundle]]\npath = "{second}"', bundle=place)
    assert [entry[2] for entry in index(agent)] == ["READY", "UNAVAILABLE"]
    with pytest.raises(InferenceServerException, match="digest"):
        client(agent).load_model("second")
    status, document, _ = agent.infer(model="second")
    assert status == 404 and "second is refused" in document["error"]
    (second / "model.onnx").write_bytes(whole)
    client(agent).load_model("second")
    assert agent.infer(model="second")[0] == 200 and agent.status()["state"] == "ready"
    assert agent.stop() == 0


@pytest.mark.parametrize(
    ("make_model", "parameters", "codes", "reason"),
    [
        (failing_model, {}, {200, 500}, "error rate"),
        (slow_model, {}, {200}, "p95 of compute time"),
        # One slow batch, and no other of those would run: all are predicted to be late.
        (slow_model, {"timeout": 10_000}, {200, 503, 504}, "p95 of compute time"),
    ],
    ids=["failing", "slow", "slow-and-deadlines"],
)
def test_a_bundle_that_breaks_its_contract_after_the_swap_gives_its_place_back(
    start_agent: Any,
    place: Path,
    tmp_path: Path,
    make_bundle: Any,
    tiny_parts: dict[str, Any],
    make_model: Any,
    parameters: dict[str, int],
    codes: set[int],
    reason: str,
) -> None:
    agent = start_agent(bundle=place)
    old, first_pid = ids(agent)
    files = make_model(tiny_parts, tmp_path)
    size = sum(path.stat().st_size for path in files.values())
    measured = msgspec.structs.replace(tiny_parts["manifest"]["measured"], size_bytes=size)
    more = {"files": files, "measured": measured, "promises": {"size_bytes": size}}
    new = make_bundle(place, version="1.1.0", **more).bundle_id
    client(agent).load_model("tiny")
    bad, bad_pid = ids(agent)
    assert bad == new and not memory_mapped(first_pid)

    seen: set[int] = set()

    def asked_again(_: Any) -> bool:
        seen.add(agent.infer("a strange film", **parameters)[0])
        return bool(agent.events("rolled_back"))

    agent.until(asked_again, limit_s=30)
    (back,) = agent.events("rolled_back")
    assert (back["from"], back["to"]) == (new, old) and reason in back["reason"], back
    assert seen <= codes
    agent.until(lambda _: not memory_mapped(bad_pid))
    assert ids(agent)[0] == old and agent.status()["models"]["tiny"]["probation"] is None
    assert agent.infer("a strange film")[1]["model_version"] == "1.0.0"
    copies = agent.config.parent / "state" / "bundles"
    agent.until(lambda _: [folder.name for folder in copies.iterdir()] == [old[:16]])
    assert agent.stop() == 0


def test_a_bundle_that_keeps_its_contract_stays(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent("[policy]\nprobation_s = 0.5", bundle=place)
    new = make_bundle(place, version="1.1.0").bundle_id
    with traffic(agent):
        client(agent).load_model("tiny")
        agent.until(lambda status: status["models"]["tiny"]["probation"] is None)
    copies = agent.config.parent / "state" / "bundles"
    agent.until(lambda _: [folder.name for folder in copies.iterdir()] == [new[:16]])
    assert ids(agent)[0] == new and agent.events("rolled_back") == []
    assert agent.stop() == 0


def test_a_load_does_not_keep_the_agent_from_stopping(start_agent: Any, place: Path) -> None:
    agent = start_agent(bundle=place)
    assert post(agent, "unload")[0] == 200
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(post, agent, "load")
        pid = agent.until(lambda status: status["models"].get("tiny", {}).get("worker_pid"))
        assert agent.stop() == 0
        status, document = loading.result()
    assert status == 503 and "the agent is stopping" in document["error"]
    assert not memory_mapped(pid)


def test_kserve_sees_a_model_come_and_go(start_agent: Any, place: Path) -> None:
    from kserve import InferenceRESTClient, RESTConfig

    agent = start_agent(bundle=place)

    async def ready() -> bool:
        rest = InferenceRESTClient(RESTConfig(protocol="v2"))
        answer: bool = await rest.is_model_ready(agent.url, "tiny")
        await rest.close()
        return answer

    assert asyncio.run(ready())
    assert post(agent, "unload") == (200, {"name": "tiny", "unload": True})
    assert not asyncio.run(ready())
    assert post(agent, "load")[0] == 200 and asyncio.run(ready())
    assert agent.stop() == 0
