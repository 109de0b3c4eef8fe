"""``report.html``: the report for people, in one file that loads nothing from anywhere and needs no script."""

from __future__ import annotations

import msgspec

from exporters import report_classes as classes
from exporters import report_tables as tables
from exporters.report import Candidate, ExportReport, ProfileReport
from exporters.report_format import DASH, TIMES, folded, megabytes, milliseconds, name_of, percent, text, times
from exporters.report_plots import Point, scatter
from exporters.report_style import STYLE
from exporters.report_summary import chosen_of, described, summary
from exporters.report_training import training


def page(report: ExportReport) -> str:
    """The whole page."""
    title = f"{text(report.name)} {text(report.version)}"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>{title}: export report</title><style>{STYLE}</style></head><body>",
        f"<header><h1>{title}</h1></header><main>",
        summary(report),
        f"<h2>What each stage bought</h2>{tables.stages(report)}",
        *(_profile(name, profile) for name, profile in report.profiles.items()),
        *_chosen_models(report),
        training(report),
        _provenance(report),
        f"</main><footer>Made by aios-edge {text(report.tools.get('aios-edge', ''))}. ",
        "The same for machines: report.json.</footer></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _profile(name: str, profile: ProfileReport) -> str:
    where = profile.candidates[0].measured_on if profile.candidates else None
    note = ""
    if where is not None:
        fits = (
            "of this profile's class"
            if where.matches_profile
            else f"not of this profile's class: {'; '.join(where.reasons)}"
        )
        unmeasured = ""
        if any(c.target for c in profile.candidates):
            unmeasured = " What was measured on the target decided, not the times and memory of this machine above."
        elif not where.matches_profile:
            unmeasured = (
                " Latency and memory are those of this machine and had no part in the choice: unmeasured on target."
            )
        note = f"<p class='soft'>Measured on {text(where.host)} ({text(fits)}), {text(where.runtime)}.{unmeasured}</p>"
    note += "".join(_target(candidate) for candidate in profile.candidates)
    details = (
        tables.latencies(profile) + tables.kept_float(profile) + tables.tuning(profile) + tables.operators(profile)
    )
    content = _plots(profile) + tables.candidates(profile) + note + details
    return f"<section><h2>Candidates for {text(name)}</h2>{content}</section>"


def _target(c: Candidate) -> str:
    """What was measured on the device; it decided, the table's times and memory didn't."""
    if (found := c.target) is None:
        return ""
    speedup = f", {times(found.speedup)} fp32" if found.speedup is not None else ""
    return (
        f"<p>{name_of(c.name)} measured on target: p50 {milliseconds(found.p50)}, p95 {milliseconds(found.p95)} at "
        f"{found.batch} {TIMES} {found.length} on {found.threads} thread{'s' if found.threads > 1 else ''} of "
        f"{text(found.provider)}{speedup}, memory {megabytes(found.rss_bytes)}; {text(found.measured_on.host)}, "
        f"{text(found.measured_on.runtime)}.</p>"
    )


def _plots(profile: ProfileReport) -> str:
    size, latency, absent = [], [], []
    for number, c in enumerate(profile.models, start=1):
        lacks = [
            what
            for what, value in (("accuracy", c.drop), ("size", c.size_bytes), ("latency", c.latency_s))
            if value is None
        ]
        if lacks:
            absent.append(f"{name_of(c.name)} (no {' and no '.join(lacks)})")
        if c.drop is None:
            continue
        if c.size_bytes is not None:
            size.append(_point(c, number, c.size_bytes / 1e6))
        if c.latency_s is not None:
            latency.append(_point(c, number, c.latency_s.p50 * 1e3))
    on_target = all(c.measured_on.matches_profile for c in profile.candidates)
    where = "one text of 32 tokens, one thread" + ("" if on_target else "; this machine, not the target")
    drawn = []
    for points, label, said in (
        (size, "model size, MB", "Size and accuracy"),
        (latency, "p50 latency, ms", f"Latency and accuracy ({where})"),
    ):
        if points:
            picture = scatter(points, title=said, x_label=label, max_drop=profile.max_drop * 100)
            drawn.append(f"<figure>{picture}<figcaption>{said}</figcaption></figure>")
        else:
            drawn.append(f"<p class='none'>{said}: nothing was measured.</p>")
    missing = f"<p class='soft'>Not drawn where a figure was not measured: {'; '.join(absent)}.</p>" if absent else ""
    legend = (
        "<p class='soft'>Lower left is better. Ringed: chosen. Hollow: misses a promise. The line joins those that no "
        "other one beats in both; bars are 95 % intervals on validation; numbers are those of the table.</p>"
    )
    return f"<div class='plots'>{''.join(drawn)}</div>{legend}{missing}"


def _point(c: Candidate, number: int, x: float) -> Point:
    assert c.drop is not None
    drop, low, high = (value * 100 for value in (c.drop.value, c.drop.low, c.drop.high))
    state = "chosen" if c.chosen else "kept" if c.eligible else "missed"
    return Point(name=c.name, number=number, x=x, drop=drop, low=low, high=high, state=state)  # type: ignore[arg-type]


def _chosen_models(report: ExportReport) -> list[str]:
    """Each chosen model once, however many profiles have it."""
    wanted_by: dict[str, list[str]] = {}
    models: dict[str, Candidate] = {}
    for name, profile in report.profiles.items():
        if (chosen := chosen_of(profile)) is not None:
            wanted_by.setdefault(chosen.name, []).append(name)
            models.setdefault(chosen.name, chosen)
    return [_chosen_model(c, wanted_by[name], report.labels) for name, c in models.items()]


def _chosen_model(c: Candidate, profiles: list[str], labels: tuple[str, ...]) -> str:
    parts = [
        f"<section><h2>{name_of(c.name)} in detail</h2>"
        f"<p class='soft'>Chosen for {text(', '.join(profiles))}. What it is: {text(described(c))}.</p>"
    ]
    parts.append(f"<h3>Class by class</h3>{classes.by_class(c)}")
    if c.confusion is not None:
        parts.append(f"<h3>What is taken for what</h3>{classes.confused(c.confusion, labels)}")
    if (found := c.calibration) is not None:
        parts.append(
            "<h3>How far its scores can be trusted</h3><p>"
            f"Scores are divided by the temperature {found.temperature:g}, fitted on validation, so that a score says "
            f"how often such an answer is right. On {text(found.split)} they are off by {percent(found.error_after)} "
            f"on average (expected calibration error), without it by {percent(found.error_before)}. No label changes."
            "</p>"
        )
    return "".join(parts) + "</section>"


def _provenance(report: ExportReport) -> str:
    hosts = {c.measured_on.host: c.measured_on for p in report.profiles.values() for c in p.candidates}
    facts = {
        "source weights": text(report.source),
        "data": text(report.data),
        "tools": text(", ".join(f"{name} {version}" for name, version in report.tools.items())),
        "host": text("; ".join(f"{name}, {where.runtime}" for name, where in hosts.items()) or DASH),
        "parity of the ONNX graphs with torch": f"within {report.baseline.parity:.1e} of the largest logit",
        "time and memory": f"{report.wall_s:.0f} s, {megabytes(report.peak_rss_bytes)} at most",
        "stages": f"{len(report.stages.get('built', ()))} built, {len(report.stages.get('reused', ()))} reused",
        "bundles": "<br>".join(
            f"{text(profile.bundle)}: <code>{text(profile.bundle_id)}</code>"
            for profile in report.profiles.values()
            if profile.bundle
        )
        or "none",
    }  # fmt: skip
    rows = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in facts.items())
    recipe = msgspec.json.format(msgspec.json.encode(report.recipe), indent=2).decode()
    built = "".join(f"{kind}: {name}\n" for kind, names in report.stages.items() for name in names)
    flags = " ".join(sorted({flag for where in hosts.values() for flag in where.cpu_flags}))
    return (
        "<section><h2>Where it comes from</h2>"
        f"<div class='wide'><table class='facts'><tbody>{rows}</tbody></table></div>"
        + folded("The recipe, with every default", f"<pre>{text(recipe)}</pre>")
        + (folded("Stages by digest", f"<pre>{text(built)}</pre>") if built else "")
        + (folded("CPU flags of the host", f"<pre>{text(flags)}</pre>") if flags else "")
        + folded(f"All {len(report.labels)} labels", f"<p>{text(', '.join(report.labels))}</p>")
        + "</section>"
    )
