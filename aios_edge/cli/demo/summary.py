"""summary.json: the figures of the demo, and the promises it makes about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of one run; None: not measured. Shares are of all offered requests.

    ``pruned``: whether this machine served a pruned network, which ``structured`` asked for; ``not_pruned``: why not.
    """

    profile: str
    candidate: str
    test_accuracy: float
    fp32_size_bytes: int
    size_bytes: int
    speedup: float | None
    accuracy_drop: float
    agreement: float
    deadline_s: float
    emulated_slowdown: float
    offered: int
    admitted: int
    shed: int
    cloud_share: float
    deadline_hit_rate_with_cloud: float
    deadline_hit_rate_without_cloud: float
    breaker_opened_s: float | None
    worker_killed_in_flight: int
    worker_lost_requests: int
    worker_recovered_s: float | None
    energy_j_per_inference: float | None
    energy_method: str | None
    mqtt_messages: int
    wall_s: float
    fast: bool
    structured: bool = False
    pruned: bool = False
    not_pruned: str | None = None


#: Speed against fp32 that a class of CPU is held to; it comes from its 8-bit dot products. Elsewhere: never slower.
SPEEDUP = {"x86-vnni": 2.5}
CLOUD_SHARE = (0.4, 0.9)


@dataclass(frozen=True)
class Miss:
    """A promise of the demo that was not kept."""

    promise: str
    said: str


def misses(summary: Summary) -> tuple[Miss, ...]:
    """The promises this run broke. What a model of full training keeps isn't promised of ``--fast``: it trains too
    little, and where int8 then costs too much accuracy the exporter ships fp32, where pruning does the whole network.
    Only what really is pruned may lose a point more.
    """
    least_share, most_share = CLOUD_SHARE
    speedup = 1.0 if summary.fast else SPEEDUP.get(summary.profile, 1.0)
    accuracy, drop = (0.82, 0.02) if summary.pruned else (0.83, 0.01)
    found = summary.test_accuracy
    checks = (
        (
            "structured",
            summary.pruned or summary.fast or not summary.structured,
            f"a pruned network was promised, the whole one is served: {summary.not_pruned}",
        ),
        ("test_accuracy", summary.fast or found >= accuracy, f"{found:.4f} is below {accuracy}"),
        ("accuracy_drop", summary.accuracy_drop <= drop, f"{summary.accuracy_drop:.4f} is above {drop}"),
        (
            "size_bytes",
            summary.fast or summary.fp32_size_bytes >= 3.8 * summary.size_bytes,
            f"{summary.fp32_size_bytes / summary.size_bytes:.2f}x smaller than fp32, 3.8x was promised",
        ),
        (
            "speedup",
            (summary.speedup or 0.0) >= speedup,
            f"{summary.speedup} times the speed of fp32, {speedup} was promised on {summary.profile}",
        ),
        (
            "deadline_hit_rate_with_cloud",
            summary.deadline_hit_rate_with_cloud >= 0.97,
            f"{summary.deadline_hit_rate_with_cloud:.4f} of offered is below 0.97",
        ),
        (
            "cloud_share",
            least_share <= summary.cloud_share <= most_share,
            f"the cloud answered {summary.cloud_share:.4f} of offered, not {least_share} to {most_share}",
        ),
        ("shed", summary.shed <= 0.03 * summary.offered, f"{summary.shed} of {summary.offered} refused, above 3 %"),
        (
            "deadline_hit_rate_without_cloud",
            summary.deadline_hit_rate_without_cloud < summary.deadline_hit_rate_with_cloud - 0.2,
            f"{summary.deadline_hit_rate_without_cloud:.4f}: the cloud made no difference",
        ),
        (
            "breaker_opened_s",
            summary.breaker_opened_s is not None and summary.breaker_opened_s <= 3.0,
            f"breaker opened after {summary.breaker_opened_s} s, 3 s was promised",
        ),
        (
            "worker_recovered_s",
            summary.worker_recovered_s is not None and summary.worker_recovered_s <= 3.0,
            f"worker back after {summary.worker_recovered_s} s, 3 s was promised",
        ),
        (
            "worker_lost_requests",
            summary.worker_lost_requests == 0,
            f"{summary.worker_lost_requests} requests in flight at the kill got no answer",
        ),
    )
    return tuple(Miss(promise, said) for promise, kept, said in checks if not kept)


def remedy(missed: tuple[Miss, ...]) -> str:
    """What to do: a busy machine breaks promises about time, never those about the model."""
    of_the_model = {"structured", "test_accuracy", "accuracy_drop", "size_bytes"}
    if any(miss.promise in of_the_model for miss in missed):
        return "This does not come from a busy machine: please report it with summary.json and each report.json"
    return "On a machine that is busy with other work, run it again when it is quiet; else please report it"
