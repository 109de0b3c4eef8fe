"""What may leave this device, and what did: the last word before a request's body goes to a connection.

Three things keep a private request here, and each would do: the router never answers ``Cloud`` for it, no endpoint
knows a model that never leaves, and :meth:`PayloadAudit.may_leave` refuses it. What was sent is counted apart from all
three, where the bytes go, so that a fault of theirs would show.
"""

from __future__ import annotations

import logging
from collections import Counter

from device_agent.values import InferenceRequest

log = logging.getLogger("device_agent.cloud")


class PayloadAudit:
    """Counts since the start, by model."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.private_sent: Counter[str] = Counter()  # of those, what should have stayed: always 0
        self.kept_back = 0  # asked to leave, refused here: the fault of whoever asked
        self._staying: set[str] = set()

    @property
    def staying(self) -> tuple[str, ...]:
        """Models whose requests never leave."""
        return tuple(sorted(self._staying))

    def keep(self, model: str) -> None:
        """This model's requests never leave, from now on."""
        self._staying.add(model)

    def may_leave(self, request: InferenceRequest) -> bool:
        """Whether it may; a no is logged as the fault it is."""
        if not self._private(request):
            return True
        self.kept_back += 1
        log.error("a request for %s was about to leave and must not; it was kept back", request.model)
        return False

    def left(self, request: InferenceRequest) -> None:
        """Its body is handed to a connection now."""
        self.sent[request.model] += 1
        if self._private(request):
            self.private_sent[request.model] += 1

    def _private(self, request: InferenceRequest) -> bool:
        return request.local_only or request.model in self._staying
