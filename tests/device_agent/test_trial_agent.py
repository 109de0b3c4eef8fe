"""A real agent tries a bundle on part of its clients' requests before it takes over."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from swapping import CLIENTS, client, failing_model, ids, memory_mapped, post, slow_model, traffic

SHADOW = "[policy]\nshadow_share = 1.0\ntrial_requests = 40\n"
CANARY = "[policy]\ncanary_share = 0.5\ntrial_requests = 40\n"
OLD, NEW = ("1.0.0", b"positive"), ("1.1.0", b"positive")
TURNED = ("positive", "negative")  # each text gets the other label


@pytest.fixture
def place(tmp_path: Path, make_bundle: Any) -> Path:
    """Where agent.toml's bundle lies; version 1.0.0 at first."""
    path: Path = make_bundle(tmp_path / "bundle").path
    return path


@pytest.fixture
def broken(place: Path, tmp_path: Path, make_bundle: Any, tiny_parts: dict[str, Any]) -> Callable[[Any], str]:
    """Puts version 1.1.0 there with another model; its id."""

    def put(make_model: Any) -> str:
        files = make_model(tiny_parts, tmp_path)
        size = sum(path.stat().st_size for path in files.values())
        measured = msgspec.structs.replace(tiny_parts["manifest"]["measured"], size_bytes=size)
        more = {"files": files, "measured": measured, "promises": {"size_bytes": size}}
        bundle_id: str = make_bundle(place, version="1.1.0", **more).bundle_id
        return bundle_id

    return put


def trial(agent: Any) -> Any:
    return agent.status()["models"]["tiny"]["trial"]


def trial_pid(agent: Any) -> int:
    """The worker of the bundle on trial: the other child of the agent that is a worker."""
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if int(pid) != ids(agent)[1])


def test_copies_are_compared_and_then_it_takes_over(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent(SHADOW, bundle=place)
    old = ids(agent)
    new = make_bundle(place, version="1.1.0").bundle_id
    client(agent).load_model("tiny")
    assert ids(agent) == old
    begun = trial(agent)
    assert (begun["phase"], begun["successor"], begun["answers"], begun["of_answers"]) == ("shadow", "1.1.0", 0, 40)
    client(agent).load_model("tiny")
    assert len(agent.events("trial_began")) == 1, "it is on trial already"
    with traffic(agent) as seen:
        agent.until(lambda _: agent.events("swapped"), limit_s=30)
        of_old = seen[OLD]
    assert set(seen) == {OLD, NEW} and seen[OLD] - of_old <= CLIENTS and of_old >= 40
    (passed,) = agent.events("trial_passed")
    assert passed["answers"] >= 40 and passed["compared"] == passed["answers"] and passed["disagreed"] == 0
    assert (passed["from"], passed["to"], passed["phase"]) == (old[0], new, "shadow")
    agent.until(lambda _: not memory_mapped(old[1]))
    agent.until(lambda status: status["models"]["tiny"]["probation"])
    assert ids(agent)[0] == new and trial(agent) is None and agent.events("rolled_back") == []
    assert agent.stop() == 0


def test_what_it_would_have_answered_otherwise_keeps_it_away(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent(SHADOW, bundle=place)
    old = ids(agent)
    new = make_bundle(place, version="1.1.0", labels=TURNED).bundle_id
    client(agent).load_model("tiny")
    pid = trial_pid(agent)
    with traffic(agent) as seen:
        agent.until(lambda _: agent.events("trial_failed"), limit_s=30)
    assert set(seen) == {OLD}, "nobody heard it"
    (failed,) = agent.events("trial_failed")
    assert "disagreement: " in failed["reason"] and failed["disagreed"] == failed["compared"] >= 5
    assert failed["to"] == new and failed["answers"] < 40, "it needn't be tried to the end"
    agent.until(lambda _: not memory_mapped(pid))
    assert ids(agent) == old and trial(agent) is None and agent.events("swapped") == []
    copies = agent.config.parent / "state" / "bundles"
    agent.until(lambda _: [folder.name for folder in copies.iterdir()] == [old[0][:16]])
    assert set(agent.status()["totals"]) == {"local"}
    assert agent.stop() == 0


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [(failing_model, "error rate"), (slow_model, "p95 of compute time")],
    ids=["fails", "slow"],
)
def test_a_bundle_that_fails_or_is_slow_is_dropped_before_a_client_hears_of_it(
    start_agent: Any, place: Path, broken: Callable[[Any], str], make_model: Any, reason: str
) -> None:
    agent = start_agent(SHADOW, bundle=place)
    old, new = ids(agent), broken(make_model)
    client(agent).load_model("tiny")
    with traffic(agent, "a strange film") as seen:
        agent.until(lambda _: agent.events("trial_failed"), limit_s=30)
    assert {version for version, _ in seen} == {"1.0.0"}
    (failed,) = agent.events("trial_failed")
    assert reason in failed["reason"] and failed["to"] == new and failed["phase"] == "shadow"
    assert ids(agent) == old and agent.events("swapped") == []
    assert agent.stop() == 0


def test_a_share_of_the_requests_is_really_answered_by_it(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent(CANARY, bundle=place)
    old = ids(agent)
    make_bundle(place, version="1.1.0")
    client(agent).load_model("tiny")
    assert trial(agent)["phase"] == "canary"
    named = urllib.request.Request(
        f"{agent.url}/v2/models/tiny/versions/1.0.0/infer",
        b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a good film"]}]}',
    )
    for _ in range(8):
        with urllib.request.urlopen(named, timeout=30) as response:
            assert json.loads(response.read())["model_version"] == "1.0.0", "who names a version gets it"
    assert trial(agent)["answers"] == 0
    with traffic(agent) as seen:
        agent.until(lambda _: agent.events("swapped"), limit_s=30)
        of_old = seen[OLD]
    assert set(seen) == {OLD, NEW} and of_old >= 10
    (passed,) = agent.events("trial_passed")
    assert passed["answers"] >= 40 and passed["compared"] == 0 and passed["failures"] == 0
    agent.until(lambda _: not memory_mapped(old[1]))
    assert agent.stop() == 0


def test_a_share_that_fails_ends_it(start_agent: Any, place: Path, broken: Callable[[Any], str]) -> None:
    agent = start_agent(CANARY.replace("40", "4000"), bundle=place)
    old = ids(agent)
    broken(failing_model)
    client(agent).load_model("tiny")
    pid = trial_pid(agent)
    seen: list[tuple[int, str | None]] = []

    def asked_again(_: Any) -> bool:
        status, document, _ = agent.infer("a strange film")
        seen.append((status, document.get("model_version")))
        return bool(agent.events("trial_failed"))

    agent.until(asked_again, limit_s=30)
    assert {(500, None)} <= set(seen) <= {(200, "1.0.0"), (500, None)}
    (failed,) = agent.events("trial_failed")
    assert "error rate" in failed["reason"] and failed["failures"] >= 5 and failed["current_failures"] == 0
    agent.until(lambda _: not memory_mapped(pid))
    assert ids(agent) == old and agent.infer("a strange film")[0] == 200
    assert agent.stop() == 0


def test_copies_first_then_a_share_and_without_traffic_after_its_time(
    start_agent: Any, place: Path, make_bundle: Any
) -> None:
    agent = start_agent("[policy]\nshadow_share = 1.0\ncanary_share = 0.1\ntrial_s = 0.3", bundle=place)
    old, new = ids(agent)[0], make_bundle(place, version="1.1.0").bundle_id
    client(agent).load_model("tiny")
    assert agent.until(lambda _: agent.events("swapped"))[0]["to"] == new
    (passed,) = agent.events("trial_passed")
    assert passed["phase"] == "canary" and passed["answers"] == 0 and passed["from"] == old
    assert agent.infer()[1]["model_version"] == "1.1.0"
    assert agent.stop() == 0


def test_a_trial_is_called_off_by_what_comes_next(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent(SHADOW, bundle=place)
    old = ids(agent)
    make_bundle(place, version="1.1.0")
    client(agent).load_model("tiny")
    first = trial_pid(agent)
    make_bundle(place, version="1.2.0")
    client(agent).load_model("tiny")
    assert trial(agent)["successor"] == "1.2.0" and not memory_mapped(first)
    make_bundle(place)
    client(agent).load_model("tiny")
    assert trial(agent) is None and ids(agent) == old, "the bundle that serves was put back"
    make_bundle(place, version="1.3.0")
    client(agent).load_model("tiny")
    third = trial_pid(agent)
    assert post(agent, "unload")[0] == 200 and not memory_mapped(third) and not memory_mapped(old[1])
    assert [event["to_version"] for event in agent.events("trial_called_off")] == ["1.1.0", "1.2.0", "1.3.0"]
    assert post(agent, "load")[0] == 200 and agent.infer()[1]["model_version"] == "1.3.0", "nobody it could be held to"
    make_bundle(place, version="1.4.0")
    client(agent).load_model("tiny")
    pid = trial_pid(agent)
    assert agent.stop() == 0 and not memory_mapped(pid)


def test_a_raw_model_has_no_labels_and_is_tried_for_its_errors_all_the_same(start_agent: Any, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    def version(number: int, node: Any) -> None:
        ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"])] for name in ("x", "y")]
        graph = helper.make_graph([node], "g", *ends)
        folder = tmp_path / "raw" / str(number)
        folder.mkdir(parents=True)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save_model(made, folder / "model.onnx")

    version(1, helper.make_node("Identity", ["x"], ["y"]))
    agent = start_agent(f'[repository]\npath = "{tmp_path}"\n[policy]\nshadow_share = 1.0\ntrial_requests = 5')
    body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]}]}'

    def asked() -> str:
        request = urllib.request.Request(f"{agent.url}/v2/models/raw/infer", body)
        with urllib.request.urlopen(request, timeout=30) as response:
            answered: str = json.loads(response.read())["model_version"]
        return answered

    version(2, helper.make_node("Neg", ["x"], ["y"]))
    client(agent).load_model("raw")
    agent.until(lambda _: asked() == "2")
    (passed,) = agent.events("trial_passed")
    assert passed["answers"] >= 5 and passed["compared"] == 0 and passed["failures"] == 0
    assert agent.status()["models"]["raw"]["rejected"] is None and agent.stop() == 0
