"""Bodies that are still coming in. Each is bounded, and so are those whose requests are being answered; what lies
between would be bounded by nothing but the number of connections.

Together they may take what the others may (``in_flight_bytes``). Beyond that the longest one is refused, whoever is the
last to come: it would be a way to keep others out to begin many long ones and never end them. What is short is always
taken in.
"""

from __future__ import annotations

from collections.abc import Callable

#: Of each body that don't count.
FREE_BYTES = 64 * 1024


class Inbound:
    """All of them. ``limit_bytes`` is asked each time: the policy may change."""

    def __init__(self, limit_bytes: Callable[[], int]) -> None:
        self.bytes = 0
        self._limit_bytes = limit_bytes
        self._long: set[Coming] = set()

    def settle(self) -> None:
        """Refuse as many as it takes; a single one has always room."""
        while self.bytes > self._limit_bytes() and len(self._long) > 1:
            longest = max(self._long, key=Coming.counted)
            longest.over()
            longest.refuse()

    def changed(self, coming: Coming, more_bytes: int) -> None:
        """One has grown, or is over."""
        self.bytes += more_bytes
        if coming.counted():
            self._long.add(coming)
        else:
            self._long.discard(coming)


class Coming:
    """One after the other of a connection's bodies. ``refuse`` is called when it is one too many."""

    def __init__(self, inbound: Inbound, refuse: Callable[[], None]) -> None:
        self.refuse = refuse
        self._inbound = inbound
        self._bytes = 0
        self._body = 0  # how many were over before this one

    def counted(self) -> int:
        """Bytes of it that count."""
        return max(0, self._bytes - FREE_BYTES)

    def grew(self, size_bytes: int) -> None:
        """A piece has come, or was unpacked; whoever calls settles, when it may be refused."""
        before, self._bytes = self._bytes, self._bytes + size_bytes
        if self._bytes > FREE_BYTES:
            self._inbound.changed(self, self._bytes - max(before, FREE_BYTES))

    def unpacking(self) -> Callable[[int], None]:
        """To be told how many bytes more were unpacked of the body that comes now. Whoever unpacks may be behind: what
        is told after its end counts no more, nor for the body after it."""
        body = self._body

        def unpacked(size_bytes: int) -> None:
            if self._body == body:
                self.grew(size_bytes)
                self.settle()

        return unpacked

    def settle(self) -> None:
        """See :meth:`Inbound.settle`."""
        if self._bytes > FREE_BYTES:
            self._inbound.settle()

    def over(self) -> None:
        """It is whole, or nobody wants it any more."""
        before, self._bytes = self._bytes, 0
        self._body += 1
        if before > FREE_BYTES:
            self._inbound.changed(self, FREE_BYTES - before)


#: Of doors that are nobody's in particular.
UNBOUNDED = Inbound(lambda: 1 << 62)
