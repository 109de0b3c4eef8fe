"""The report's tables of candidates: what each costs, why it was taken or not, and what each step bought."""

from __future__ import annotations

from exporters.report import Candidate, ExportReport, ProfileReport, Pruned
from exporters.report_format import (
    DASH,
    NONE,
    TIMES,
    between,
    folded,
    megabytes,
    milliseconds,
    name_of,
    percent,
    points,
    table,
    text,
    times,
)
from exporters.report_summary import chosen_of, described, kept
from exporters.structure import Structure

_BAR_PX = 90
_COLUMNS = ("#", "|candidate", "size", "accuracy", "lost (95 %)", "same answer", "speed", "p50", "p95", "memory")


def candidates(profile: ProfileReport) -> str:
    """One row per candidate, in the profile's order of preference; numbered as in the plots."""
    rows = []
    for number, c in enumerate(profile.candidates, start=1):
        spread = f"<br><small class='soft'>{between(c.drop.low, c.drop.high, sign=False)}</small>" if c.drop else ""
        cells = (
            megabytes(c.size_bytes),
            percent(c.metrics.accuracy if c.metrics else None),
            points(c.drop.value, sign=False) + spread if c.drop else NONE,
            percent(c.agreement),
            times(c.speedup),
            milliseconds(c.latency_s.p50 if c.latency_s else None),
            milliseconds(c.latency_s.p95 if c.latency_s else None),
            megabytes(c.rss_bytes),
        )
        mark = " class='chosen'" if c.chosen else ""
        verdict = "<b>Chosen:</b> " if c.chosen else "" if c.eligible else "<b class='bad'>Out:</b> "
        words = (
            verdict
            + text(c.reason)
            + (f" <span class='soft'>({text(c.not_measured)})</span>" if c.not_measured not in (None, c.reason) else "")
        )
        rows.append(
            f"<tbody{mark}><tr><td>{number}</td><th scope='row' class='name'>{name_of(c.name)}</th>"
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            f"<tr><td></td><td class='words' colspan='{len(_COLUMNS) - 1}'>{words}</td></tr></tbody>"
        )
    caption = "Accuracy on validation rows, where the choice is made; latency of one text of 32 tokens on one thread"
    return table(_COLUMNS, rows, caption=caption, kind="pairs")


def latencies(profile: ProfileReport) -> str:
    """Every shape that was timed."""
    rows = [
        f"<tr><th scope='row' class='name'>{name_of(c.name)}</th><td>{t.batch} {TIMES} {t.length}</td>"
        f"<td>{t.threads}</td>"
        f"<td>{milliseconds(t.p50)}</td><td>{milliseconds(t.p95)}</td><td>{milliseconds(t.fp32_p50)}</td>"
        f"<td>{times(t.speedup)}</td><td>{t.samples}</td></tr>"
        for c in profile.models
        for t in c.latency
    ]
    if not rows:
        return ""
    head = ["|candidate", f"texts {TIMES} tokens", "threads", "p50", "p95", "fp32 p50", "speed", "runs"]
    return folded(
        "All latencies", table(head, rows, caption="Candidate and fp32 in turn; speed is the median of the pairs")
    )


def operators(profile: ProfileReport) -> str:
    """What the graphs are made of."""
    rows = []
    for c in profile.models:
        counted = ", ".join(f"{text(name)} {n}" for name, n in sorted(c.operators.items(), key=lambda e: (-e[1], e[0])))
        if counted:
            rows.append(f"<tr><th scope='row' class='name'>{name_of(c.name)}</th><td class='words'>{counted}</td></tr>")
    return folded("Operators of each graph", table(["|candidate", "|operators"], rows, caption="How often each occurs"))


def kept_float(profile: ProfileReport) -> str:
    """What harmed the answers most and so was not quantized."""
    rows = []
    for c in profile.candidates:
        for at, activation in enumerate(c.kept_float):
            head = (
                f"<th scope='row' class='name' rowspan='{len(c.kept_float)}'>{name_of(c.name)}</th>" if not at else ""
            )
            rows.append(f"<tr>{head}<td class='words'><code>{text(activation)}</code></td></tr>")
    if not rows:
        return ""
    caption = "Activations whose products stay in float, the most harmful first"
    return folded("Left in float", table(["|candidate", "|activation"], rows, caption=caption))


def tuning(profile: ProfileReport) -> str:
    """The trials of an accuracy-aware search."""
    rows = []
    for c in profile.candidates:
        for number, trial in enumerate(c.tuning, start=1):
            mark, kept = (" class='chosen'", "kept") if trial.kept else ("", "")
            rows.append(
                f"<tr{mark}><th scope='row' class='name'>{name_of(c.name)}</th><td>{number}</td>"
                f"<td class='words'>{text(trial.configuration)}</td><td>{percent(trial.accuracy)}</td>"
                f"<td>{percent(trial.agreement)}</td><td>{trial.rows}</td><td class='text'>{kept}</td></tr>"
            )
    if not rows:
        return ""
    head = ["|candidate", "trial", "|configuration", "accuracy", "same answer", "rows", "|"]
    return folded("Trials of the tuning", table(head, rows, caption="In their order, on validation rows"))


def stages(report: ExportReport) -> str:
    """From the fine-tuned model to each chosen one: what each step bought."""
    base = report.baseline
    latency = base.latency_s.p50 if base.latency_s else None
    what = "as it left the training, under onnxruntime's defaults"
    rows = [_step("fine-tuned", what, base.size_bytes, 1.0, latency, base.metrics.accuracy, report, chosen=False)]
    taken = {profile.chosen for profile in report.profiles.values()}
    steps: dict[str, Candidate] = {}
    for profile in report.profiles.values():
        for c in _way_to(profile):
            steps.setdefault(c.name, c)
    pruned: set[str] = set()
    for c in steps.values():
        if c.structure is not None and c.pruned is not None and c.structure.name not in pruned:
            pruned.add(c.structure.name)
            rows.append(_pruned_step(c.structure, c.pruned, report))
        what = "fused, the last layer for one token, optimised ahead" if c.name == "fp32" else described(c)
        latency, accuracy = c.latency_s.p50 if c.latency_s else None, c.metrics.accuracy if c.metrics else None
        rows.append(_step(c.name, what, c.size_bytes, c.speedup, latency, accuracy, report, chosen=c.name in taken))
    head = ("|step", "|what it is", "|size", "", "speed", "p50", "accuracy", "against fp32")
    caption = "Accuracy on validation rows; speed and p50 of one text of 32 tokens on one thread of this machine"
    return table(head, rows, caption=caption)


def _pruned_step(structure: Structure, found: Pruned, report: ExportReport) -> str:
    """Pruning and recovery by themselves, before quantization."""
    what = f"pruned to {kept(structure, found.whole)}; recovered by distillation, still in full precision"
    latency = found.latency_s.p50 if found.latency_s else None
    figures = (found.size_bytes, found.speedup, latency, found.accuracy)
    return _step(structure.name, what, *figures, report, chosen=False)


def _step(
    name: str,
    what: str,
    size: int | None,
    speed: float | None,
    latency_s: float | None,
    accuracy: float | None,
    report: ExportReport,
    *,
    chosen: bool,
) -> str:
    width = max(1, round((size or 0) / report.baseline.size_bytes * _BAR_PX))
    bar = (
        f"<span class='bar{' now' if chosen else ''}' style='width:{width}px' aria-hidden='true'></span>"
        if size
        else ""
    )
    moved = DASH if accuracy is None else points(accuracy - report.baseline.metrics.accuracy)
    figures = (times(speed), milliseconds(latency_s), percent(accuracy), moved)
    mark = " class='chosen'" if chosen else ""
    return (
        f"<tr{mark}><th scope='row' class='name'>{name_of(name)}</th><td class='words'>{text(what)}</td>"
        f"<td class='text'>{bar}</td><td>{megabytes(size)}</td>"
        f"{''.join(f'<td>{figure}</td>' for figure in figures)}</tr>"
    )


def _way_to(profile: ProfileReport) -> list[Candidate]:
    """The chosen candidate, behind fp32 where that lies between it and the fine-tuned model: what was pruned has a step
    of its own."""
    chosen = chosen_of(profile)
    if chosen is None:
        return []
    before = [c for c in profile.candidates if c.name == "fp32" and c is not chosen and chosen.structure is None]
    return [*before, chosen]
