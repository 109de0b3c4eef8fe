"""Who finds room in one model's queue: gathers what :mod:`fairness` and :mod:`queue_limit` decide by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from device_agent import fairness
from device_agent.fairness import PATIENT, Demand, Reserve
from device_agent.learning import Learning
from device_agent.policy_in_force import PolicyInForce
from device_agent.queue_limit import QueueLimit
from device_agent.scheduler import Pending
from device_agent.ticket_queue import TicketQueue

_NOBODY = "-"  # whoever asks where there are no tenants; no tenant has this name
_NONE = Demand()


class Room:
    """Counts what tenants ask for and have, and how long those wait that have no deadline."""

    def __init__(
        self,
        queue: TicketQueue,
        learning: Learning,
        rules: PolicyInForce,
        weights: Mapping[str, float],
        max_batch_size: int,
        workers: Callable[[], int] | None = None,
    ) -> None:
        self._queue = queue
        self._learning = learning
        self._rules = rules
        self._parts = fairness.shares(weights)
        self._max_batch_size = max_batch_size
        self._workers = workers  # how many serve; None: one
        self._demands: dict[str, Demand] = {}
        self._limit: QueueLimit | None = None  # begins with what was learnt before the first request

    @property
    def limit(self) -> int | None:
        """How many without a deadline may wait; None: there was none yet, or only ``queue_limit`` limits them."""
        return self._limit.places if self._limit is not None and self._rules.policy.queue_delay_s else None

    def arrives(self, pending: Pending, now: float) -> None:
        """A request came, whatever becomes of it."""
        who = PATIENT if pending.deadline_at is None else pending.tenant or _NOBODY
        self._demands[who] = self._demands.get(who, _NONE).asks(self._full_cost_s(pending), now)

    def crowded(self, pending: Pending) -> bool:
        """Whether its tenant has no room in a queue that has some, or it would wait too long without a deadline."""
        queue, parts = self._queue, self._parts
        if parts and not fairness.has_room(pending.tenant, queue.held, parts, self._rules.policy.queue_limit):
            return True
        if pending.deadline_at is not None or not self._rules.policy.queue_delay_s:
            return False
        places = self._begun(pending).places
        if not parts:
            return queue.patient >= places
        return not fairness.has_room(pending.tenant, queue.held_patiently, parts, places)

    def reserve(self, pending: Pending, now: float) -> Reserve:
        """What a newcomer with a deadline leaves for those that come after it."""
        cost_s, held = self._full_cost_s(pending), self._queue.held
        waiting_s = {name: held[name] * cost_s for name in self._parts}
        waiting_s[PATIENT] = self._queue.patient * cost_s
        who, alone_s = pending.tenant or _NOBODY, self._learning.alone_s(pending)
        if self._workers is not None:
            alone_s /= max(self._workers(), 1)
        return fairness.reserve(who, self._demands, self._parts, waiting_s, cost_s=alone_s, now=now)

    def taken(self, arrived_at: Sequence[float], now: float) -> None:
        """Those without a deadline that came then leave the queue for the worker; called before they do."""
        if self._limit is not None and arrived_at:
            waited_s = now - min(arrived_at)
            self._limit = self._limit.taken(waited_s, len(arrived_at), self._queue.patient, now)

    def _begun(self, pending: Pending) -> QueueLimit:
        policy, limit = self._rules.policy, self._limit
        if limit is None or (limit.target_s, limit.most) != (policy.queue_delay_s, policy.queue_limit):
            limit = self._limit = QueueLimit.begin(
                target_s=policy.queue_delay_s,
                rate_per_s=1 / max(self._full_cost_s(pending), 1e-6),
                max_batch_size=self._max_batch_size,
                most=policy.queue_limit,
            )
        return limit

    def _full_cost_s(self, pending: Pending) -> float:
        """Its share of a full batch of its like, and of the model's time."""
        service, size = self._learning.service, self._max_batch_size
        cost_s = service.busy_s(size * service.units(pending.cost_bytes)) / size
        return cost_s if self._workers is None else cost_s / max(self._workers(), 1)
