"""paho's client as a link uses it: how it is asked and told, in our values."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from aios_edge.mqtt_message import NONE, MessageProperties, Publication
from aios_edge.mqtt_packet import Malformed, Unreadable, read_publish


class LinkClient(Client):
    """Reads messages by :func:`read_publish`. In paho's thread ``on_publication`` gets each one, ``on_unreadable`` the
    reason where one can't be read; what isn't MQTT ends the connection, and not the thread."""

    on_publication: Callable[[Publication], None]
    on_unreadable: Callable[[str], None]

    def _handle_publish(self) -> MQTTErrorCode:
        try:
            mid, message = read_publish(
                self._in_packet["command"], self._in_packet["packet"], five=self._protocol == MQTTv5
            )
        except Unreadable as error:
            self.on_unreadable(str(error))
            mid = error.mid
        else:
            self.on_publication(message)
        return self._send_puback(mid) if mid else MQTTErrorCode.MQTT_ERR_SUCCESS

    def _packet_handle(self) -> MQTTErrorCode:
        try:
            return super()._packet_handle()
        except Malformed as error:
            self.on_unreadable(str(error))
        except Exception as error:  # what paho 2.1 raises for a property that isn't one, say, would end its thread
            self.on_unreadable(f"{type(error).__name__}: {error}")
        return MQTTErrorCode.MQTT_ERR_PROTOCOL


def send_at_once(_client: Client, _data: Any, sock: Any) -> None:
    """Without Nagle's algorithm."""
    # An acknowledgement and an answer behind it are two small writes: Nagle would hold the second one back until the
    # broker's kernel acknowledged the first, which it does 40 ms later.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def connect_properties(max_packet_bytes: int | None) -> Properties | None:
    """What an MQTT 5 broker is told of us."""
    if max_packet_bytes is None:
        return None
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = max_packet_bytes
    return properties


def subscribe(client: Client, topic_filter: str, qos: int, *, retained: bool) -> None:
    """Ask for messages; at most QoS 1 is ever asked for."""
    if client.protocol != MQTTv5:
        client.subscribe(topic_filter, qos)
        return
    handling = SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if retained else SubscribeOptions.RETAIN_DO_NOT_SEND
    client.subscribe(topic_filter, options=SubscribeOptions(qos=qos, retainHandling=handling))


def publish_properties(properties: MessageProperties) -> Properties | None:
    """As paho has them."""
    if properties == NONE:
        return None
    made = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    for name, value in (
        ("ResponseTopic", properties.response_topic),
        ("CorrelationData", properties.correlation_data),
        ("ContentType", properties.content_type),
        ("MessageExpiryInterval", properties.expiry_s),
        ("UserProperty", list(properties.user) or None),
    ):
        if value is not None:
            setattr(made, name, value)
    return made
