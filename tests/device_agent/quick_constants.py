"""Constants of the agent that tests give other values, with ``start_agent(constants=…)``: pauses that are no matter of
the test. What the tests look at keeps its own."""

from __future__ import annotations

#: Two batches are rehearsed at the start instead of seven. For a model that is emulated to be slow, that is seconds.
UNREHEARSED = {"device_agent.rehearsal.LIMIT_S": 0.0}
#: The files of a certificate are looked at ten times a second.
CERTIFICATE_WATCHED = {"device_agent.tls.LOOK_S": 0.1}
#: Workers are looked at ten times a second.
WORKERS_WATCHED = {"device_agent.heartbeat.LOOK_S": 0.1}
#: Every connection to a broker counts as a good one, so that the next is tried soon.
RECONNECTING = {"aios_edge.mqtt.STEADY_S": 0.0}
#: A file of audit lines that a disk refused is tried again soon.
DISK_TRIED_AGAIN = {"device_agent.audit._REOPEN_S": 0.5}
#: A client that reads why it is refused, and stays, is soon cut off when the agent stops.
CUT_OFF_SOON = {"device_agent.http_protocol.LAST_S": 0.1}
