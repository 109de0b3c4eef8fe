"""A real agent and real clouds: overflow, a cloud that is lost or comes later, budgets that hold over kills."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from quick_constants import UNREHEARSED
from swapping import client

from aios_edge.broker import start_broker
from aios_edge.mqtt import MqttListener

SLOW = "[emulate]\nslowdown = 250.0"  # a batch takes a tenth of a second or more
SLOWER = "[emulate]\nslowdown = 1000.0"  # four tenths: what is too short for it is long for a cloud on a busy machine


def test_overflow_goes_to_the_cloud_until_the_breaker_opens(start_agent: Any, small_batches: Path) -> None:
    cloud = start_agent(bundle=small_batches)
    device = start_agent(
        f'[[cloud]]\nname = "c"\nurl = "{cloud.url}"\n[policy]\nbreaker_backoff_s = 0.2\n{SLOW}',
        bundle=small_batches,
        constants=UNREHEARSED,
    )
    device.until(lambda status: status["cloud"]["c"]["models"]["tiny"]["usable"])
    unhurried = device.infer()[1]
    code, document, _ = device.infer(timeout=40_000)
    assert code == 200, document
    assert document["parameters"]["route"] == "cloud" and document["parameters"]["reason"] == "predicted_late"
    assert document["model_name"] == "tiny" and document["id"] == "7"
    assert document["outputs"] == unhurried["outputs"], "the same answer on every route"
    code, document, _ = device.infer(timeout=40_000, privacy="local-only")
    assert code == 503, "what must stay here stays here"

    cloud.process.kill()
    cloud.process.wait()
    codes = [device.infer(timeout=40_000)[0] for _ in range(6)]
    assert set(codes) <= {503, 504}
    (opened,) = device.events("breaker_opened")
    assert opened["endpoint"] == "c" and opened["failures"] == 3
    assert device.status()["cloud"]["c"]["breaker"] == "open"
    assert device.infer()[0] == 200
    assert device.stop() == 0


def test_a_spent_budget_keeps_requests_here_and_says_so(start_agent: Any, small_batches: Path) -> None:
    cloud = start_agent(bundle=small_batches)
    device = start_agent(
        f'[[cloud]]\nname = "c"\nurl = "{cloud.url}"\nrequests_per_day = 2\ncost_per_request = 0.5\n{SLOWER}',
        bundle=small_batches,
        constants=UNREHEARSED,
    )
    device.until(lambda status: status["cloud"]["c"]["models"]["tiny"]["usable"])
    end = time.monotonic() + 15  # on a busy machine the cloud is late too
    while (refused := device.infer(timeout=200_000))[1]["parameters"]["reason"] != "budget" and time.monotonic() < end:
        pass
    assert refused[0] == 503 and refused[1]["parameters"] == {"route": None, "reason": "budget"}
    assert device.infer()[1]["parameters"]["reason"] == "no_deadline", "the budget is the cause of nothing here"
    document = device.infer(timeout=200_000, privacy="local-only")[1]
    assert document["parameters"]["reason"] == "local_only"
    assert device.events("budget_exhausted") == [{"endpoint": "c", "budget": "requests"}]
    told = device.status()["cloud"]["c"]
    assert told["budgets"] == {"requests": {"per_day": 2.0, "left": 0.0}} and told["spent"]["cost"] == 1.0
    with urllib.request.urlopen(f"{device.url}/metrics") as page:
        text = page.read().decode()
    assert 'aios_cloud_requests_total{endpoint="c"} 2\n' in text
    assert 'aios_cloud_cost_total{endpoint="c"} 1.0\n' in text
    assert 'aios_cloud_budget_left{endpoint="c",budget="requests"} 0.0\n' in text
    assert (device.config.parent / "state" / "budgets.json").exists()
    assert sum(cloud.status()["totals"].values()) <= 2
    assert device.stop() == 0


def test_the_broker_hears_what_the_cloud_was_sent_and_how_a_trial_goes(
    start_agent: Any, small_batches: Path, make_bundle: Any, tmp_path: Path
) -> None:
    cloud, place = start_agent(bundle=small_batches), make_bundle(tmp_path / "bundle", max_batch_size=1).path
    with start_broker() as broker, contextlib.closing(MqttListener(broker.url, "aios/v1/+/+/telemetry")) as listener:
        device = start_agent(
            f'[[cloud]]\nname = "c"\nurl = "{cloud.url}"\nrequests_per_day = 5\ncost_per_request = 0.5\n'
            f'[mqtt]\nurl = "{broker.url}"\ninterval_s = 0.1\n[policy]\nshadow_share = 0.5\n{SLOWER}',
            bundle=place,
            constants=UNREHEARSED,
        )
        device.until(lambda status: status["cloud"]["c"]["models"]["tiny"]["usable"])
        make_bundle(place, version="1.1.0", max_batch_size=1)
        client(device).load_model("tiny")
        device.until(
            lambda _: device.infer(timeout=200_000) and device.status()["cloud"]["c"]["spent"]["received_bytes"]
        )
        spent = device.status()["cloud"]["c"]["spent"]
        figures: dict[str, Any] = {}
        for message in listener.messages(timeout_s=10.0):
            told = json.loads(message.payload)
            figures = told["cloud"].get("c", {})
            if told["trials"] and {**figures, **spent} == figures:
                break
        left = {"requests": {"per_day": 5.0, "left": 5.0 - spent["requests"]}}
        assert figures == {**spent, "budgets": left} and figures["cost"] == 0.5 * spent["requests"] > 0
        trial = told["trials"]["tiny"]
        assert (trial["phase"], trial["successor"], trial["of_answers"]) == ("shadow", "1.1.0", 200)
        assert device.stop() == 0


def test_a_cloud_that_swaps_its_bundle_is_not_believed_under_the_old_ones_name(
    start_agent: Any, small_batches: Path, make_bundle: Any, tmp_path: Path
) -> None:
    place = make_bundle(tmp_path / "bundle", max_batch_size=1).path
    cloud = start_agent(bundle=place)
    endpoint = f'[[cloud]]\nname = "c"\nurl = "{cloud.url}"\n'
    device = start_agent(endpoint + SLOWER, bundle=small_batches, constants=UNREHEARSED)
    device.until(lambda status: status["cloud"]["c"]["models"]["tiny"]["usable"])

    def label() -> str | None:
        """Of an answer that the cloud gave; None where it gave none."""
        code, document, _ = device.infer(timeout=200_000)
        assert code in (200, 503, 504), document
        return document["outputs"][0]["data"][0] if code == 200 else None

    device.until(lambda _: label() == "positive")
    make_bundle(place, version="1.1.0", max_batch_size=1)
    client(cloud).load_model("tiny")
    device.until(lambda _: label() == "positive")
    assert cloud.status()["models"]["tiny"]["version"] == "1.1.0"
    make_bundle(place, version="1.2.0", max_batch_size=1, labels=("positive", "negative"))
    client(cloud).load_model("tiny")
    device.until(lambda status: label() in (None, "positive") and not status["cloud"]["c"]["models"]["tiny"]["usable"])
    assert "its labels are positive, negative" in device.status()["cloud"]["c"]["models"]["tiny"]["reason"]
    assert device.events("breaker_opened") == [] and device.stop() == 0


@pytest.mark.long
def test_kills_in_a_row_do_not_fill_a_budget(start_agent: Any, small_batches: Path) -> None:
    cloud = start_agent(bundle=small_batches)
    device = start_agent(
        f'[[cloud]]\nname = "c"\nurl = "{cloud.url}"\nrequests_per_day = 3\n{SLOWER}',
        bundle=small_batches,
        constants=UNREHEARSED,
    )
    asked = []
    for _ in range(2):
        device.until(lambda status: status["cloud"]["c"]["models"]["tiny"]["usable"])
        end = time.monotonic() + 10
        while device.status()["cloud"]["c"]["spent"]["requests"] < 2 and time.monotonic() < end:
            reason = device.infer(timeout=200_000)[1]["parameters"]["reason"]
            if reason == "budget":
                break
        asked.append(device.status()["cloud"]["c"]["spent"]["requests"])
        device.process.kill()
        device.process.wait()
        device = start_agent(again=device, constants=UNREHEARSED)
    assert asked == [2, 1] and device.status()["cloud"]["c"]["budgets"]["requests"]["left"] == 0
    assert sum(cloud.status()["totals"].values()) <= 3
    assert device.stop() == 0


def test_a_cloud_that_comes_later_is_found_and_one_that_does_not_fit_is_not_used(
    start_agent: Any, make_bundle: Any
) -> None:
    other = start_agent(bundle=make_bundle(labels=("positive", "negative")).path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        device = start_agent(
            f'[[cloud]]\nname = "misfit"\nurl = "{other.url}"\n'
            f'[[cloud]]\nname = "away"\nurl = "http://127.0.0.1:{closed.getsockname()[1]}"\n'
        )
        device.until(lambda status: "labels" in (status["cloud"]["misfit"]["models"]["tiny"]["reason"] or ""))
        device.until(lambda status: "connect" in (status["cloud"]["away"]["models"]["tiny"]["reason"] or ""))
        port = closed.getsockname()[1]
    later = start_agent(bind=f"127.0.0.1:{port}")
    device.until(lambda status: status["cloud"]["away"]["models"]["tiny"]["usable"])
    assert not device.status()["cloud"]["misfit"]["models"]["tiny"]["usable"]
    assert {event["endpoint"] for event in device.events("cloud_mismatch")} == {"misfit"}
    for agent in (device, later, other):
        assert agent.stop() == 0
