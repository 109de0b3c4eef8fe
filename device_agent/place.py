"""Where one of a model's workers is, or is to be, and the batches that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from device_agent.restart import RestartPlan
from device_agent.ticket import Running
from device_agent.watched_run import Watchdog
from device_agent.worker_memory import own_bytes, proportional_bytes
from device_agent.worker_pool import WorkerHandle

if TYPE_CHECKING:
    from device_agent.recycling import Recycling


class Place:
    """``ahead``: the batch that the worker has already, and takes next. ``live``: there is a worker, or was until a
    moment ago and nobody was told yet. ``starting``: one is being started. ``detail``: why there is none.
    ``not_before``: of a worker that the model can do without, when the next is tried; ``wants_room``: none was started
    for want of memory."""

    __slots__ = (
        "ahead",
        "detail",
        "how_lost",
        "live",
        "lost_at",
        "not_before",
        "plan",
        "recycling",
        "running",
        "starting",
        "wants_room",
        "watchdog",
        "worker",
    )

    worker: WorkerHandle
    recycling: Recycling

    def __init__(self) -> None:
        self.running = Running()
        self.ahead = Running()
        self.watchdog = Watchdog()
        self.plan = RestartPlan()
        self.live = False
        self.starting = False
        self.detail: str | None = None
        self.how_lost = "ended"  # as the handle said it; of a batch's worker its WorkerLost says it too
        self.lost_at = 0.0
        self.not_before = float("-inf")
        self.wants_room = False

    @property
    def held(self) -> int:
        """Requests that it has."""
        return len(self.running.tickets) + len(self.ahead.tickets)

    @property
    def held_bytes(self) -> int:
        """What its worker takes of the memory; 0 where there is none."""
        handle = self.worker
        if not handle.ready:
            return 0
        return (proportional_bytes(handle.pid) if handle.pid is not None else None) or handle.rss_bytes or 0

    @property
    def own_bytes(self) -> int:
        """What another worker of its kind would add to that."""
        pid = self.worker.pid
        return (own_bytes(pid) if pid is not None else None) or self.held_bytes

    def free_at(self, now: float) -> float:
        """When its worker is expected to take the next batch. Whatever overran its estimate is given a tenth more of
        what it took so far: the longer something hangs, the longer it is likely to hang on."""
        if not self.running.tickets:
            return now
        since = self.running.since
        return max(since + self.running.expected_s, now + 0.1 * (now - since)) + self.ahead.expected_s

    def back_at(self, now: float) -> float:
        """When a worker is expected that was lost."""
        return max(self.lost_at + self.plan.expected_s, now + 0.1 * (now - self.lost_at))

    def emptied(self, now: float, why: str) -> None:
        """There is no worker any more."""
        self.live, self.detail, self.lost_at = False, why, now
