"""``MODEL_CARD.md``: what a bundle's model is for, how good it is and where that ends, for those who get the bundle.

Sections follow "Model Cards for Model Reporting" (Mitchell et al., 2019).
"""

from __future__ import annotations

import re

from exporters.class_drop import ClassDrop
from exporters.evaluate import ClassMetrics
from exporters.facts import Facts, share_interval
from exporters.finetune import LEARNING_RATES
from exporters.recovery_search import Chosen

#: A class with fewer test rows than that says little: its recall moves by 10 points with each row.
FEW_ROWS = 10
_MOST_CLASSES = 300
_WEAKEST = 5


def model_card(facts: Facts) -> str:
    """The card as Markdown; the same facts give the same bytes."""
    m = facts.manifest
    title = f"# {m.name} {m.version}\n\nA model for {m.task}, made for the device profile `{m.profile}` by AIOS Edge."
    sections = (
        title,
        f"## Intended use\n\n{_use(facts)}",
        f"## Data\n\n{_data(facts)}",
        f"## Results on the test split\n\n{_results(facts)}",
        f"### By class\n\n{_classes(facts)}",
        f"## How far its scores can be trusted\n\n{_calibration(facts)}",
        f"## Limitations\n\n{_limitations(facts)}",
        f"## How it was made\n\n{_making(facts)}",
        f"## Licence\n\n{_licence(facts)}",
        f"## How to run it\n\n{_running(facts)}",
    )
    return "\n\n".join(sections) + "\n"


def _use(facts: Facts) -> str:
    m = facts.manifest
    asked = "two texts" if m.preprocess.pair else "a text"
    labels = ", ".join(_code(label) for label in m.labels)
    return (
        f"It gives {asked} one of {len(m.labels)} labels, with a score: texts like those of the training data, up to "
        f"{m.preprocess.max_length} tokens (longer ones are cut). It was not made for other kinds of text or other "
        "languages than it was trained on, and it always answers with one of its labels, also where none fits.\n\n"
        f"Labels: {labels}"
    )


def _data(facts: Facts) -> str:
    rows = [f"| {s.name} | {_plain(s.file)} | {s.rows} | `{s.digest}` |" for s in facts.splits]
    return _table(("split", "file", "rows", "digest of the rows"), rows) + (
        "\n\nTraining saw the training rows. The epoch, the candidate, the temperature and the golden samples were "
        "chosen on validation rows. The test rows were read once, after the choice. The digest is the beginning of the "
        "sha256 of all texts and labels in their order."
    )


def _results(facts: Facts) -> str:
    found, base = facts.metrics, facts.baseline
    assert facts.quality.drop is not None and facts.quality.agreement is not None
    drop, agreement = facts.quality.drop, facts.quality.agreement

    def with_interval(share: float) -> str:
        low, high = share_interval(share, found.rows)
        return f"{share:.4f} ({low:.4f} to {high:.4f})"

    rows = [
        f"| accuracy | {with_interval(found.accuracy)} | {with_interval(base.accuracy)} |",
        f"| accuracy lost against fp32, paired | {drop.value:.4f} ({drop.low:.4f} to {drop.high:.4f}) | |",
        f"| same answer as fp32 | {with_interval(agreement)} | |",
        f"| precision, recall, F1 (macro) | {found.precision:.4f}, {found.recall:.4f}, {found.f1:.4f} | "
        f"{base.precision:.4f}, {base.recall:.4f}, {base.f1:.4f} |",
    ]
    return _table((f"{found.rows} rows", "this model", "fine-tuned fp32"), rows) + (
        f"\n\nIn brackets: 95 % intervals. Always answering the most frequent training label is right on "
        f"{facts.majority_accuracy:.4f} of these rows. Every text was answered alone, as a device does it."
    )


def _classes(facts: Facts) -> str:
    changed = {entry.label: entry for entry in facts.class_drops}
    ordered = sorted(facts.metrics.per_class, key=lambda entry: (entry.f1, entry.label))
    rows = [_class_row(entry, changed.get(entry.label)) for entry in ordered[:_MOST_CLASSES]]
    table = _table(("class", "precision", "recall", "F1", "rows", "recall lost against fp32"), rows)
    more = len(ordered) - len(rows)
    return f"The weakest first.\n\n{table}" + (f"\n\n{more} classes with a higher F1 are left out." if more else "")


def _class_row(entry: ClassMetrics, changed: ClassDrop | None) -> str:
    lost = changed.drop if changed else 0.0
    figures = f"{entry.precision:.3f} | {entry.recall:.3f} | {entry.f1:.3f}"
    return f"| {_plain(entry.label)} | {figures} | {entry.support} | {lost:.3f} |"


def _calibration(facts: Facts) -> str:
    found = facts.calibration
    return (
        f"Logits are divided by the temperature {found.temperature:g}, fitted on validation, before the softmax. The "
        f"expected calibration error on {found.split} is {found.error_after:.4f}; without the temperature it would be "
        f"{found.error_before:.4f}."
    )


def _limitations(facts: Facts) -> str:
    per_class = facts.metrics.per_class
    few = [entry for entry in per_class if entry.support < FEW_ROWS]
    seen = sorted((entry for entry in per_class if entry.support), key=lambda entry: (entry.recall, entry.label))
    weakest = ", ".join(f"{_code(entry.label)} ({entry.recall:.3f})" for entry in seen[:_WEAKEST])
    points = [f"Lowest recall on test: {weakest}."]
    if few:
        points.append(f"{len(few)} classes have fewer than {FEW_ROWS} test rows; their figures say little.")
    if facts.rare_row_bits < 8:
        points.append(
            f"Embeddings of words that the training data use least or not at all take {facts.rare_row_bits} bits, a "
            "coarse picture of their meaning. Texts full of such words (another domain, other names, questions beside "
            "the subject) are answered less as fp32 would. The figures above hardly show it, because test rows have "
            "mostly the words of training; how much it is on other texts was not measured. Where that matters, take a "
            f"candidate without `-e{facts.rare_row_bits}` in its name."
        )
    points += [f"Not measured: {name} ({why})." for name, why in sorted(facts.contract.unmeasured.items())]
    points.append(
        "Not measured: fairness between groups of people, robustness against misspelt or hostile texts, other "
        "languages, texts of other origin. Don't let it decide about people on its own."
    )
    points.append(
        "Latency and memory depend on the device and are no part of this card: `contract.json` has what is promised, "
        "`aios-edge bench` measures."
    )
    return "\n".join(f"- {point}" for point in points)


def _making(facts: Facts) -> str:
    m, tuned, section = facts.manifest, facts.tuned, facts.recipe.finetune
    trained = "not fine-tuned here: the source was already"
    if tuned.method != "none":
        rate = section.learning_rate or LEARNING_RATES[tuned.method]
        trained = (
            f"{tuned.method}, {tuned.epochs} epochs (epoch {tuned.best_epoch} was kept), learning rate {rate:g}, "
            f"batches of {section.batch_size}, seed {section.seed}, {tuned.precision}, "
            f"{tuned.trained_parameters} parameters"
        )
    tools = ", ".join(f"{name} {version}" for name, version in m.provenance.tools.items())
    points = (
        f"Source weights: {_plain(facts.source.name)} (digest `{facts.source.digest}`)",
        f"Fine-tuning: {trained}",
        *_pruned(facts),
        f"Candidate: `{m.provenance.candidate}`, precision `{m.precision}`",
        f"Recipe: sha256 `{m.provenance.recipe_sha256}`",
        f"Tools: {tools}",
        "Files with their digests: `sbom.cdx.json`, and `manifest.json` for the whole bundle",
    )
    return "\n".join(f"- {point}" for point in points)


def _pruned(facts: Facts) -> tuple[str, ...]:
    kept, recovered, recovery = facts.structure, facts.recovered, facts.recovery
    if kept is None or recovery is None:
        return ()
    sizes = (
        f"{kept.layers} layers of {kept.heads} heads and {kept.ffn} neurons, a vocabulary of {kept.vocabulary} pieces"
    )
    return (
        f"Pruning: {sizes} were kept, the most important on training rows; it is another network than the fine-tuned "
        "one and may answer otherwise where both are equally often right (see agreement)",
        f"Recovery: distillation from the fine-tuned model, {recovered.epochs} epochs "
        f"(epoch {recovered.best_epoch} was kept), {_trained_with(recovery)}",
    )


def _trained_with(recovery: Chosen) -> str:
    """The settings that the recovery had, whatever the recipe says."""
    had, tried = recovery.settings, len(recovery.trials)
    found = ""
    if tried:
        kept = next((number for number, trial in enumerate(recovery.trials, start=1) if trial.kept), 1)
        found = f"; as in number {kept} of {tried} short trainings, the best of them on validation rows"
    return (
        f"learning rate {had.learning_rate:.3g}, batches of {had.batch_size}, temperature {had.temperature:.3g}, "
        f"{had.teacher_weight:.3g} of the loss from the fine-tuned model's answers, {had.state_weight:.3g} times the "
        f"distance of hidden states, embeddings {'frozen' if had.freeze_embeddings else 'trained along'}"
        f"{found}"
    )


def _licence(facts: Facts) -> str:
    licence = facts.manifest.licence
    if licence == "unknown":
        return "Of the source weights: unknown. Find out before you give this model to others."
    return f"Of the source weights, as the recipe states it: {_plain(licence)}. The data has terms of its own."


def _running(facts: Facts) -> str:
    example = '"first text" "second text"' if facts.manifest.preprocess.pair else '"a text"'
    commands = ("aios-edge bundle verify .", f"aios-edge infer . {example}", "aios-edge bench .")
    return "```sh\n" + "\n".join(commands) + "\n```"


def _table(head: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join((f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows))


def _plain(words: str) -> str:
    """Words that mean nothing to Markdown: one line, no cell, tag or code of their own."""
    return re.sub(r"([|<>\\`*\[\]])", r"\\\1", " ".join(words.split()))


def _code(words: str) -> str:
    """The same as code, where only the end of the code means something."""
    return f"`{' '.join(words.split()).replace('`', chr(39))}`"
