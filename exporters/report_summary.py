"""The top of the report in plain words: what each profile gets, what it is worth, and why it was taken."""

from __future__ import annotations

from exporters.report import Candidate, ExportReport, ProfileReport
from exporters.report_format import DASH, TIMES, between, megabytes, milliseconds, name_of, percent, points, text, times
from exporters.structure import Structure

_SAME_SIZE = 1.05
#: A precision in words.
PRECISIONS = {
    "fp32": "full precision, 32-bit numbers",
    "fp16": "16-bit numbers",
    "dynamic-s8": "8-bit weights, activations scaled as they come",
    "static-s8": "8-bit weights and activations scaled beforehand, by neural-compressor",
    "qdq-u8s8": "8-bit weights and activations, scaled beforehand",
    "qdq-s8-sym": "8-bit weights and activations around zero, as TensorRT takes them",
}


def summary(report: ExportReport) -> str:
    """Status, warnings, and a box for each profile."""
    base = report.baseline
    shipped = sum(profile.bundle is not None for profile in report.profiles.values())
    profiles = f"{shipped} of {len(report.profiles)} device profile{'s' if len(report.profiles) > 1 else ''}"
    told = "Nothing was shipped" if report.error else f"A bundle was written for {profiles}"
    model = f"The model tells {len(report.labels)} labels apart and was fine-tuned from {text(report.source)}"
    parts = [
        f"<p class='soft'>{told}. {model}. As it left the training (fp32) it has {megabytes(base.size_bytes)}, answers "
        f"{_right(report)} and takes {milliseconds(base.latency_s.p50 if base.latency_s else None)} for a text of 32 "
        "tokens on one thread of this machine. Everything below is compared with that.</p>"
    ]
    if report.error is not None:
        parts.append(
            f"<p class='notice bad' role='alert'><b>Nothing was shipped.</b> <span>{text(report.error)}.</span></p>"
        )
    parts += [f"<p class='notice warn'><b>Note:</b> <span>{text(warning)}.</span></p>" for warning in report.warnings]
    parts += [_verdict(name, profile, report) for name, profile in report.profiles.items()]
    return "".join(parts)


def chosen_of(profile: ProfileReport) -> Candidate | None:
    """The chosen candidate, if there is one."""
    return next((candidate for candidate in profile.candidates if candidate.chosen), None)


def described(c: Candidate) -> str:
    """What a candidate is, in words: what was pruned, its numbers, who configured them, and what rare words have."""
    parts = [PRECISIONS.get(c.precision, c.precision)]
    if c.structure is not None:
        parts.insert(0, f"pruned to {kept(c.structure, c.pruned.whole if c.pruned else None)}")
    if c.tuning:
        parts.append("configured by trials on validation texts")
    if c.rare_row_bits is not None:
        parts.append(f"{c.rare_row_bits} bits for words that the training data use least or not at all")
    return "; ".join(parts)


def kept(structure: Structure, whole: Structure | None) -> str:
    """A pruned network's sizes in words, beside those of the ``whole`` one where they are known."""

    def share(name: str) -> str:
        count, there = getattr(structure, name), getattr(whole, name, None)
        return f"{count:,}" if there is None else f"all {count:,}" if count == there else f"{count:,} of {there:,}"

    return (
        f"{share('layers')} layers, in each {share('heads')} heads and {share('ffn')} neurons; "
        f"{share('vocabulary')} words and pieces of words"
    )


def _right(report: ExportReport) -> str:
    base = report.baseline
    if base.test is None:
        return f"{percent(base.metrics.accuracy)} of {base.metrics.rows:,} validation texts rightly"
    lazy = f" (always the most frequent label: {percent(base.majority_accuracy)})" if base.majority_accuracy else ""
    return f"{percent(base.test.accuracy)} of {base.test.rows:,} test texts rightly{lazy}"


def _verdict(name: str, profile: ProfileReport, report: ExportReport) -> str:
    chosen = chosen_of(profile)
    if chosen is None:
        why = f"No candidate keeps its promises; the nearest: {text(profile.problem or 'there was none')}."
        return f"<section class='verdict'><h3 class='bad'>{text(name)}: nothing</h3><p>{why}</p></section>"
    what = described(chosen)
    words = "is shipped" if profile.bundle else "was chosen, but not shipped"
    kind = "good" if profile.bundle else "warn"
    why = f"Why: {text(chosen.reason)}. {_others(profile)}"
    return (
        f"<section class='verdict'><h3><span class='{kind}'>{text(name)}</span>: {name_of(chosen.name)} {words}</h3>"
        f"<p>{text(what[0].upper() + what[1:])}. {why}</p>{_tiles(chosen, report)}</section>"
    )


def _others(profile: ProfileReport) -> str:
    """How many candidates were tried beside the chosen one, and how many couldn't even be built."""
    built = [c for c in profile.models if c.size_bytes is not None and not c.chosen]
    absent = sum(c.size_bytes is None for c in profile.candidates)
    kept = sum(c.eligible for c in built)
    told = "No other candidate was tried."
    if built:
        told = f"{len(built)} other{'s were' if len(built) > 1 else ' was'} tried; {kept} would keep every promise too."
    return told + (f" {absent} more could not be built." if absent else "")


def _tiles(c: Candidate, report: ExportReport) -> str:
    base = report.baseline
    tiles = []
    if c.size_bytes is not None:
        ratio = base.size_bytes / c.size_bytes
        smaller = f"{ratio:.1f}{TIMES} smaller than" if ratio > _SAME_SIZE else "about as large as"
        tiles.append(("Model size", megabytes(c.size_bytes), f"{smaller} fp32, {megabytes(base.size_bytes)}"))
    tiles.append(_speed(c))
    tiles.append(_accuracy(c))
    if (agreement := c.test.agreement if c.test else c.agreement) is not None:
        tiles.append(("Answers as fp32", percent(agreement), "of the texts get the same label"))
    tiles += _memory(c)
    if c.bundle_size_bytes is not None:
        tiles.append(("Bundle", megabytes(c.bundle_size_bytes), "everything a device needs"))
    cells = "".join(
        f"<div><dt>{what}</dt><dd><b>{figure}</b><small>{note}</small></dd></div>" for what, figure, note in tiles
    )
    return f"<dl class='tiles'>{cells}</dl>"


def _speed(c: Candidate) -> tuple[str, str, str]:
    """What the device said where it was asked; else this machine's figures, which count only where it is such a one."""
    what = "Speed against fp32"
    if (found := c.target) is not None:
        threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
        took = f"for {found.batch} {TIMES} {found.length} tokens on {threads}"
        where = f"measured on the target ({text(found.measured_on.host)})"
        if found.speedup is None:
            return "Latency", milliseconds(found.p50), f"{took}; {where}, fp32 was not measured there"
        return what, times(found.speedup), f"{milliseconds(found.p50)} {took}; {where}"
    if c.speedup is None or c.latency_s is None:
        return what, DASH, "not measured"
    if c.measured_on.matches_profile:
        return what, times(c.speedup), f"{milliseconds(c.latency_s.p50)} per text of 32 tokens"
    here = f"on this machine {times(c.speedup)}, {milliseconds(c.latency_s.p50)}"
    return what, DASH, f"not measured on such a device; {here}"


def _memory(c: Candidate) -> list[tuple[str, str, str]]:
    what, alone = "Memory", "resident, the model alone"
    if c.target is not None and c.target.rss_bytes is not None:
        return [(what, megabytes(c.target.rss_bytes), f"{alone}; measured on the target")]
    if c.rss_bytes is None:
        return []
    if c.target is None and c.measured_on.matches_profile:
        return [(what, megabytes(c.rss_bytes), alone)]
    missing = "not measured on such a device" if c.target is None else "not measured on the target"
    return [(what, DASH, f"{missing}; on this machine {megabytes(c.rss_bytes)}")]


def _accuracy(c: Candidate) -> tuple[str, str, str]:
    if c.test is not None and c.test.metrics is not None and c.test.drop is not None:
        drop = c.test.drop
        spread = between(-drop.high, -drop.low)
        lost = f"{points(-drop.value)} against fp32 (95 %: {spread}), {c.test.metrics.rows:,} test texts"
        return "Accuracy", percent(c.test.metrics.accuracy), lost
    if c.metrics is not None and c.drop is not None:
        return "Accuracy", percent(c.metrics.accuracy), f"{points(-c.drop.value)} against fp32, on validation"
    return "Accuracy", DASH, text(c.not_measured or "not measured")
