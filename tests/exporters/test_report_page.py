"""The page for people: whole, readable, honest about what wasn't measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from aios_edge.cli.export import _print
from aios_edge.measurement import MeasuredOn
from exporters.calibration import Calibration
from exporters.class_drop import class_drops
from exporters.confusion import confusion
from exporters.evaluate import metrics, quality
from exporters.quantize import Tuned
from exporters.recipe import DistillSection
from exporters.recovery_search import ShortTraining
from exporters.report import (
    Baseline,
    Candidate,
    ExportReport,
    Finetuned,
    Interval,
    Latency,
    ProfileReport,
    Pruned,
    Target,
    Training,
)
from exporters.report_page import page
from exporters.report_plots import Point, curve, front, scatter
from exporters.report_style import DARK, LIGHT
from exporters.structure import Structure

VOID = {"meta", "br", "wbr"}


class Balanced(HTMLParser):
    """Every element is closed where it should be; text by the element that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def host(*, on_target: bool) -> MeasuredOn:
    return MeasuredOn(
        host="a machine", cpu_flags=("avx2",), matches_profile=on_target, reasons=("why",), runtime="ort 1.0"
    )


def candidate(name: str, labels: tuple[str, ...], *, on_target: bool = True, **changes: Any) -> Candidate:
    rows = np.arange(len(labels) * 10) % len(labels)
    reference = np.eye(len(labels), dtype=np.float32)[rows]
    logits = reference.copy()
    logits[0] = reference[1]
    tested = quality("test", logits, reference, rows, labels)
    base: dict[str, Any] = {
        "name": name,
        "precision": "dynamic-s8",
        "chosen": False,
        "eligible": True,
        "reason": "keeps its promises",
        "size_bytes": 23_000_000,
        "bundle_size_bytes": 24_000_000,
        "metrics": metrics(logits.argmax(axis=1), rows, labels),
        "drop": Interval(value=0.001, low=-0.001, high=0.002, split="validation"),
        "agreement": 0.99,
        "speedup": 2.5,
        "latency_s": Latency(p50=0.0035, p95=0.004),
        "latency": (),
        "rss_bytes": 90_000_000,
        "max_batch_size": 4,
        "measured_on": host(on_target=on_target),
        "operators": {"MatMul": 3},
    }
    if changes.get("chosen"):
        base |= {
            "test": tested,
            "calibration": Calibration(temperature=1.3, error_before=0.05, error_after=0.01),
            "confusion": confusion("test", logits, reference, rows, labels),
            "class_drops": class_drops(logits, reference, rows, labels, max_drop=0.01),
        }
    return Candidate(**{**base, **changes})


def report_of(labels: tuple[str, ...], profiles: dict[str, ProfileReport], **changes: Any) -> ExportReport:
    rows = np.arange(len(labels) * 10) % len(labels)
    right = metrics(rows, rows, labels)
    base: dict[str, Any] = {
        "schema": "1.0",
        "name": "mood",
        "version": "1.0.0",
        "recipe": {"model": {"source": "m"}},
        "source": "m",
        "data": "train.csv sha256:0 (1 train, 1 validation rows)",
        "labels": labels,
        "tools": {"aios-edge": "1"},
        "baseline": Baseline(
            size_bytes=91_000_000,
            latency_s=Latency(p50=0.009, p95=0.01),
            rss_bytes=1,
            metrics=right,
            test=right,
            majority_accuracy=0.5,
            parity=1e-6,
        ),
        "finetuned": Finetuned(
            method="full",
            epochs=2,
            best_epoch=2,
            validation_accuracy=(0.5, 0.9),
            precision="fp32",
            trained_parameters=10,
            metrics=right,
            training_loss=(0.7, 0.2),
        ),
        "profiles": profiles,
        "warnings": (),
        "wall_s": 1.0,
        "stages": {"built": ("convert/1",), "reused": ()},
    }
    return ExportReport(**{**base, **changes})


def profile_of(*candidates: Candidate, **changes: Any) -> ProfileReport:
    chosen = next((c.name for c in candidates if c.chosen), None)
    base = {"chosen": chosen, "bundle": "p" if chosen else None, "bundle_id": "0" * 64 if chosen else None}
    return ProfileReport(**{**base, "max_drop": 0.01, "candidates": candidates, **changes})


def numbered(count: int) -> tuple[str, ...]:
    return tuple(f"label-{index}" for index in range(count))


def shown(report: ExportReport) -> str:
    text = page(report)
    check = Balanced()
    check.feed(text)
    assert check.open == []
    assert not {"script", "img", "link", "a"} & set(check.seen)
    return text


@pytest.mark.parametrize("count", [2, 20, 150])
def test_any_number_of_classes_makes_a_whole_page(count: int) -> None:
    labels = numbered(count)
    text = shown(report_of(labels, {"p": profile_of(candidate("dynamic-s8", labels, chosen=True))}))
    assert ("style='--a:" in text) == (count <= 40)  # the shaded table
    assert ("All 150 classes" in text) == (count == 150)
    assert text.index(">label-0<") < text.index(">label-1<")  # it lost a row: first in the table
    assert "temperature 1.3" in text and "off by 1.00 %" in text and "by 5.00 %" in text
    for picture in re.findall(r"<svg[^>]*>", text):
        assert "role='img'" in picture and "aria-label='" in picture


def test_what_was_not_measured_is_said_and_not_drawn() -> None:
    labels = numbered(2)
    nothing = candidate("h4-f512+dynamic-s8", labels, latency_s=None, speedup=None)
    blank = candidate(
        "qdq", labels, drop=None, metrics=None, size_bytes=None, latency_s=None, speedup=None, eligible=False
    )
    text = shown(report_of(labels, {"p": profile_of(candidate("a", labels, chosen=True), nothing, blank)}))
    assert "f512+<wbr>dynamic-<wbr>s8</code> (no latency)" in text
    assert "qdq</code> (no accuracy and no size and no latency)" in text
    size, latency = re.findall(r"<svg.*?</svg>", text, re.DOTALL)[:2]
    assert "f512" in size and "f512" not in latency and "qdq" not in size + latency
    assert "not measured" in text


def test_figures_of_another_machine_are_said_to_be_so() -> None:
    labels = numbered(2)
    text = shown(report_of(labels, {"p": profile_of(candidate("a", labels, chosen=True, on_target=False))}))
    assert "not measured on such a device; on this machine 2.50&times;" in text
    assert "this machine, not the target" in text and "unmeasured on target" in text


def on_device(**changes: Any) -> Target:
    base: dict[str, Any] = {
        "p50": 0.031,
        "p95": 0.04,
        "batch": 1,
        "length": 64,
        "threads": 4,
        "speedup": 1.75,
        "interleaved": True,
        "rss_bytes": 77_000_000,
        "provider": "CPUExecutionProvider",
        "bundle_id": "0" * 64,
        "measured_on": MeasuredOn(host="a <board>", cpu_flags=(), matches_profile=True, reasons=(), runtime="ort 1.0"),
    }
    return Target(**{**base, **changes})


def test_what_the_device_said_stands_in_the_tiles() -> None:
    labels = numbered(2)

    def tiles(target: Target) -> str:
        won = candidate("a", labels, chosen=True, on_target=False, target=target)
        text = shown(report_of(labels, {"p": profile_of(won)}))
        assert "not measured on such a device" not in text and "unmeasured on target" not in text
        return text[text.index("<dl class='tiles'>") : text.index("</dl>")]

    text = tiles(on_device())
    assert "<b>1.75&times;</b><small>31 ms for 1 &times; 64 tokens on 4 threads; measured on the target" in text
    assert "(a &lt;board&gt;)" in text and "2.50&times;" not in text
    assert "<b>77.0 MB</b><small>resident, the model alone; measured on the target" in text and "90.0 MB" not in text
    text = tiles(on_device(speedup=None, rss_bytes=None))
    assert "<dt>Latency</dt><dd><b>31 ms</b>" in text and "fp32 was not measured there" in text
    assert "not measured on the target; on this machine 90.0 MB" in text


def pruned_candidate(labels: tuple[str, ...], precision: str = "dynamic-s8-e2", **changes: Any) -> Candidate:
    small = Structure(layers=6, heads=4, ffn=512, vocabulary=30522)
    alone = Pruned(
        whole=Structure(layers=6, heads=12, ffn=1536, vocabulary=30522),
        size_bytes=59_000_000,
        accuracy=0.85,
        drop=Interval(value=0.002, low=0.0, high=0.004, split="validation"),
        agreement=0.95,
        latency_s=Latency(p50=0.00456, p95=0.005),
        speedup=1.97,
    )
    recovery = Training(
        epochs=3,
        best_epoch=2,
        validation_accuracy=(0.8, 0.88, 0.87),
        training_loss=(0.5, 0.3, 0.2),
        settings=DistillSection(learning_rate=0.000345678),
    )
    pruned = {"rare_row_bits": 2, "structure": small, "pruned": alone, "recovery": recovery}
    return candidate(f"{small.name}+{precision}", labels, **{**pruned, **changes})


def test_a_pruned_network_is_told_in_words_and_pruning_is_a_step_of_its_own() -> None:
    labels = numbered(2)
    won, fp32 = pruned_candidate(labels, chosen=True), candidate("fp32", labels, precision="fp32")
    text = shown(report_of(labels, {"p": profile_of(won, fp32)}))
    kept = "runed to all 6 layers, in each 4 of 12 heads and 512 of 1,536 neurons; all 30,522 words"
    assert text.count(kept) == 4  # what the profile gets, two steps, and the model in detail
    assert text.count("2 bits for words that the training data use least or not at all") == 3
    steps = re.findall(r"<tr.*?</tr>", text[text.index("What each stage bought") :].partition("</table>")[0])[1:]
    assert [re.sub("<.*?>", "", row).split("runed")[0] for row in steps][1:] == [
        "l6-h4-f512-v30522p",
        "l6-h4-f512-v30522+dynamic-s8-e2p",
    ]
    assert "fine-<wbr>tuned" in steps[0]
    assert "59.0 MB" in steps[1] and "1.97&times;" in steps[1] and "4.56 ms" in steps[1] and "85.00 %" in steps[1]
    assert "quantiz" not in steps[1] and "8-bit" not in steps[1] and "8-bit" in steps[2]


def test_a_pruned_network_s_recovery_is_drawn_beside_the_fine_tuning() -> None:
    labels = numbered(2)
    plain = candidate("dynamic-s8", labels, chosen=True)
    other = pruned_candidate(labels, "dynamic-s8-e4")
    text = shown(report_of(labels, {"p": profile_of(plain, pruned_candidate(labels), other)}))
    drawn = text[text.index("<h2>Training</h2>") :]
    assert text.count("Recovery of <code>l6-h4-f512-v30522</code>") == 1
    assert "3 epochs" in drawn and drawn.count("class='curve'") == 4 and "kept: 0.8800" in drawn


def test_what_the_recovery_really_trained_with_is_shown() -> None:
    labels = numbered(2)
    plain = pruned_candidate(labels, chosen=True)
    text = shown(report_of(labels, {"p": profile_of(plain)}))
    assert (
        "Learning rate 0.000346" in text
        and "as the recipe's <code>[distill]</code> says." in text
        and "Trials of the recovery" not in text
    )
    assert plain.recovery is not None
    tried = tuple(
        ShortTraining(
            epochs=1,
            learning_rate=rate,
            temperature=2.0,
            teacher_weight=0.9,
            state_weight=1.0,
            validation_accuracy=0.81,
            kept=kept,
        )
        for rate, kept in ((2e-4, False), (0.000345678, True))
    )
    searched = msgspec.structs.replace(plain, recovery=msgspec.structs.replace(plain.recovery, trials=tried))
    text = shown(report_of(labels, {"p": profile_of(searched)}))
    assert "as in the best of 2 short trainings (<code>[search] trials</code>), whatever" in text
    assert "<tr class='chosen'><td>2</td><td>0.000346</td>" in text and ">kept</td>" in text


def test_what_a_search_found_is_shown() -> None:
    labels = numbered(2)
    trials = (
        Tuned(configuration="all of it", accuracy=0.9, agreement=0.91, rows=77),
        Tuned(configuration="but <softmax>", accuracy=0.95, agreement=0.97, rows=77, kept=True),
    )
    plain = candidate("a", labels, chosen=True)
    text = shown(report_of(labels, {"p": profile_of(plain)}))
    assert "Left in float" not in text and "Trials of the tuning" not in text
    tried = candidate("b", labels, tuning=trials, kept_float=("/layer.0/<Add>", "/layer.3/Add"))
    text = shown(report_of(labels, {"p": profile_of(plain, tried)}))
    assert "<code>/layer.0/&lt;Add&gt;</code>" in text and "rowspan='2'" in text
    assert text.index("all of it") < text.index("but &lt;softmax&gt;") and "97.00 %" in text and ">kept<" in text


def test_the_terminal_has_the_figures_of_all_candidates_below_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = numbered(2)
    short, long = (candidate(name, labels) for name in ("fp32", "l6-h4-f512-v10000+dynamic-s8-e4-r7"))
    _print(report_of(labels, {"p": profile_of(short), "q": profile_of(long)}), tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if "agreement" in line]
    assert len(rows) == 2 and len({row.index("agreement") for row in rows}) == 1


def test_a_candidate_that_came_out_as_another_one_is_told_and_not_counted_or_drawn() -> None:
    labels = numbered(2)
    plain, other = candidate("static", labels, chosen=True), candidate("fp32", labels)
    trials = (Tuned(configuration="defaults", accuracy=0.9, agreement=0.91, rows=77, kept=True),)
    twin = candidate("tuned", labels, reason="the same model as static", same_model_as="static", tuning=trials)
    text = shown(report_of(labels, {"p": profile_of(plain, other, twin)}))
    assert "the same model as static" in text and "Trials of the tuning" in text
    assert "1 other was tried; 1 would keep every promise too.</p>" in text
    drawn = [re.findall(r"(\w+): [-.\d]+, ", label) for label in re.findall(r"aria-label='([^']*points[^']*)'", text)]
    assert drawn == [["static", "fp32"]] * 2
    assert text.count("MatMul 3") == 2  # operators of each graph, once


@pytest.mark.parametrize(
    ("built", "absent", "told"),
    [
        (0, 0, "No other candidate was tried.</p>"),
        (0, 1, "No other candidate was tried. 1 more could not be built.</p>"),
        (1, 0, "1 other was tried; 1 would keep every promise too.</p>"),
        (2, 2, "2 others were tried; 1 would keep every promise too. 2 more could not be built.</p>"),
    ],
)
def test_what_could_not_be_built_was_not_tried(built: int, absent: int, told: str) -> None:
    labels = numbered(2)
    others = [candidate(f"tried-{at}", labels, eligible=not at) for at in range(built)]
    lost = {"size_bytes": None, "bundle_size_bytes": None, "metrics": None, "eligible": False}
    others += [candidate(f"absent-{at}", labels, **lost) for at in range(absent)]
    assert told in shown(report_of(labels, {"p": profile_of(candidate("a", labels, chosen=True), *others)}))


def test_a_model_of_two_profiles_is_described_once() -> None:
    labels = numbered(2)
    same = profile_of(candidate("a", labels, chosen=True))
    text = shown(report_of(labels, {"p": same, "q": same, "r": profile_of(candidate("b", labels, chosen=True))}))
    assert text.count(" in detail</h2>") == 2 and "Chosen for p, q." in text
    assert "written for 3 of 3 device profiles" in text


def test_a_failed_export_says_so_first() -> None:
    labels = numbered(2)
    lost = candidate("a", labels, eligible=False, reason="loses too much of the class 'x'")
    failed = profile_of(lost, problem="a loses too much; use another precision")
    other = msgspec.structs.replace(profile_of(candidate("b", labels, chosen=True)), bundle=None, bundle_id=None)
    text = shown(report_of(labels, {"p": failed, "q": other}, error="[class_drop] <p>: no candidate"))
    assert text.index("[class_drop] &lt;p&gt;: no candidate.") < text.index("What each stage bought")
    assert "p: nothing</h3>" in text and "was chosen, but not shipped" in text
    assert "<b class='bad'>Out:</b> loses too much of the class &#x27;x&#x27;" in text


def test_nothing_trained_and_nothing_tried_is_a_page_too() -> None:
    labels = numbered(2)
    report = report_of(labels, {"p": profile_of(problem="Name a precision")}, error="e")
    untrained = msgspec.structs.replace(report.finetuned, validation_accuracy=(), training_loss=(), best_epoch=None)
    assert "The source was fine-tuned already" in shown(msgspec.structs.replace(report, finetuned=untrained))
    older = msgspec.structs.replace(report.finetuned, training_loss=())
    assert "not recorded" in shown(msgspec.structs.replace(report, finetuned=older))


def point(name: str, x: float, drop: float, state: Any = "kept") -> Point:
    return Point(name=name, number=1, x=x, drop=drop, low=drop - 0.1, high=drop + 0.1, state=state)


def test_the_front_has_who_is_beaten_by_nobody_who_keeps_promises() -> None:
    points = [
        point("big", 90, 0),
        point("mid", 23, 0.1, "chosen"),
        point("worse", 40, 0.3),
        point("lost", 5, 9, "missed"),
    ]
    assert [p.name for p in front(points)] == ["mid", "big"]
    assert front([point("a", 1, 0), point("b", 1, 0)])[0].name == "a"


def test_an_outlier_lies_at_the_edge_with_its_figure() -> None:
    drawn = scatter([point("a", 10, 0.1), point("b", 5, 60, "missed")], title="t", x_label="MB", max_drop=1)
    assert "b (+60.0 ↑)" in drawn and "allowed: 1" in drawn
    high = [float(y) for y in re.findall(r"class='missed' cx='[\d.]+' cy='([\d.]+)'", drawn)]
    assert all(0 < y < 40 for y in high)


def test_labels_of_many_points_do_not_lie_on_each_other() -> None:
    chance = np.random.default_rng(0)
    points = [
        Point(name=f"h{n}-f512-v12000/dynamic-s8", number=n, x=float(x), drop=float(d), low=0, high=0, state="kept")
        for n, (x, d) in enumerate(chance.random((8, 2)), start=1)
    ]
    drawn = scatter(points, title="t", x_label="MB", max_drop=1)
    rows = [float(y) for y in re.findall(r"<text x='[\d.]+' y='([\d.]+)' text-anchor='(?:start|middle|end)'>h", drawn)]
    assert rows and len(rows) == len({round(y) for y in rows})


@pytest.mark.parametrize("values", [(0.5,), (0.9, 0.9), (0.1, 0.4, 0.3)])
def test_a_curve_of_any_length(values: tuple[float, ...]) -> None:
    drawn = curve(values, title="t", y_label="loss", best=1)
    assert drawn.count("class='dot'") == len(values) and f"kept: {values[0]:.4f}" in drawn


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_on_every_ground(colours: dict[str, str]) -> None:
    for ground in ("back", "card", "chosen"):
        for ink in ("text", "soft", "good", "warn", "bad"):
            low, high = sorted((luminance(colours[ground]), luminance(colours[ink])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ground, ink)
