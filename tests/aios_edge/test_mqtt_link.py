from __future__ import annotations

import gc
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aios_edge.broker import Broker, start_broker
from aios_edge.errors import RemoteError, SettingsError
from aios_edge.mqtt import Delivery, LinkState, MqttLink, MqttListener, MqttOptions, Publication
from aios_edge.mqtt_client import LinkClient

WAIT_S = 15.0


class Seen:
    """Link states as they come, and a wait for one of them."""

    def __init__(self) -> None:
        self.states: list[LinkState] = []
        self._changed = threading.Condition()

    def __call__(self, state: LinkState) -> None:
        with self._changed:
            self.states.append(state)
            self._changed.notify_all()

    def wait(self, wanted: Callable[[LinkState], bool]) -> LinkState:
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(wanted, self.states)), WAIT_S), self.states
            return next(state for state in self.states if wanted(state))


def link_to(url: str, seen: Seen, **more: object) -> MqttLink:
    options = MqttOptions(url=url, backoff_min_s=0.05, backoff_max_s=0.2, **more)  # type: ignore[arg-type]
    return MqttLink(options, call=lambda function: function(), on_state=seen)


@pytest.fixture
def mosquitto() -> Iterator[Broker]:
    with start_broker("mosquitto") as broker:
        yield broker


def test_mqtt_5_is_used_with_mosquitto_and_a_delivery_is_acknowledged(mosquitto: Broker) -> None:
    seen, delivered = Seen(), queue.SimpleQueue[Delivery]()
    link = link_to(mosquitto.url, seen)
    assert not link.publish(Publication(topic="a", payload=b""))
    with MqttListener(mosquitto.url, "a/#") as listener:
        link.start()
        assert seen.wait(lambda state: state.connected).protocol == "5"
        assert link.publish(Publication(topic="a/b", payload=b"hello"), delivered.put)
        assert delivered.get(timeout=WAIT_S) == Delivery(ok=True)
        assert next(listener.messages(WAIT_S)) == Publication(topic="a/b", payload=b"hello", qos=1, retain=False)
    link.stop()
    assert not link.state.connected


def test_a_broker_without_mqtt_5_gets_3_1_1() -> None:
    with start_broker("amqtt") as broker:
        seen, delivered = Seen(), queue.SimpleQueue[Delivery]()
        link = link_to(broker.url, seen)
        link.start()
        assert seen.wait(lambda state: state.connected).protocol == "3.1.1"
        assert link.publish(Publication(topic="a", payload=b"x"), delivered.put)
        assert delivered.get(timeout=WAIT_S).ok
        link.stop()


def test_a_demanded_protocol_is_not_given_up() -> None:
    with start_broker("amqtt") as broker:
        seen = Seen()
        link = link_to(broker.url, seen, protocol="5")
        link.start()
        refused = seen.wait(lambda state: state.failed_attempts >= 2)
        link.stop()
    assert not any(state.connected for state in seen.states)
    assert "MQTT version" in str(refused.reason) or "lost" in str(refused.reason)


def test_an_absent_broker_is_a_state_with_a_reason_and_its_arrival_is_noticed() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    seen = Seen()
    link = link_to(f"mqtt://127.0.0.1:{port}", seen)
    link.start()
    assert "refused" in str(seen.wait(lambda state: state.failed_attempts >= 1).reason).lower()
    with start_broker("mosquitto", port=port):
        seen.wait(lambda state: state.connected)
    link.stop()


def test_a_first_attempt_that_goes_on_is_said_to_be_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = link_to(f"mqtt://127.0.0.1:{silent.getsockname()[1]}", Seen())
        assert link.state.reason == "not started"
        link.start()
        peer, _ = silent.accept()
        assert link.state.reason == "connecting"
        peer.close()
        link.stop()


def test_a_server_that_is_no_broker_is_said_to_be_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        seen = Seen()
        link = link_to(f"mqtt://127.0.0.1:{server.getsockname()[1]}", seen)
        link.start()
        assert seen.wait(lambda state: state.failed_attempts >= 2).reason
        link.stop()
        server.shutdown(socket.SHUT_RDWR)


def test_a_broker_that_accepts_and_hangs_up_is_not_stormed() -> None:
    accepted: queue.SimpleQueue[float] = queue.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept_and_hang_up() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                accepted.put(time.monotonic())
                with connection:
                    connection.recv(1024)
                    connection.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK of MQTT 5: welcome

        threading.Thread(target=accept_and_hang_up, daemon=True).start()
        seen = Seen()
        options = MqttOptions(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}", backoff_min_s=0.05, backoff_max_s=5.0)
        link = MqttLink(options, call=lambda function: function(), on_state=seen)
        link.start()
        times = [accepted.get(timeout=WAIT_S) for _ in range(6)]
        link.stop()
        server.shutdown(socket.SHUT_RDWR)
    assert seen.wait(lambda state: state.connects >= 4)
    assert times[5] - times[4] > 4 * 0.05, "the pauses grow although each attempt was welcomed"


def test_a_restarted_broker_gets_the_link_and_its_subscriptions_back() -> None:
    first = start_broker("mosquitto")
    seen, heard = Seen(), queue.SimpleQueue[Publication]()
    options = MqttOptions(url=first.url, backoff_min_s=0.05, backoff_max_s=0.2)
    link = MqttLink(options, call=lambda function: function(), on_state=seen, on_message=heard.put)
    link.subscribe("a")
    link.start()
    seen.wait(lambda state: state.connected)
    first.stop()
    seen.wait(lambda state: not state.connected and state.connects == 1)
    with start_broker("mosquitto", port=first.port):
        seen.wait(lambda state: state.connected and state.connects == 2)
        link.publish(Publication(topic="a", payload=b"again"))
        assert heard.get(timeout=WAIT_S).payload == b"again"
        link.stop()


_WITH_A_WILL = """
import sys, threading
from aios_edge.mqtt import MqttLink, MqttOptions, Publication
up = threading.Event()
will = Publication(topic="d/status", payload=b'{"status": "offline"}', retain=True)
link = MqttLink(MqttOptions(url=sys.argv[1], keepalive_s=2), call=lambda f: f(), will=will,
                on_state=lambda state: up.set() if state.connected else None)
link.start()
up.wait()
online = Publication(topic="d/status", payload=b'{"status": "online"}', retain=True)
link.publish(online, lambda _: print("up", flush=True))
threading.Event().wait()
"""


def test_a_connection_that_has_ended_holds_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until garbage is collected, which may be long."""
    made: list[weakref.ref[LinkClient]] = []

    class Watched(LinkClient):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            made.append(weakref.ref(self))

    monkeypatch.setattr("aios_edge.mqtt.LinkClient", Watched)
    broker, seen = start_broker("mosquitto"), Seen()
    link = link_to(broker.url, seen)
    gc.disable()
    try:
        link.start()
        seen.wait(lambda state: state.connected)
        broker.stop()
        seen.wait(lambda state: state.connects == 1 and not state.connected)
        link.stop()
        assert made and not any(client() for client in made)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["mosquitto", "amqtt"])
def test_the_will_speaks_for_a_killed_process(kind: str) -> None:
    with start_broker(kind) as broker:  # type: ignore[arg-type]
        process = subprocess.Popen([sys.executable, "-c", _WITH_A_WILL, broker.url], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        with MqttListener(broker.url, "d/status") as listener:
            messages = listener.messages(WAIT_S)
            assert json.loads(next(messages).payload) == {"status": "online"}
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert json.loads(next(messages).payload) == {"status": "offline"}
        process.stdout.close()


def test_a_clean_stop_leaves_the_will_unsaid(mosquitto: Broker) -> None:
    seen = Seen()
    will = Publication(topic="d/status", payload=b"offline", retain=True)
    link = MqttLink(MqttOptions(url=mosquitto.url), call=lambda function: function(), will=will, on_state=seen)
    link.start()
    seen.wait(lambda state: state.connected)
    link.stop()
    with MqttListener(mosquitto.url, "#") as listener:
        marker = link_to(mosquitto.url, up := Seen())
        marker.start()
        up.wait(lambda state: state.connected)
        marker.publish(Publication(topic="marker", payload=b"", retain=False))
        assert next(listener.messages(WAIT_S)).topic == "marker"
        marker.stop()


def test_user_and_password_and_a_refusal_of_them(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    with start_broker("mosquitto", extra=_passwords(tmp_path, "edge", "hunter2")) as broker:
        seen, refused = Seen(), Seen()
        good = link_to(broker.url, seen, username="edge", password_file=secret)
        good.start()
        seen.wait(lambda state: state.connected)
        good.stop()
        bad = link_to(broker.url, refused)
        bad.start()
        assert "Not authorized" in str(refused.wait(lambda state: state.failed_attempts >= 1).reason)
        bad.stop()


def test_mutual_tls(tmp_path: Path) -> None:
    _certificates(tmp_path)
    lines = f"cafile {tmp_path}/ca.pem\ncertfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key\n"
    with start_broker("mosquitto", extra=lines + "require_certificate true\nallow_anonymous true\n") as broker:
        url = broker.url.replace("mqtt://127.0.0.1", "mqtts://localhost")
        seen, refused = Seen(), Seen()
        ca = tmp_path / "ca.pem"
        good = link_to(url, seen, ca=ca, cert=tmp_path / "client.pem", key=tmp_path / "client.key")
        good.start()
        seen.wait(lambda state: state.connected)
        good.stop()
        stranger = link_to(url, refused)  # the system's trust store doesn't know our authority
        stranger.start()
        assert "certificate" in str(refused.wait(lambda state: state.failed_attempts >= 1).reason).lower()
        stranger.stop()


@pytest.mark.parametrize(
    "options",
    [
        {"url": "http://host"},
        {"url": "mqtt://"},
        {"url": "mqtt://host:99999"},
        {"url": "mqtt://user:secret@host"},
        {"url": "mqtt://host", "ca": Path("ca.pem")},
        {"url": "mqtts://host", "ca": Path("/nonexistent/ca.pem")},
        {"url": "mqtts://host", "cert": Path("only-the-cert.pem")},
        {"url": "mqtt://host", "password_file": Path("/nonexistent/secret")},
    ],
)
def test_options_that_cannot_work_are_refused_with_a_remedy(options: dict[str, object]) -> None:
    with pytest.raises(SettingsError) as caught:
        MqttLink(MqttOptions(**options), call=lambda function: function())  # type: ignore[arg-type]
    assert caught.value.remedy and "secret@" not in str(caught.value)


def test_a_listener_says_where_no_broker_is() -> None:
    with pytest.raises(RemoteError, match="no MQTT broker"):
        MqttListener("mqtt://127.0.0.1:1", "#", timeout_s=0.3)


def _passwords(folder: Path, user: str, password: str) -> str:
    path = folder / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(path), user, password], check=True, capture_output=True)
    for part in (path, *path.parents[:3]):
        part.chmod(0o755)
    return f"allow_anonymous false\npassword_file {path}\n"


def _certificates(folder: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "rsa:2048", "-nodes", "-subj")
    openssl(*new, "/CN=test authority", "-x509", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(*new, f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        sign = ("x509", "-req", "-days", "2", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        openssl(*sign, "-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "names")
    for path in (folder, *folder.parents[:2], *folder.iterdir()):
        path.chmod(0o755)
