"""The report's tables of classes: which got worse, and what is taken for what."""

from __future__ import annotations

from exporters.class_drop import ClassDrop
from exporters.confusion import Confusion
from exporters.evaluate import ClassMetrics
from exporters.report import Candidate
from exporters.report_format import DASH, folded, points, table, text

#: Tables of classes this long are shown whole; of longer ones only the worst rows are, the rest is folded away.
_FEW = 12
#: More labels than that, and the heads stand upright in small print.
_WIDE = 8
#: The square root of an error's share, times this, is its shade: errors are few beside right answers.
_SHADE = 0.5


def by_class(c: Candidate) -> str:
    """Precision, recall and F1 of each class, those that lost most first."""
    found = c.test.metrics if c.test and c.test.metrics else c.metrics
    if found is None:
        return ""
    split = "test" if c.test and c.test.metrics else "validation"
    changed = {entry.label: entry for entry in c.class_drops}
    worst = sorted(
        found.per_class, key=lambda m: (-changed[m.label].drop if m.label in changed else 0.0, m.f1, m.label)
    )
    worse, better = (sum((d.drop > 0) == up and d.drop != 0 for d in changed.values()) for up in (True, False))
    told = (
        f"{len(worst)} classes on {split}: recall is lower than fp32's in {worse}, higher in {better}, else the same."
    )
    ruined = [text(entry.label) for entry in c.class_drops if entry.ruined]
    told += (
        f" <b class='bad'>Ruined: {', '.join(ruined)}.</b>" if ruined else " None is lost beyond chance and tolerance."
    )
    head = ["|class", "precision", "recall", "F1", "rows", "recall lost", "rows lost / gained", "chance"]
    rows = [_class_row(entry, changed.get(entry.label)) for entry in worst]
    caption = "Sorted by what got worst. Chance: how often as many rows are lost by luck alone (paired sign test)"
    if len(rows) <= _FEW:
        return f"<p>{told}</p>{table(head, rows, caption=caption)}"
    shown = table(head, rows[:_FEW], caption=f"The first {_FEW}. {caption}")
    return f"<p>{told}</p>{shown}{folded(f'All {len(rows)} classes', table(head, rows, caption=caption))}"


def _class_row(entry: ClassMetrics, changed: ClassDrop | None) -> str:
    moved = ("0.00 pt", "0 / 0", DASH)
    if changed is not None:
        moved = (points(changed.drop, sign=False), f"{changed.lost} / {changed.gained}", f"{changed.p_value:.2g}")
    kind = " class='bad'" if changed is not None and changed.ruined else ""
    figures = "".join(f"<td>{value:.3f}</td>" for value in (entry.precision, entry.recall, entry.f1))
    cells = "".join(f"<td>{cell}</td>" for cell in moved)
    return (
        f"<tr{kind}><th scope='row' class='name'>{text(entry.label)}</th>{figures}<td>{entry.support}</td>{cells}</tr>"
    )


def confused(found: Confusion, labels: tuple[str, ...]) -> str:
    """Who is taken for whom: a shaded table of few labels, a list of the most confused pairs of many."""
    head = ["|true label", "|answered", "rows", "fp32's rows"]
    rows = [
        f"<tr><th scope='row' class='name'>{text(p.truth)}</th><td class='name'>{text(p.answer)}</td>"
        f"<td>{p.rows}</td><td>{p.fp32_rows}</td></tr>"
        for p in found.pairs
    ]

    def most(count: int) -> str:
        listed = found.pairs[:count]
        told = f"{sum(p.rows for p in listed)} of {found.wrong} wrong answers on {text(found.split)}"
        return table(head, rows[:count], caption=f"The {len(listed)} most confused pairs: {told}")

    if found.matrix is None:
        return most(_FEW) + (folded(f"{len(rows)} pairs", most(len(rows))) if len(rows) > _FEW else "")
    matrix = _matrix(found.matrix, labels, found.split)
    if len(labels) <= _FEW:
        return matrix
    return most(_FEW) + folded(f"The whole table, {len(labels)} labels", matrix)


def _matrix(counts: tuple[tuple[int, ...], ...], labels: tuple[str, ...], split: str) -> str:
    rows = []
    for truth, (label, row) in enumerate(zip(labels, counts, strict=True)):
        total = sum(row) or 1
        cells = []
        for answer, count in enumerate(row):
            kind = "hit" if answer == truth else "miss"
            shade = f" class='{kind}' style='--a:{_SHADE * (count / total) ** 0.5:.2f}'" if count else ""
            cells.append(f"<td{shade}>{count}</td>")
        rows.append(f"<tr><th scope='row' class='name'>{text(label)}</th>{''.join(cells)}</tr>")
    kind = "confusion many" if len(labels) > _WIDE else "confusion"
    caption = f"Rows: true label. Columns: answer. Counts on {text(split)}"
    return table(["|", *map(text, labels)], rows, caption=caption, kind=kind)
