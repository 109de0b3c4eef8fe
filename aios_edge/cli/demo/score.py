"""How an overload run is judged: pure functions of its outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aios_edge.cli.demo.load import Outcome


@dataclass(frozen=True, kw_only=True)
class LoadScore:
    """Counts of one overload run. Every share is of **all offered** requests."""

    offered: int
    shed: int
    failed: int
    late: int
    wrong: int  # not what the model that answered says offline
    hit: int
    cloud: int
    routes: dict[str, int]

    @property
    def admitted(self) -> int:
        """Offered and not refused."""
        return self.offered - self.shed

    @property
    def hit_rate(self) -> float:
        """Share of all offered requests answered rightly and in time."""
        return self.hit / self.offered

    @property
    def cloud_share(self) -> float:
        """Share of all offered requests that the cloud answered."""
        return self.cloud / self.offered


def score(outcomes: Sequence[Outcome], deadline_s: float, offline: Mapping[str, Sequence[str]]) -> LoadScore:
    """Judge a run. ``offline[route][text]`` is the label that the model behind that route gives offline."""
    answered = [outcome for outcome in outcomes if outcome.status == "answered"]
    late = [outcome for outcome in answered if outcome.latency_s > deadline_s]
    in_time = [outcome for outcome in answered if outcome.latency_s <= deadline_s]
    hits = [o for o in in_time if o.label is not None and o.label == _offline_label(offline, o)]
    routes: dict[str, int] = {}
    for outcome in outcomes:
        key = f"{outcome.route}/{outcome.reason}" if outcome.status == "answered" else outcome.status
        routes[key] = routes.get(key, 0) + 1
    return LoadScore(
        offered=len(outcomes),
        shed=sum(outcome.status == "shed" for outcome in outcomes),
        failed=sum(outcome.status == "failed" for outcome in outcomes),
        late=len(late),
        wrong=len(in_time) - len(hits),
        hit=len(hits),
        cloud=sum(outcome.route == "cloud" for outcome in answered),
        routes=dict(sorted(routes.items())),
    )


def _offline_label(offline: Mapping[str, Sequence[str]], outcome: Outcome) -> str | None:
    labels = offline.get(outcome.route or "")
    return labels[outcome.text] if labels is not None else None


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile of a non-empty sequence."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def emulation_slowdown(local_per_s: float, cloud_per_s: float, overflow_factor: float, utilisation: float) -> float:
    """How many times slower the emulated device must be so that its overflow fits the cloud.

    At ``overflow_factor`` x the device's capacity C, the cloud gets about (overflow_factor - 0.9) C; that is to be
    ``utilisation`` of what the cloud can do. At least 2, so that the act always shows a slower device.
    """
    wanted_local = utilisation * cloud_per_s / (overflow_factor - 0.9)
    return max(2.0, local_per_s / wanted_local)
