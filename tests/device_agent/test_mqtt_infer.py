"""Inference over MQTT: a real agent, a real broker, and clients that know nothing of either."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mqtt_asker import BASE, WAIT_S, Asker, request, user
from quick_constants import UNREHEARSED

from aios_edge.broker import Broker, start_broker

JSON_LENGTH = "inference-header-content-length"
REPLY = "line-3/answers"
RESULT = f"{BASE}/infer/tiny/result"
PATIENT = {"parameters": {"timeout": 10**13}}  # of those without a deadline only as many wait as are soon served


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with start_broker() as broker:
        yield broker


def serving(start_agent: Any, url: str, more: str = "", mqtt: str = "", **options: Any) -> Any:
    agent = start_agent(f'[mqtt]\nurl = "{url}"\ninfer = true\ninterval_s = 0.2\n{mqtt}\n{more}', **options)
    agent.until(lambda status: status["mqtt_infer"]["link"]["subscriptions"] == 1)
    return agent


@pytest.fixture
def own_broker() -> Iterator[Broker]:
    """For another agent of the same name."""
    with start_broker() as broker:
        yield broker


@pytest.fixture(scope="module")
def agent(start_agent: Any, broker: Broker) -> Iterator[Any]:
    agent = serving(start_agent, broker.url, http="max_body_bytes = 100000")
    yield agent
    assert agent.stop() == 0
    assert "Traceback" not in agent.log()


@pytest.fixture
def asker(broker: Broker, agent: Any) -> Iterator[Asker]:
    with Asker(broker.url, f"{REPLY}/#", f"{BASE}/infer/+/result/#") as asker:
        yield asker


def figures(agent: Any) -> dict[str, int]:
    found: dict[str, int] = agent.status()["mqtt_infer"]
    return found


def test_an_answer_goes_to_the_response_topic_with_the_correlation_data(agent: Any, asker: Asker) -> None:
    for qos in (0, 1, 2):
        asker.ask(request("a good film", id="q"), qos=qos, ResponseTopic=REPLY, CorrelationData=b"\0\xff7")
        message = asker.next()
        assert (message.topic, message.qos, message.retain) == (REPLY, min(qos, 1), False)
        assert message.properties.CorrelationData == b"\0\xff7"
        assert message.properties.ContentType == "application/json" and user(message) == {"status": "200"}
        document = json.loads(message.payload)
        assert document["id"] == "q" and document["parameters"]["route"] == "local"
    asker.ask(request("a good film"))
    message = asker.next()
    assert message.topic == RESULT and not hasattr(message.properties, "CorrelationData")


def over_http(agent: Any, model: str, body: bytes, json_length: int | None = None) -> tuple[bytes, str | None]:
    asked = urllib.request.Request(f"{agent.url}/v2/models/{model}/infer", body, method="POST")
    if json_length is not None:
        asked.add_header(JSON_LENGTH, str(json_length))
    with urllib.request.urlopen(asked, timeout=30) as response:
        return response.read(), response.headers[JSON_LENGTH]


def binary(text: str) -> tuple[bytes, int]:
    data = len(text.encode()).to_bytes(4, "little") + text.encode()
    head = {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}],
        "parameters": {"binary_data_output": True},
    }
    packed = json.dumps(head).encode()
    return packed + data, len(packed)


def outputs(body: bytes, json_length: str | None) -> tuple[Any, bytes]:
    length = len(body) if json_length is None else int(json_length)
    return json.loads(body[:length])["outputs"], body[length:]


def test_five_hundred_answers_are_those_of_the_http_door(agent: Any, asker: Asker, words: tuple[str, ...]) -> None:
    """One after the other: who shares a batch may differ in the last bit. Every other one in binary, both ways."""
    several = [*words, '"', "\\", "\t"]
    for number in range(500):
        text = " ".join(several[(number * place + place) % len(several)] for place in range(1, 2 + number % 37))
        body, length = binary(text) if number % 2 else (json.dumps(request(text)).encode(), None)
        properties: dict[str, Any] = {} if length is None else {"UserProperty": (JSON_LENGTH, str(length))}
        asker.ask(body, ResponseTopic=REPLY, CorrelationData=str(number).encode(), **properties)
        message = asker.next()
        assert message.properties.CorrelationData == str(number).encode()
        json_length = user(message).get(JSON_LENGTH)
        assert (json_length is None) is (length is None)
        assert outputs(message.payload, json_length) == outputs(*over_http(agent, "tiny", body, length)), text


@pytest.mark.parametrize("kind", ["mosquitto", "amqtt"])
def test_without_mqtt_5_the_id_tells_whose_answer_it_is(start_agent: Any, kind: Any) -> None:
    with start_broker(kind) as broker:
        agent = serving(start_agent, broker.url, mqtt='protocol = "3.1.1"')
        assert figures(agent)["link"]["protocol"] == "3.1.1"  # type: ignore[index]
        with Asker(broker.url, RESULT, version="3.1.1") as asker:
            for number in range(20):
                asker.ask(request("a good film", id=f"q{number}"))
            assert {asker.answer()["id"] for _ in range(20)} == {f"q{number}" for number in range(20)}
            asker.ask(request("a good film", id="late", parameters={"timeout": 1, "privacy": "local-only"}))
            refused = asker.answer()
            assert refused["id"] == "late" and "error" in refused and refused["parameters"]["route"] is None
            asker.ask(request("a good film", id="b", parameters={"binary_data_output": True}))
            refused = asker.answer()
            assert refused["id"] == "b" and "Ask for JSON" in refused["error"]
        assert agent.stop() == 0


REFUSED: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "no JSON": (b"{", {}, "400", "truncated"),
    "empty": (b"", {}, "400", "empty"),
    "nested": (b'{"id":' * 5000, {}, "400", ""),
    "parameter": (request("x", id="q", parameters={"timout": 5}), {}, "400", "Did you mean 'timeout'?"),
    "no model": (request("x", id="q"), {"model": "none"}, "404", "Models here: tiny"),
    "forbidden characters": (request("x", id="q"), {"model": "a%2Fb%2B%23%00"}, "404", "'a/b+#\\x00'"),
    "no name": (request("x", id="q"), {"topic": f"{BASE}/infer/"}, "404", "''"),
    "too long": (request("x" * 100_000, id="q"), {}, "413", "max_body_bytes"),
    "rows": (request(*"x" * 5000, id="q"), {}, "413", "max_rows"),
    "a length that is none": (request("x"), {"UserProperty": (JSON_LENGTH, "-1")}, "400", "not a length"),
    "a length beyond": (request("x"), {"UserProperty": (JSON_LENGTH.upper(), "9999")}, "400", "between 0"),
    "two lengths": (request("x"), {"UserProperty": [(JSON_LENGTH, "1"), (JSON_LENGTH, "2")]}, "400", "more than once"),
    "expired": (request("x", id="q", parameters={"timeout": 1}), {"MessageExpiryInterval": 60}, "504", "deadline"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_a_document_at_the_response_topic(agent: Any, asker: Asker, case: str) -> None:
    body, more, status, says = REFUSED[case]
    asker.ask(body, ResponseTopic=REPLY, CorrelationData=b"7", **more)
    message = asker.next()
    document = json.loads(message.payload)
    assert message.topic == REPLY and message.properties.CorrelationData == b"7"
    assert user(message)["status"] == status and says in document["error"], document
    assert document.get("id") == ("q" if isinstance(body, dict) and "id" in body and case != "too long" else None)
    asker.ask(request("a good film"))
    assert "outputs" in asker.answer()


@pytest.mark.parametrize(
    "topic",
    [
        f"{BASE}/infer/tiny",
        f"{BASE}/infer/other",
        f"{BASE}/status",
        f"{BASE}/infer/other/result",
        "aios/v1/default/another/infer/tiny",
        "aios/v1/default/another/cmd",
        "$SYS/broker",
    ],
)
def test_a_response_topic_that_would_speak_for_a_device_or_ask_one_is_refused(
    agent: Any, asker: Asker, topic: str, broker: Broker
) -> None:
    asked = figures(agent)["asked"]
    with Asker(broker.url, "aios/#") as all_of_it:
        asker.ask(request("a good film"), ResponseTopic=topic, CorrelationData=b"7")
        message = asker.next()
        assert message.topic == RESULT and message.properties.CorrelationData == b"7"
        assert "response topic" in json.loads(message.payload)["error"] and user(message)["status"] == "400"
        asker.ask(request("a good film"), ResponseTopic=f"{RESULT}/client-7")
        assert asker.next().topic == f"{RESULT}/client-7"
        assert figures(agent)["asked"] == asked + 2, "no answer was taken for a question"
        heard = [all_of_it.next().topic for _ in range(3)]
        assert topic not in set(heard) - {f"{BASE}/infer/tiny", f"{BASE}/status"}


def test_a_model_with_a_name_in_percents_is_the_same_model(agent: Any, asker: Asker) -> None:
    asker.ask(request("a good film"), model="t%69ny", ResponseTopic=REPLY)
    assert asker.answer()["model_name"] == "tiny"


def test_what_is_no_topic_of_ours_is_nobodys(agent: Any, asker: Asker) -> None:
    before = figures(agent)["asked"]
    for topic in (f"{BASE}/infer", f"{BASE}/infer/tiny/versions/1.0.0", f"{BASE}/infer/tiny/result", f"{BASE}/tiny"):
        asker.ask(request("a good film"), topic=topic, ResponseTopic=REPLY)
    asker.ask(request("a good film", id="last"), ResponseTopic=REPLY)
    while (message := asker.next()).topic != REPLY:  # our own word at the result topic
        pass
    assert json.loads(message.payload)["id"] == "last" and figures(agent)["asked"] == before + 1


def test_the_messages_expiry_is_a_deadline(start_agent: Any, small_batches: Any, own_broker: Broker) -> None:
    agent = serving(
        start_agent, own_broker.url, "[emulate]\nslowdown = 400.0", bundle=small_batches, constants=UNREHEARSED
    )
    with Asker(own_broker.url, REPLY) as asker:
        for _ in range(3):  # now it knows how slow it is
            asker.ask(request("a good film"), ResponseTopic=REPLY)
        for _ in range(3):
            assert "outputs" in asker.answer()
        for _ in range(30):
            asker.ask(request("a good film"), ResponseTopic=REPLY, MessageExpiryInterval=1)
        answers = [asker.next() for _ in range(30)]
        assert {user(message)["status"] for message in answers} <= {"200", "503", "504"}
        refused = [message for message in answers if user(message)["status"] != "200"]
        assert refused, "a second isn't enough for thirty"
        reasons = {json.loads(message.payload)["parameters"]["reason"] for message in refused}
        assert reasons <= {"cloud_unavailable", "deadline_passed"}
        assert all(message.properties.MessageExpiryInterval <= 1 for message in answers)
    assert agent.stop() == 0


def test_a_retained_request_is_not_asked_again_at_every_connection(start_agent: Any) -> None:
    with start_broker() as broker:
        agent = serving(start_agent, broker.url, mqtt='protocol = "3.1.1"')
        with Asker(broker.url, RESULT, version="3.1.1") as asker:
            asker.ask(request("a good film", id="kept"), retain=True)
            assert asker.answer()["id"] == "kept", "who was there took it for a message like any other"
            assert agent.stop() == 0
            agent = start_agent(again=agent)
            agent.until(lambda status: status["mqtt_infer"]["ignored"] == 1)
            asker.ask(request("a good film", id="new"))
            assert asker.answer()["id"] == "new" and figures(agent)["asked"] == 1
        assert agent.stop() == 0


def test_a_flood_is_refused_at_once_and_takes_no_memory(
    start_agent: Any, small_batches: Any, own_broker: Broker
) -> None:
    """Three thousand requests of 20 kB for a device that answers a few in a second; what the broker itself drops of
    them, nobody here can answer."""
    agent = serving(
        start_agent,
        own_broker.url,
        "[emulate]\nslowdown = 400.0\n[policy]\nqueue_limit = 1000",
        bundle=small_batches,
        constants=UNREHEARSED,
    )
    body = request("a good film " + "x" * 20_000, **PATIENT)
    before = resident_bytes(agent.process.pid)
    count = 3000
    with Asker(own_broker.url, REPLY) as asker:
        for _ in range(count):
            asker.ask(body, qos=0, ResponseTopic=REPLY)
        agent.until(lambda status: status["mqtt_infer"]["shed"] > 100)
        seen: list[int] = []

        def taken_in(status: Any) -> bool:
            seen.append(status["mqtt_infer"]["asked"])
            return len(seen) > 50 and seen[-1] == seen[-50]

        agent.until(taken_in, limit_s=60.0)  # else the broker may drop the urgent one with the rest of the flood
        most = figures(agent)["in_flight"]
        assert most <= 256
        assert agent.infer("a good film", timeout=1)[0] in (503, 504), "the other door is open"
        urgent = request("a good film", parameters={"priority": 1, **PATIENT["parameters"]})
        asker.ask(urgent, ResponseTopic=REPLY, CorrelationData=b"last")
        codes: list[str] = []
        while True:
            message = asker.next()
            codes.append(user(message)["status"])
            if getattr(message.properties, "CorrelationData", None) == b"last":
                break
            if codes[-1] == "503":
                assert json.loads(message.payload)["parameters"]["reason"] == "queue_full"
                assert user(message)["retry-after"] == "1"
        assert codes.count("503") > 100
    assert resident_bytes(agent.process.pid) - before < 40_000_000, "256 of these are 5 MB"
    agent.process.kill()


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_answer_waits_for_the_broker_and_what_is_lost_is_counted(
    start_agent: Any, small_batches: Any, own_broker: Broker
) -> None:
    """Two that are being answered when the broker goes: of QoS 1 the answer comes when it is back, of QoS 0 it is
    lost; of QoS 1 whose asker waits no more, too."""
    first = own_broker
    agent = serving(start_agent, first.url, "[emulate]\nslowdown = 1500.0", bundle=small_batches, constants=UNREHEARSED)
    with Asker(first.url) as asker:
        asker.ask(request("one", id="kept"), qos=1)
        asker.ask(request("two", id="lost"), qos=0)
        asker.ask(request("three", id="late", parameters={"timeout": 50_000, "privacy": "local-only"}), qos=1)
        agent.until(lambda status: status["mqtt_infer"]["asked"] == 3 and status["mqtt_infer"]["in_flight"] >= 2)
        first.stop()
    agent.until(lambda status: status["mqtt_infer"]["in_flight"] == 0)
    assert figures(agent)["waiting"] >= 1
    with start_broker(port=first.port) as second, Asker(second.url, RESULT) as listener:
        assert listener.answer()["id"] == "kept"
        status = agent.until(lambda status: not status["mqtt_infer"]["waiting"] and status)
        assert status["mqtt_infer"]["lost"] >= 1 and status["mqtt_infer"]["lost_reason"]
        with Asker(second.url, f"{BASE}/telemetry") as reports:
            while (told := reports.answer())["mqtt_infer"]["lost"] != status["mqtt_infer"]["lost"]:
                pass  # windows of before
        assert told["policy"]["digest"] == status["policy"]["digest"]
        page = urllib.request.urlopen(agent.url + "/metrics", timeout=10).read().decode()
        assert f'aios_mqtt_infer_total{{outcome="lost"}} {status["mqtt_infer"]["lost"]}' in page
        assert listener.heard.empty(), "what nobody waits for any more isn't sent"
        assert agent.stop() == 0


def test_an_answer_the_broker_refuses_is_told_in_a_shorter_one(start_agent: Any) -> None:
    with start_broker("mosquitto", extra="allow_anonymous true\nmax_packet_size 2000\n") as broker:
        agent = serving(start_agent, broker.url)
        with Asker(broker.url, REPLY) as asker:
            asker.ask(request(*"x" * 100, id="q"), ResponseTopic=REPLY)
            message = asker.next()
            assert user(message)["status"] == "413"
            assert json.loads(message.payload)["id"] == "q"
            assert "2000 bytes" in json.loads(message.payload)["error"]
        assert figures(agent)["lost"] == 1 and agent.status()["mqtt_infer"]["link"]["connected"]
        assert agent.stop() == 0


def test_who_waits_when_the_agent_stops_is_answered(start_agent: Any, small_batches: Any, own_broker: Broker) -> None:
    agent = serving(
        start_agent, own_broker.url, "[emulate]\nslowdown = 400.0", bundle=small_batches, constants=UNREHEARSED
    )
    with Asker(own_broker.url, REPLY) as asker:
        for number in range(8):
            asker.ask(request("a good film", id=str(number), **PATIENT), ResponseTopic=REPLY)
        agent.until(lambda status: status["mqtt_infer"]["in_flight"] >= 6)
        assert agent.stop() == 0
        answers = [asker.answer() for _ in range(8)]
        assert {answer["id"] for answer in answers} == set(map(str, range(8)))
        assert all("outputs" in answer for answer in answers)


def test_nobody_may_ask_unless_it_is_said(start_agent: Any, own_broker: Broker) -> None:
    agent = start_agent(f'[mqtt]\nurl = "{own_broker.url}"\n')
    assert agent.status()["mqtt_infer"] is None
    assert agent.stop() == 0


def test_a_subscription_that_is_refused_is_said(start_agent: Any) -> None:
    """By a broker that welcomes everybody and grants nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(connection: socket.socket) -> None:
            with connection:
                connection.recv(4096)
                connection.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK
                data = connection.recv(4096)
                if data[0] == 0x82:  # SUBSCRIBE; its packet id goes back
                    connection.sendall(b"\x90\x04" + data[2:4] + b"\x00\x87")
                while connection.recv(4096):
                    pass

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        agent = start_agent(f'[mqtt]\nurl = "mqtt://127.0.0.1:{server.getsockname()[1]}"\ninfer = true\n')
        link = agent.until(lambda status: (link := status["mqtt_infer"]["link"])["reason"] and link)
        assert link["connected"] and link["reason"] == "subscription refused: Not authorized"
        assert "nobody is answered over MQTT: subscription refused" in agent.log()
        agent.process.kill()


def test_a_tenant_speaks_over_mqtt_within_what_is_its(start_agent: Any, make_bundle: Any, own_broker: Broker) -> None:
    from device_agent.tenants import key_sha256, new_key

    key = new_key()
    agent = start_agent(
        f'[[bundle]]\npath = "{make_bundle(name="secret").path}"\n'
        f'[mqtt]\nurl = "{own_broker.url}"\ninfer = true\ninfer_tenant = "field"\n'
        f'[[tenant]]\nid = "admin"\nkey_sha256 = "{key_sha256(key)}"\nadmin = true\n'
        '[[tenant]]\nid = "field"\nmodels = ["tiny"]\npriority_ceiling = 5\nbytes_per_day = 3000\n'
    )
    asked = urllib.request.Request(agent.url + "/status", headers={"Authorization": f"Bearer {key}"})

    def status() -> Any:
        with urllib.request.urlopen(asked, timeout=10) as response:
            return json.loads(response.read())

    end = time.monotonic() + WAIT_S
    while not status()["mqtt_infer"]["link"]["subscriptions"]:
        assert time.monotonic() < end
    with Asker(own_broker.url, REPLY) as asker:
        asker.ask(request("a good film", id="a", parameters={"priority": 1}), ResponseTopic=REPLY)
        document = asker.answer()
        assert document["parameters"]["priority"] == 5, "the ceiling holds"
        asker.ask(request("a good film"), model="secret", ResponseTopic=REPLY)
        error = asker.answer()["error"]
        asker.ask(request("a good film"), model="nobody", ResponseTopic=REPLY)
        assert asker.answer()["error"].replace("nobody", "secret") == error, "another's model is no model"
        asker.ask(request("x" * 4000), ResponseTopic=REPLY)
        message = asker.next()
        assert user(message)["status"] == "413" and "bytes_per_day" in json.loads(message.payload)["error"]
    assert agent.stop() == 0
    lines = [json.loads(line) for line in (agent.config.parent / "state/audit/field.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines} == {"PUBLISH"} and lines[0]["path"] == f"{BASE}/infer/tiny"
    assert [line["status"] for line in lines[-3:]] == [404, 404, 413] and lines[0]["route"] == "local"
    assert lines[-1]["reason"] == "bytes_per_day"


def test_a_request_that_may_not_leave_stays(start_agent: Any, recording_cloud: Any, own_broker: Broker) -> None:
    secret = "a film nobody may read"
    recording_cloud.answer = lambda: (200, json.dumps({"model_name": "tiny", "outputs": []}).encode())
    cloud = f'[policy]\nmin_confidence = 1.0\n[[cloud]]\nname = "c"\nurl = "{recording_cloud.url}"'
    agent = serving(start_agent, own_broker.url, cloud)
    agent.until(lambda status: status["cloud"]["c"]["models"]["tiny"]["usable"])
    with Asker(own_broker.url, REPLY) as asker:
        for text, more, reason in (("open", {}, "low_confidence"), (secret, {"privacy": "local-only"}, "local_only")):
            asker.ask(request(text, id=text, parameters=more), ResponseTopic=REPLY, MessageExpiryInterval=8)
            document = asker.answer()
            assert (document["id"], document["parameters"]["reason"]) == (text, reason), document
    assert b"open" in recording_cloud.received and secret.encode() not in recording_cloud.received
    (post,) = recording_cloud.posts
    assert 0 < json.loads(post)["parameters"]["timeout"] < 8_000_000, "what is left of the message's time goes along"
    assert agent.stop() == 0


@pytest.mark.skipif(shutil.which("mosquitto_rr") is None, reason="mosquitto_rr isn't installed")
def test_the_line_in_the_document_works(agent: Any, broker: Broker) -> None:
    text = (Path(__file__).parents[2] / "docs" / "agent.md").read_text(encoding="utf-8")
    lines = [block for block in text.split("```")[1::2] if "mosquitto_rr" in block]
    commands = [line for line in lines[0].removeprefix("sh\n").replace("\\\n", "").splitlines() if line.strip()]
    assert len(commands) == 2
    for command in commands:
        command = command.replace("plant-a/gateway-7", "default/dev").replace("my-model", "tiny")
        command = command.replace("mosquitto_rr", f"mosquitto_rr -p {broker.port} -W 20")
        result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, result
        assert json.loads(result.stdout)["outputs"][0]["name"] == "label", result.stdout


def asking_settings(tmp_path: Any, agent_toml: Callable[..., str], more: str) -> Any:
    from device_agent.settings import parse_settings

    return parse_settings(agent_toml(f'[mqtt]\nurl = "mqtt://h"\n{more}'), where="x", base=tmp_path)


TENANT = f'[[tenant]]\nid = "t"\nkey_sha256 = "{"0" * 64}"\n'


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('infer_tenant = "t"', "mqtt.infer_tenant: nobody may ask"),
        (f"infer = true\n{TENANT}", "none of them asks over MQTT"),
        (f'infer = true\ninfer_tenant = "u"\n{TENANT}', "Known here: t"),
        ('infer = true\ninfer_tenant = "u"', "no \\[\\[tenant\\]\\]"),
        ('infer = true\ninfer_tenant = "t"\n[[tenant]]\nid = "t"\n[[tenant]]\nid = "v"\n', "nobody could ever be"),
    ],
)
def test_who_asks_over_mqtt_is_one_of_the_tenants(
    tmp_path: Any, agent_toml: Callable[..., str], more: str, says: str
) -> None:
    from aios_edge.errors import SettingsError

    with pytest.raises(SettingsError, match=says):
        asking_settings(tmp_path, agent_toml, more)
    good = asking_settings(tmp_path, agent_toml, 'infer = true\ninfer_tenant = "t"\n[[tenant]]\nid = "t"\n')
    assert good.mqtt.infer_tenant == "t", "it needs no key"
