"""Measurements that were brought from the target: ``aios-edge bench --json``, read, judged, and given to candidates.

A measurement counts for one profile, one candidate and one model file, on a host of the profile's class, on the
profile's first provider, at the profile's batch, length and threads. Whatever differs is refused by its name: a figure
of another model or machine would choose as surely as a true one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from aios_edge.digest import sha256_file
from aios_edge.errors import MeasurementRefused
from aios_edge.host import matches
from aios_edge.measurement import MEASUREMENT_SCHEMA, Measurement, model_sha256
from aios_edge.profile import DeviceProfile
from aios_edge.session import SessionOptions, session_options
from exporters import graph
from exporters.report import Target
from exporters.stages import Made

_AGAIN = "Run 'aios-edge bench BUNDLE --json' on the device, with this version and this profile"


@dataclass(frozen=True, kw_only=True)
class Brought:
    """A measurement and the name of the file it came in."""

    file: str
    found: Measurement


def read_measurements(paths: Sequence[Path], profiles: Sequence[DeviceProfile]) -> dict[str, tuple[Brought, ...]]:
    """The measurements of each profile, judged as far as that goes before the candidates are built.

    Raises :class:`MeasurementRefused`.
    """
    found: dict[str, list[Brought]] = {}
    known = {profile.name: profile for profile in profiles}
    for path in paths:
        brought = _read(path)
        name = brought.found.profile
        if name not in known:
            what = f"was measured for profile '{name}', this export is for {', '.join(known)}"
            raise MeasurementRefused("profile", what, where=str(path), remedy=f"Add --profile {name}, or leave it out")
        _check_place(brought, known[name])
        twin = next((b for b in found.get(name, ()) if b.found.candidate == brought.found.candidate), None)
        if twin is not None:
            what = f"measures {brought.found.candidate} for {name}, and so does {twin.file}"
            raise MeasurementRefused("candidate", what, where=str(path), remedy="Give one measurement per candidate")
        found.setdefault(name, []).append(brought)
    return {name: tuple(items) for name, items in found.items()}


def _read(path: Path) -> Brought:
    try:
        document = msgspec.json.decode(path.read_bytes(), type=dict)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = f"can't be read as a JSON object ({getattr(error, 'strerror', None) or error})"
        raise MeasurementRefused("schema", what, where=str(path), remedy=_AGAIN) from error
    schema = document.get("schema")
    if not isinstance(schema, str) or schema.partition(".")[0] != MEASUREMENT_SCHEMA.partition(".")[0]:
        what = f"is no measurement of schema {MEASUREMENT_SCHEMA} (found {schema!r})"
        raise MeasurementRefused("schema", what, where=str(path), remedy=_AGAIN)
    try:
        found = msgspec.convert(document, Measurement)
    except msgspec.ValidationError as error:
        raise MeasurementRefused("schema", f"is no measurement ({error})", where=str(path), remedy=_AGAIN) from error
    if not 0 < found.latency_s.p50 <= found.latency_s.p95 < float("inf"):
        what = f"has latencies that can't be (p50 {found.latency_s.p50}, p95 {found.latency_s.p95})"
        raise MeasurementRefused("schema", what, where=str(path), remedy=_AGAIN)
    return Brought(file=path.name, found=found)


def _check_place(brought: Brought, profile: DeviceProfile) -> None:
    """The host is of the profile's class, and the model ran on the provider that the profile puts first."""
    found = brought.found
    match = matches(profile, found.host)
    if not match.ok:
        what = f"was measured on a host that is not of profile '{profile.name}': {'; '.join(match.reasons)}"
        raise MeasurementRefused("host", what, where=brought.file, remedy="Measure on the device itself")
    wanted = profile.providers[0].name if profile.providers else ""
    ran_on = found.providers_active[0] if found.providers_active else "nothing"
    if ran_on != wanted:
        why = f" ({found.provider_reason})" if found.provider_reason else ""
        what = f"ran on {ran_on}, not on {wanted}{why}"
        remedy = "Make that provider work there (see aios-edge doctor), or export for a profile without it"
        raise MeasurementRefused("provider", what, where=brought.file, remedy=remedy)


def assign(
    brought: Sequence[Brought], candidates: Sequence[Made], profile: DeviceProfile, shape: tuple[int, int]
) -> dict[str, Brought]:
    """Each measurement to its candidate by name; ``shape`` is the profile's batch and length.

    Raises :class:`MeasurementRefused`.
    """
    made = {candidate.name: candidate for candidate in candidates}
    given: dict[str, Brought] = {}
    for each in brought:
        found = each.found
        if found.candidate not in made:
            what = f"measures {found.candidate}, which is no candidate of '{profile.name}' ({', '.join(made)})"
            raise MeasurementRefused("candidate", what, where=each.file, remedy=_AGAIN)
        candidate = made[found.candidate]
        if found.model_sha256 != model_digest(candidate.folder):
            what = f"measures another {found.candidate} than this export built for '{profile.name}'"
            remedy = "Export with --candidates, and measure those bundles: the model was trained or built differently"
            raise MeasurementRefused("model_sha256", what, where=each.file, remedy=remedy)
        if (found.batch, found.length) != shape:
            what = f"was measured at {found.batch} x {found.length}, '{profile.name}' asks for {shape[0]} x {shape[1]}"
            raise MeasurementRefused("conditions", what, where=each.file, remedy=_AGAIN)
        if unlike := _unlike(found.session, session_options(candidate.built.session, profile.threads)):
            what = f"was run with {unlike}"
            raise MeasurementRefused("conditions", what, where=each.file, remedy=_AGAIN)
        given[found.candidate] = each
    return given


def _unlike(found: SessionOptions, wanted: SessionOptions) -> str:
    """The session options that differ, in words; empty where none does."""
    pairs = ((name, getattr(found, name), getattr(wanted, name)) for name in found.__struct_fields__)
    return ", ".join(f"{name} {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs)


def model_digest(folder: Path) -> str:
    """The digest by which a measurement names the model in a candidate's folder."""
    return model_sha256((name, sha256_file(path)) for name, path in graph.model_files(folder).items())


def targets_of(given: Mapping[str, Brought], candidates: Sequence[Made]) -> dict[str, Target]:
    """What is reported of each measured candidate."""
    fp32 = next((made for made in candidates if made.name == "fp32"), None)
    digest = model_digest(fp32.folder) if fp32 is not None else None
    twin = given[fp32.name].found if fp32 is not None and fp32.name in given else None
    targets: dict[str, Target] = {}
    for name, each in given.items():
        found, speedup = each.found, None
        interleaved = found.compared is not None and found.compared.model_sha256 == digest
        if interleaved and found.compared is not None:
            speedup = found.compared.speedup
        elif twin is not None:
            speedup = twin.latency_s.p50 / found.latency_s.p50
        targets[name] = Target(
            p50=found.latency_s.p50,
            p95=found.latency_s.p95,
            batch=found.batch,
            length=found.length,
            threads=found.threads,
            speedup=speedup,
            interleaved=interleaved,
            rss_bytes=found.rss_bytes,
            provider=found.providers_active[0],
            bundle_id=found.bundle_id,
            measured_on=found.measured_on,
        )
    return targets
