"""``report.html``: the report for people, in one file that loads nothing from anywhere."""

from __future__ import annotations

from html import escape

from exporters.report import Candidate, ExportReport, ProfileReport

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1d21;background:#fff}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}th,td{padding:.3rem .6rem;text-align:right;
white-space:nowrap;border-bottom:1px solid #d7dbe0}th:first-child,td:first-child,td.text{text-align:left}
td.text{white-space:normal}tr.chosen{background:#e4f4ea;font-weight:600}h2{margin-top:2.5rem}.note{color:#5a6370}.warn{color:#8a4b00}svg{max-width:100%}
code{font-size:.9em}
@media(prefers-color-scheme:dark){body{color:#e6e8eb;background:#15181c}tr.chosen{background:#173a26}
th,td{border-color:#3a4048}.note{color:#9aa4b0}.warn{color:#ffb454}}
"""
_WIDTH, _HEIGHT, _MARGIN = 620, 300, 50


def page(report: ExportReport) -> str:
    """The whole page."""
    base = report.baseline
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>{_t(report.name)} {_t(report.version)}: export report</title><style>{_STYLE}</style>",
        f"<h1>{_t(report.name)} {_t(report.version)}</h1>",
        f"<p>Fine-tuned ({_t(report.finetuned.method)}) fp32: validation accuracy {_share(base.metrics.accuracy)}, "
        f"test {_share(base.test.accuracy if base.test else None)}, {_mb(base.size_bytes)}, "
        f"{_ms(base.latency_s.p50 if base.latency_s else None)} for one request of 32 tokens on one thread; "
        f"parity with torch within {base.parity:.1e}.</p>",
    ]
    if report.error is not None:
        parts.append(f"<p class='warn'><b>{_t(report.error)}.</b></p>")
    parts += [f"<p class='warn'>{_t(warning)}.</p>" for warning in report.warnings]
    for name, profile in report.profiles.items():
        parts.append(_profile(name, profile))
    parts.append(_provenance(report))
    return "\n".join(parts) + "\n"


def _profile(name: str, profile: ProfileReport) -> str:
    if profile.chosen is None:
        verdict = f"<p class='warn'>Nothing was shipped: {_t(profile.problem or '')}.</p>"
    else:
        verdict = f"<p><b>{_t(profile.chosen)}</b>: {_t(_chosen(profile).reason)}.</p>"
    head = (
        "<tr><th>candidate<th>size<th>accuracy<th>drop (95 %)<th>agreement<th>speed-up<th>p50<th>p95<th>memory<th>test"
    )
    rows = "".join(_row(candidate) for candidate in profile.candidates)
    reasons = "".join(f"<li>{_t(candidate.name)}: {_t(candidate.reason)}</li>" for candidate in profile.candidates)
    where = profile.candidates[0].measured_on if profile.candidates else None
    note = ""
    if where is not None:
        fits = "of this profile's class" if where.matches_profile else f"not of this class: {'; '.join(where.reasons)}"
        note = f"<p class='note'>Measured on {_t(where.host)} ({_t(fits)}), {_t(where.runtime)}.</p>"
    classes = _classes(_chosen(profile)) + _calibration(_chosen(profile)) if profile.chosen else ""
    return (
        f"<h2>{_t(name)}</h2>{verdict}<table>{head}</tr>{rows}</table><ul>{reasons}</ul>{note}"
        f"{_scatter(profile.candidates)}{classes}"
    )


def _row(c: Candidate) -> str:
    drop = f"{c.drop.value * 100:+.2f} [{c.drop.low * 100:+.2f}, {c.drop.high * 100:+.2f}] pt" if c.drop else "n/a"
    speedup = f"{c.speedup:.2f}x" if c.speedup is not None else "n/a"
    cells = (
        _mb(c.size_bytes),
        _share(c.metrics.accuracy if c.metrics else None),
        drop,
        _share(c.agreement),
        speedup,
        _ms(c.latency_s.p50 if c.latency_s else None),
        _ms(c.latency_s.p95 if c.latency_s else None),
        _mb(c.rss_bytes),
        _share(c.test.metrics.accuracy if c.test and c.test.metrics else None),
    )
    mark = " class='chosen'" if c.chosen else ""
    return f"<tr{mark}><td>{_t(c.name)}{''.join(f'<td>{cell}' for cell in cells)}</tr>"


def _classes(c: Candidate) -> str:
    found = c.test.metrics if c.test and c.test.metrics else c.metrics
    if found is None:
        return ""
    rows = "".join(
        f"<tr><td>{_t(entry.label)}<td>{entry.precision:.3f}<td>{entry.recall:.3f}<td>{entry.f1:.3f}<td>{entry.support}"
        for entry in found.per_class
    )
    split = "test" if c.test and c.test.metrics else "validation"
    head = "<tr><th>class<th>precision<th>recall<th>F1<th>rows</tr>"
    return f"<h3>{_t(c.name)} by class ({split})</h3><table>{head}{rows}</table>"


def _calibration(c: Candidate) -> str:
    found = c.calibration
    if found is None:
        return ""
    return (
        f"<p>Its scores are divided by temperature {found.temperature:g}, fitted on validation: expected calibration "
        f"error {found.error_after:.4f} on {found.split}, {found.error_before:.4f} without.</p>"
    )


def _scatter(candidates: tuple[Candidate, ...]) -> str:
    """Size against latency: down and left is better."""
    points = [(c.size_bytes, c.latency_s.p50, c) for c in candidates if c.size_bytes and c.latency_s]
    if not points:
        return ""
    widest, slowest = max(p[0] for p in points) * 1.15, max(p[1] for p in points) * 1.15
    dots = []
    for size, latency, candidate in points:
        x = _MARGIN + size / widest * (_WIDTH - 2 * _MARGIN)
        y = _HEIGHT - _MARGIN - latency / slowest * (_HEIGHT - 2 * _MARGIN)
        fill = "#1f9d55" if candidate.chosen else "#8a94a0"
        dots.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='6' fill='{fill}'/>")
        dots.append(f"<text x='{x:.1f}' y='{y - 10:.1f}' text-anchor='middle'>{_t(candidate.name)}</text>")
    base, right = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' role='img' aria-label='size against latency' "
        "fill='currentColor' font-size='12'>"
        f"<path d='M{_MARGIN} {_MARGIN}V{base}H{right}' fill='none' stroke='currentColor'/>"
        f"<text x='{right}' y='{base + 30}' text-anchor='end'>size, to {widest / 1e6:.1f} MB</text>"
        f"<text x='{_MARGIN}' y='{_MARGIN - 15}'>p50 latency, to {slowest * 1e3:.1f} ms</text>{''.join(dots)}</svg>"
    )


def _provenance(report: ExportReport) -> str:
    tools = ", ".join(f"{name} {version}" for name, version in report.tools.items())
    rows = {
        "source": report.source,
        "data": report.data,
        "labels": ", ".join(report.labels),
        "tools": tools,
        "took": f"{report.wall_s:.0f} s, {_mb(report.peak_rss_bytes)} of memory at most",
    }
    cells = "".join(f"<tr><td>{_t(key)}<td class='text'>{_t(value)}</tr>" for key, value in rows.items())
    return f"<h2>Provenance</h2><table>{cells}</table>"


def _chosen(profile: ProfileReport) -> Candidate:
    return next(candidate for candidate in profile.candidates if candidate.chosen)


def _t(text: str) -> str:
    return escape(text, quote=True)


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _mb(value: int | None) -> str:
    return "n/a" if value is None else f"{value / 1e6:.1f} MB"


def _ms(value: float | None) -> str:
    return "n/a" if value is None else f"{value * 1e3:.2f} ms"
