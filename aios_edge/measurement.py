"""What a measurement on a device says: the part of ``aios-edge bench --json`` that an export reads back.

The device writes it (``device_agent/bench.py``), ``aios-edge export --measured`` takes it (``exporters/brought.py``).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from aios_edge.bundle.layout import model_files
from aios_edge.digest import canonical_json, sha256_bytes
from aios_edge.host import Host, describe, matches
from aios_edge.manifest import Manifest, Precision
from aios_edge.profile import DeviceProfile
from aios_edge.session import SessionOptions

MEASUREMENT_SCHEMA = "1.0"


class MeasuredOn(msgspec.Struct, frozen=True, kw_only=True):
    """Where figures were measured, and whether that machine is of the profile's class."""

    host: str
    cpu_flags: tuple[str, ...]
    matches_profile: bool
    reasons: tuple[str, ...]
    runtime: str


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Latency in seconds; medians over the repeats."""

    p50: float
    p95: float
    p99: float


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """The other bundle that was run in turn with the measured one, at the same batch, length and threads.

    ``speedup`` is the median of the rounds' own ratios: this other one's time over the measured one's.
    """

    bundle: str
    bundle_id: str
    candidate: str
    precision: Precision
    model_sha256: str
    providers_active: tuple[str, ...]
    latency_s: Quantiles
    speedup: float
    rounds: int


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle on one device. ``latency_s`` is at ``batch`` x ``length`` under ``session``; ``model_sha256`` is
    :func:`model_sha256` of the bundle; ``speedup`` that of ``compared``, None where nothing was."""

    schema: str = MEASUREMENT_SCHEMA
    bundle: str
    bundle_id: str
    model: str
    profile: str
    candidate: str
    precision: Precision
    model_sha256: str
    batch: int
    length: int
    threads: int
    session: SessionOptions
    latency_s: Quantiles
    speedup: float | None
    compared: Compared | None
    rss_bytes: int | None
    rss_reason: str | None
    providers_active: tuple[str, ...]
    provider_reason: str | None
    method: str
    host: Host
    measured_on: MeasuredOn


def model_sha256(files: Iterable[tuple[str, str]]) -> str:
    """The digest of a model from (name, sha256) of its files: the same in a bundle and in the exporter's cache."""
    return sha256_bytes(canonical_json(sorted(files)))


def model_of(manifest: Manifest) -> str:
    """The digest of a bundle's model."""
    names = model_files(manifest)
    return model_sha256((entry.path, entry.sha256) for entry in manifest.files if entry.path in names)


def measured_on(profile: DeviceProfile, host: Host, *, runtime: str) -> MeasuredOn:
    """A machine as figures name it; ``runtime`` is what ran the model."""
    match = matches(profile, host)
    return MeasuredOn(
        host=describe(host),
        cpu_flags=tuple(sorted(host.cpu_flags)),
        matches_profile=match.ok,
        reasons=match.reasons,
        runtime=runtime,
    )
