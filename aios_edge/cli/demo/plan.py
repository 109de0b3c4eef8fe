"""How long each act of the demo takes: the full form and the fast one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The figures that differ between ``demo`` and ``demo --fast``.

    ``finetune`` and ``distill`` are the recipe's tables of those names, the latter for ``--structured`` only, as are
    ``structures``, the pruned networks that are tried at most.
    ``load_s`` is the length of each overload run, ``distinct_sentences`` how many test sentences the load draws from,
    ``latency_samples`` how many sequential requests the unloaded p95 is taken from.
    """

    finetune: dict[str, str | int | float]
    distill: dict[str, str | int | float]
    structures: int
    validation_rows: int
    test_rows: int
    exhaustive: bool
    load_s: float
    distinct_sentences: int
    latency_samples: int
    capacity_s: float
    telemetry_interval_s: float


FULL = Plan(
    finetune={
        "method": "full",
        "epochs": 3,
        "batch_size": 32,
        "learning_rate": 1e-4,
        "max_length": 64,
        "seed": 7,
    },
    distill={"epochs": 4},
    structures=2,
    validation_rows=500,
    test_rows=2000,
    exhaustive=True,
    load_s=24.0,
    distinct_sentences=500,
    latency_samples=120,
    capacity_s=4.0,
    telemetry_interval_s=2.0,
)

FAST = Plan(
    finetune={
        "method": "last-n",
        "last_n": 3,
        "epochs": 1,
        "batch_size": 32,
        "learning_rate": 4e-4,
        "max_length": 64,
        "max_rows": 1200,
        "seed": 7,
    },
    distill={"epochs": 1},
    structures=1,
    validation_rows=400,
    test_rows=500,
    exhaustive=False,
    load_s=4.0,
    distinct_sentences=120,
    latency_samples=40,
    capacity_s=1.5,
    telemetry_interval_s=1.0,
)

#: The bundles of the demo beside the one for this machine.
OTHER_PROFILES = ("rpi5", "jetson-orin-nano")
CLOUD_PROFILE = "cloud-cpu"
MODEL_NAME = "sentiment"
OVERLOAD_FACTOR = 3.0
DEADLINE_FACTOR = 3.0
#: The emulated device is made slow enough that what overflows takes at most this share of the cloud's capacity.
CLOUD_UTILISATION = 0.35
