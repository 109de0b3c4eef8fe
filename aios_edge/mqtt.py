"""MQTT: with ``mqtt_client`` the only file that uses paho.

:class:`MqttLink` keeps one connection alive. An unreachable broker is a :class:`LinkState` with a reason, never an
exception. MQTT 5 comes first; a broker that refuses it, or hangs up on it, gets 3.1.1 at the next attempt. Each
attempt uses a fresh paho client with a clean session: what was in flight is lost with the connection, and whoever
must not lose it (the outbox) sends it again.

Threads: one that connects and waits between attempts, and paho's own for the network. Neither runs the caller's
code: every callback is handed to ``call``, which for asyncio is ``loop.call_soon_threadsafe``.
"""

from __future__ import annotations

import queue
import random
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from paho.mqtt.client import Client, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from aios_edge.errors import RemoteError
from aios_edge.mqtt_client import LinkClient, connect_properties, publish_properties, send_at_once, subscribe
from aios_edge.mqtt_message import Backlog
from aios_edge.mqtt_message import Publication as Publication
from aios_edge.mqtt_options import MqttOptions as MqttOptions
from aios_edge.mqtt_options import broker_address

CONNECT_TIMEOUT_S = 8.0
STEADY_S = 5.0  # a connection that lasted so long was a good one
_FAILURE = 128  # reason codes from here on say no
_UNACCEPTABLE_PROTOCOL = 132
BACKLOG_MESSAGES = 64
BACKLOG_BYTES = 8_000_000

Call = Callable[[Callable[[], None]], object]


class LinkState(msgspec.Struct, frozen=True, kw_only=True):
    """``reason`` says why it isn't connected, or what it was refused; ``protocol`` is the one in use (``5`` or
    ``3.1.1``), ``subscriptions`` how many the broker granted on this connection."""

    connected: bool = False
    protocol: str | None = None
    reason: str | None = "not started"
    connects: int = 0
    failed_attempts: int = 0  # since it was last connected
    subscriptions: int = 0


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """The broker's answer to a publication: taken, or refused with a reason. Silence means the link went down."""

    ok: bool
    reason: str | None = None


class _Session:
    """One attempt's client and who waits for its acknowledgements.

    paho calls back while it holds its own locks, so ours is never held around a call into paho. An acknowledgement
    may then come before :meth:`expect`, and waits in ``_early`` for it.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._lock = threading.Lock()
        self._expected: dict[int, Callable[[Delivery], None] | None] = {}
        self._early: dict[int, Delivery] = {}

    def expect(self, mid: int, on_delivered: Callable[[Delivery], None] | None) -> Delivery | None:
        """Wait for a message's acknowledgement; returns it when it is already there."""
        with self._lock:
            if mid in self._early:
                return self._early.pop(mid)
            self._expected[mid] = on_delivered
            return None

    def acknowledged(self, mid: int, delivery: Delivery) -> Callable[[Delivery], None] | None:
        """Who waits for this message."""
        with self._lock:
            if mid not in self._expected:
                self._early[mid] = delivery
                return None
            return self._expected.pop(mid)


class MqttLink:
    """One connection to a broker, kept alive. Raises :class:`SettingsError` for options that can't work.

    ``on_unreadable`` is told why a message couldn't be read. ``max_packet_bytes``: longer ones are kept away from us by
    an MQTT 5 broker.
    """

    def __init__(
        self,
        options: MqttOptions,
        *,
        call: Call,
        will: Publication | None = None,
        on_state: Callable[[LinkState], None] | None = None,
        on_message: Callable[[Publication], None] | None = None,
        on_unreadable: Callable[[str], None] | None = None,
        max_packet_bytes: int | None = None,
    ) -> None:
        self._options = options
        self._max_packet_bytes = max_packet_bytes
        self._backlog = Backlog(BACKLOG_MESSAGES, BACKLOG_BYTES)
        self._address = broker_address(options)
        self._client_id = options.client_id or f"aios-{uuid.uuid4().hex[:12]}"
        self._call = call
        self._will = will
        self._on_state = on_state
        self._on_message = on_message
        self._on_unreadable = on_unreadable
        self._lock = threading.RLock()  # guards what follows; never held around a call into paho
        self._state = LinkState()
        self._session: _Session | None = None
        self._subscriptions: dict[str, tuple[int, bool]] = {}
        self._packet_limit_bytes: int | None = None
        self._up_or_gone = threading.Event()  # this attempt led to something
        self._gone = threading.Event()  # this attempt is over
        self._why: str | None = None  # as paho's thread heard it
        self._refused = False  # for a reason other than the protocol's version
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_connected, name="mqtt-link", daemon=True)

    @property
    def state(self) -> LinkState:
        """The connection as it is now."""
        return self._state

    def start(self) -> None:
        """Begin to connect; returns at once."""
        with self._lock:  # not a change that anybody is told: nothing was connected, and nothing is
            self._state = LinkState(reason="connecting")
        self._thread.start()

    def stop(self, timeout_s: float = 3.0) -> None:
        """Disconnect cleanly (the broker then doesn't publish the will) and end the threads; blocks up to
        ``timeout_s``."""
        self._stopping.set()
        session = self._session
        if session is not None:
            session.client.disconnect()
        self._gone.set()
        self._up_or_gone.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def publish(self, message: Publication, on_delivered: Callable[[Delivery], None] | None = None) -> bool:
        """Hand a message to the network; False when not connected. ``on_delivered`` is called once the broker
        acknowledged it (QoS 1) or it was written (QoS 0), and not at all when the connection ends before."""
        size = message.size_bytes
        with self._lock:
            session, limit = self._session, self._packet_limit_bytes
            if session is None or not self._state.connected:
                return False
        if limit is not None and size > limit:  # sent anyway it would cost the connection, again and again
            self._tell(on_delivered, Delivery(ok=False, reason=f"larger than the broker's limit of {limit} bytes"))
            return True
        properties = publish_properties(message.properties) if session.client.protocol == MQTTv5 else None
        try:
            if not message.topic:  # paho lets it through to MQTT 5 brokers, for topic aliases
                raise ValueError("the topic is empty")
            info = session.client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        except (ValueError, struct.error, UnicodeError) as error:  # a topic with wildcards, say, or too long
            self._tell(on_delivered, Delivery(ok=False, reason=f"can't be published: {error}"))
            return True
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        early = session.expect(info.mid, on_delivered)
        if early is not None:
            self._tell(on_delivered, early)
        return True

    def subscribe(self, topic_filter: str, qos: int = 1, *, retained: bool = True) -> None:
        """Subscribe now and after every reconnect. ``retained`` False: without the messages that were there before,
        which an MQTT 5 broker then doesn't send; another one's say so."""
        with self._lock:
            self._subscriptions[topic_filter] = (qos, retained)
            session = self._session if self._state.connected else None
        if session is not None:
            subscribe(session.client, topic_filter, qos, retained=retained)

    # The connecting thread.

    def _keep_connected(self) -> None:
        wanted = self._options.protocol
        protocol = MQTTv311 if wanted == "3.1.1" else MQTTv5
        backoff_s = self._options.backoff_min_s
        while not self._stopping.is_set():
            connects, began = self._state.connects, time.monotonic()
            version_to_blame = self._attempt(protocol)
            if self._state.connects > connects:
                # A broker that welcomes and then hangs up (over what we send, say) mustn't be stormed.
                lasted = time.monotonic() - began >= STEADY_S
                backoff_s = self._options.backoff_min_s if lasted else min(self._options.backoff_max_s, backoff_s * 2)
                if wanted == "auto":
                    protocol = MQTTv5  # the broker that comes back may be another one
            elif version_to_blame and wanted == "auto" and protocol == MQTTv5:
                protocol = MQTTv311
                continue  # at once: this is how a connection to such a broker begins
            else:
                backoff_s = min(self._options.backoff_max_s, backoff_s * 2)
                if wanted == "auto":
                    protocol = MQTTv5
            # Jitter, so that a fleet doesn't come back as one.
            self._stopping.wait(backoff_s * random.uniform(0.5, 1.0))

    def _attempt(self, protocol: MQTTProtocolVersion) -> bool:
        """Connect once and stay until it ends. True when the server refused the protocol's version, or hung up
        without a word, which is how some refuse it."""
        self._gone.clear()
        self._up_or_gone.clear()
        self._why, self._refused = None, False
        client = self._new_client(protocol)
        address = self._address
        try:
            if protocol == MQTTv5:
                client.connect(
                    address.host,
                    address.port,
                    self._options.keepalive_s,
                    clean_start=True,
                    properties=connect_properties(self._max_packet_bytes),
                )
            else:
                client.connect(address.host, address.port, self._options.keepalive_s)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; ValueError: a host name that isn't one
            self._ended(f"{address.host}:{address.port}: {error}")
            return False
        session = _Session(client)
        client.user_data_set(session)
        with self._lock:
            self._session = session
        client.loop_start()
        if self._stopping.is_set():
            self._gone.set()
        elif not self._up_or_gone.wait(CONNECT_TIMEOUT_S):
            self._why = "the server accepts connections but doesn't answer as an MQTT broker"
            self._gone.set()
        self._gone.wait()
        with self._lock:
            self._session = None
        client.disconnect()
        client.loop_stop()
        client.user_data_set(None)  # else they hold each other, and paho's pair of sockets, until garbage is collected
        self._ended("disconnected" if self._stopping.is_set() else self._why or "the server hung up")
        return not self._refused

    def _ended(self, reason: str) -> None:
        with self._lock:
            before = self._state
            failed = 0 if before.connected else before.failed_attempts + 1
            self._set(LinkState(reason=reason, connects=before.connects, failed_attempts=failed))

    def _new_client(self, protocol: MQTTProtocolVersion) -> Client:
        client = LinkClient(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=protocol,
            reconnect_on_failure=False,
            clean_session=None if protocol == MQTTv5 else True,  # MQTT 5 says it at connect()
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        if self._address.tls is not None:
            client.tls_set_context(self._address.tls)
        if self._options.username is not None:
            client.username_pw_set(self._options.username, self._address.password)
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, self._will.qos, self._will.retain)
        client.on_socket_open = send_at_once
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_publish = self._acknowledged
        client.on_publication = self._received
        client.on_unreadable = self._unread
        client.on_subscribe = self._subscribed
        return client

    # paho's thread.

    def _connected(self, client: Client, session: _Session, _flags: Any, code: ReasonCode, properties: Any) -> None:
        if code.value >= _FAILURE:
            old = code.value == _UNACCEPTABLE_PROTOCOL
            self._why = "the broker doesn't speak this MQTT version" if old else f"the broker refused: {code}"
            self._refused = not old
            return
        protocol = "5" if client.protocol == MQTTv5 else "3.1.1"
        with self._lock:
            if session is not self._session:
                return  # this attempt was given up
            self._packet_limit_bytes = getattr(properties, "MaximumPacketSize", None)
            subscriptions = dict(self._subscriptions)
        for topic_filter, (qos, retained) in subscriptions.items():
            subscribe(client, topic_filter, qos, retained=retained)
        with self._lock:  # told only now: what is published from here on comes behind the subscriptions
            if session is not self._session:
                return
            self._set(LinkState(connected=True, protocol=protocol, reason=None, connects=self._state.connects + 1))
            late = {name: how for name, how in self._subscriptions.items() if name not in subscriptions}
        for topic_filter, (qos, retained) in late.items():
            subscribe(client, topic_filter, qos, retained=retained)
        self._up_or_gone.set()

    def _disconnected(
        self, _client: Client, session: _Session, _flags: Any, code: ReasonCode, _properties: Any
    ) -> None:
        if session is self._session:  # not one that was given up
            self._why = self._why or f"connection lost: {code}"
            self._gone.set()
            self._up_or_gone.set()

    def _acknowledged(self, _client: Client, session: _Session, mid: int, code: ReasonCode, _more: Any) -> None:
        refused = code.value >= _FAILURE
        delivery = Delivery(ok=not refused, reason=str(code) if refused else None)
        self._tell(session.acknowledged(mid, delivery), delivery)

    def _received(self, got: Publication) -> None:
        on_message = self._on_message
        if on_message is None:
            return
        size = got.size_bytes
        if not self._backlog.enter(size, lambda: self._gone.is_set() or self._stopping.is_set()):
            return

        def taken() -> None:
            self._backlog.leave(size)
            on_message(got)

        if not self._hand_over(taken):
            self._backlog.leave(size)

    def _unread(self, why: str) -> None:
        on_unreadable = self._on_unreadable
        if on_unreadable is not None:
            self._hand_over(lambda: on_unreadable(why))

    def _subscribed(
        self, _client: Client, session: _Session, _mid: int, codes: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [f"subscription refused: {code}" for code in codes if code.value >= _FAILURE]
        with self._lock:
            if session is self._session:
                granted = self._state.subscriptions + len(codes) - len(refused)
                reason = refused[0] if refused else self._state.reason
                self._set(msgspec.structs.replace(self._state, reason=reason, subscriptions=granted))

    def _tell(self, on_delivered: Callable[[Delivery], None] | None, delivery: Delivery) -> None:
        if on_delivered is not None:
            self._hand_over(lambda: on_delivered(delivery))

    def _hand_over(self, function: Callable[[], None]) -> bool:
        try:
            self._call(function)
        except RuntimeError:  # the caller's event loop is closed: nobody is left to tell
            return False
        return True

    def _set(self, state: LinkState) -> None:
        with self._lock:
            if state == self._state:
                return
            self._state = state
            on_state = self._on_state
            if on_state is not None:
                self._hand_over(lambda: on_state(state))


class MqttListener:
    """Subscribes and iterates what arrives: for the demo and the command line, not for the agent. ``broker`` may be
    just a URL.

    Raises :class:`RemoteError` when the broker can't be reached within ``timeout_s``.
    """

    def __init__(self, broker: MqttOptions | str, topic_filter: str, *, timeout_s: float = 10.0) -> None:
        options = MqttOptions(url=broker) if isinstance(broker, str) else broker
        self._messages: queue.SimpleQueue[Publication | None] = queue.SimpleQueue()
        self._up = threading.Event()
        self._link = MqttLink(
            options,
            call=lambda function: function(),
            on_state=lambda state: self._up.set() if state.connected else None,
            on_message=self._messages.put,
        )
        self._link.subscribe(topic_filter)
        self._link.start()
        if not self._up.wait(timeout_s):
            reason = self._link.state.reason
            self._link.stop()
            raise RemoteError(
                f"no MQTT broker: {reason}",
                where=options.url,
                remedy="Start a broker there (apt install mosquitto) or name another one",
            )

    @property
    def state(self) -> LinkState:
        """The connection as it is now."""
        return self._link.state

    def messages(self, timeout_s: float | None = None) -> Iterator[Publication]:
        """Messages as they come; ends after ``timeout_s`` seconds without one, or when closed."""
        while True:
            try:
                message = self._messages.get(timeout=timeout_s)
            except queue.Empty:
                return
            if message is None:
                return
            yield message

    def __iter__(self) -> Iterator[Publication]:
        return self.messages()

    def close(self) -> None:
        """Disconnect; whoever iterates gets to the end."""
        self._link.stop()
        self._messages.put(None)

    def __enter__(self) -> MqttListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
