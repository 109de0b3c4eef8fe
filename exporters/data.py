"""Labelled data: what training may see, and a test split that can be read only once.

Where a recipe names no validation or test file, rows are split off train: stratified by label, and placed by the
sha256 of their text, so the split depends on the rows alone, not on their order, and equal texts stay together.
Validation has at least as many different texts as a bundle needs golden samples.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aios_edge.digest import canonical_json, sha256_bytes, sha256_file
from aios_edge.errors import AiosEdgeError, DataError
from aios_edge.golden import MIN_SAMPLES, RawInput
from exporters.read_rows import Columns, Row, read_rows
from exporters.recipe import ExportRecipe

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Labelled:
    """Texts and the index of each one's label."""

    texts: tuple[RawInput, ...]
    labels: tuple[int, ...]

    def digest(self) -> str:
        """Stands for content and order."""
        return sha256_bytes(canonical_json([self.texts, self.labels]))[:32]

    def spread(self, count: int) -> tuple[RawInput, ...]:
        """At most so many texts, from all over the rows."""
        return self.texts[:: max(1, len(self) // count)][:count]

    def __len__(self) -> int:
        return len(self.texts)


class TestSplit:
    """The held-out rows. :meth:`read_once` gives them out one single time, after :meth:`release`; ``reads`` records it.

    Before, its file was checked for its form (encoding, columns, labels known), so that a bad file fails in the
    first second and not after the training; nothing of what it says is kept.
    """

    __test__ = False  # not a pytest class

    def __init__(self, read: Callable[[], Labelled]) -> None:
        self._read = read
        self.reads = 0
        self._released = False

    def release(self) -> None:
        """The choice is made: from now on the rows may be seen."""
        self._released = True

    def read_once(self) -> Labelled:
        """The rows; a call before the choice, or a second one, is a mistake in the pipeline and raises."""
        if not self._released:
            raise AiosEdgeError("the test split was asked for before the choice was made", where="exporters")
        if self.reads:
            raise AiosEdgeError("the test split was asked for twice", where="exporters")
        self.reads += 1
        return self._read()

    def then(self, change: Callable[[Labelled], Labelled]) -> TestSplit:
        """The same split, its rows changed when they are read; reads nothing."""

        def read() -> Labelled:
            self.release()
            return change(self.read_once())

        return TestSplit(read)


@dataclass(frozen=True)
class Data:
    """All that a recipe's data section gives. ``labels`` in the order of the model's outputs."""

    labels: tuple[str, ...]
    train: Labelled
    validation: Labelled
    test: TestSplit
    origin: str  # one line for provenance: files by name and digest, never a path
    dropped: int
    unlabelled: tuple[RawInput, ...] = ()  # different from each other, from train's and from validation's

    @property
    def in_use(self) -> tuple[RawInput, ...]:
        """The texts that say which words are in use: train's, then those without labels."""
        return self.train.texts + self.unlabelled

    @property
    def by_class(self) -> list[list[RawInput]]:
        """The same: each label's, then those without."""
        found: list[list[RawInput]] = [[] for _ in self.labels]
        for text, label in zip(self.train.texts, self.train.labels, strict=True):
            found[label].append(text)
        return [*found, list(self.unlabelled)]

    @property
    def pair(self) -> bool:
        """Whether each input is two texts."""
        return not isinstance(self.train.texts[0], str)


def load_data(recipe: ExportRecipe) -> Data:
    """Read, check and split; raises :class:`DataError`."""
    section = recipe.data
    names = (section.input,) if isinstance(section.input, str) else section.input
    columns = Columns(input=names, label=section.label, drop_empty=section.drop_empty)
    train_path = recipe.path(section.train)
    _check_apart(recipe)
    table = read_rows(train_path, columns)
    rows, dropped = table.rows, table.dropped
    every_row = rows
    labels = _label_order(rows, train_path)
    index = {label: position for position, label in enumerate(labels)}

    if section.test is not None:
        test_path = recipe.path(section.test)
        _encode(read_rows(test_path, columns).rows, index, test_path)  # form only
        test = TestSplit(lambda: _encode(read_rows(test_path, columns).rows, index, test_path))
    else:
        rows, held_out = split_off(rows, TEST_SHARE, "test")
        if not held_out:
            what = "has too few different texts of a class to split a test split off"
            raise DataError(what, where=str(train_path), remedy="Give more rows of each class, or a test file")
        test = TestSplit(lambda: _encode(held_out, index, train_path))
    if section.validation is not None:
        validation_path = recipe.path(section.validation)
        table = read_rows(validation_path, columns)
        dropped += table.dropped
        validation = _encode(table.rows, index, validation_path)
    else:
        rows, held_out_validation = split_off(rows, VALIDATION_SHARE, "validation", least=MIN_SAMPLES)
        validation = _encode(held_out_validation, index, train_path)
    train = _encode(_limit(rows, recipe.finetune.max_rows), index, train_path)
    for name, part in (("train", train), ("validation", validation)):
        if len(set(part.labels)) < 2:
            what = f"the {name} split has fewer than two classes ({len(part)} rows)"
            raise DataError(what, where=str(train_path), remedy="Give more rows of each class")
    if section.validation is not None:
        _check_golden(validation, recipe.path(section.validation))
    elif len(set(validation.texts)) < MIN_SAMPLES:
        raise _too_few_texts(every_row, len(labels), train_path, test_is_split_off=section.test is None)
    origin = f"{train_path.name} sha256:{train.digest()[:12]} ({len(train)} train, {len(validation)} validation rows)"
    unlabelled, empty = _unlabelled(recipe, columns, {*train.texts, *validation.texts})
    if unlabelled:
        origin += f", {Path(section.unlabelled or '').name} ({len(unlabelled)} texts without labels)"
    return Data(
        labels=labels,
        train=train,
        validation=validation,
        test=test,
        origin=origin,
        dropped=dropped + empty,
        unlabelled=unlabelled,
    )


def _unlabelled(recipe: ExportRecipe, columns: Columns, known: set[RawInput]) -> tuple[tuple[RawInput, ...], int]:
    """The texts without labels that are new, each once; and how many empty ones were dropped."""
    if recipe.data.unlabelled is None:
        return (), 0
    table = read_rows(recipe.path(recipe.data.unlabelled), replace(columns, label=None))
    return tuple(dict.fromkeys(row.text for row in table.rows if row.text not in known)), table.dropped


def leaks(rows: Labelled, held_out: Labelled) -> int:
    """How many held-out rows have a text that is among ``rows`` as well."""
    seen = set(rows.texts)
    return sum(text in seen for text in held_out.texts)


def training_leaks(data: Data, held_out: Labelled) -> int:
    """How many held-out rows have a text that training saw, with or without its label."""
    seen = {*data.train.texts, *data.unlabelled}
    return sum(text in seen for text in held_out.texts)


def _check_apart(recipe: ExportRecipe) -> None:
    """Raise :class:`DataError` where two splits are one file, by name or by content: nothing would be held out."""
    seen: dict[str, str] = {}
    for name in ("train", "validation", "test"):
        given = getattr(recipe.data, name)
        path = recipe.path(given) if given is not None else None
        if path is None or not path.is_file():  # who reads it says what is wrong
            continue
        other = seen.setdefault(sha256_file(path), name)
        if other != name:
            what = f"{name} has the same rows as {other}, so what is seen there would say nothing"
            remedy = f"Give rows that {other} doesn't have, or leave {name} out of [data] to have it split off train"
            raise DataError(what, where=str(path), remedy=remedy)


def split_off(
    rows: Sequence[Row], share: float, purpose: str, *, least: int = 0
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(kept, held out): about ``share`` of each label, fixed by the texts alone; equal texts are never parted.

    Held out are at least ``least`` different texts, as far as one of each label can be kept.
    """
    by_label: dict[str, dict[RawInput, int]] = defaultdict(dict)
    label_of: dict[RawInput, str] = {}
    for row in rows:
        label = label_of.setdefault(row.text, row.label)  # a text with two labels goes where its first one goes
        by_label[label][row.text] = by_label[label].get(row.text, 0) + 1
    share = max(share, least / len(label_of)) if label_of else share
    held: set[RawInput] = set()
    spare: list[RawInput] = []
    for counts in by_label.values():
        wanted = max(1, round(sum(counts.values()) * share))
        taken = 0
        for text in sorted(counts, key=lambda text: _place(text, purpose))[:-1]:  # one of each label is kept
            if taken < wanted:
                held.add(text)
                taken += counts[text]
            else:
                spare.append(text)
    spare.sort(key=lambda text: _place(text, purpose))
    held.update(spare[: max(0, least - len(held))])  # what rounding and repeated texts left out
    return tuple(r for r in rows if r.text not in held), tuple(r for r in rows if r.text in held)


def _place(text: RawInput, purpose: str) -> bytes:
    return hashlib.sha256(canonical_json([purpose, text])).digest()


def _limit(rows: Sequence[Row], max_rows: int | None) -> tuple[Row, ...]:
    """About that many rows, the classes in proportion, none of them lost; which ones is fixed by the texts."""
    if max_rows is None or len(rows) <= max_rows:
        return tuple(rows)
    kept = split_off(rows, max_rows / len(rows), "max_rows")[1]
    found = {row.label for row in kept}  # a class with a single text is never split
    return kept + tuple(row for row in rows if row.label not in found)


def enough_texts(labels: int, *, test_is_split_off: bool) -> int:
    """How many different texts, one row each, suffice to hold the golden samples out of train, however they are spread
    over the labels: of each label one text stays, and the test split may take one more than its share."""
    if test_is_split_off:
        return math.ceil(MIN_SAMPLES / (1 - TEST_SHARE)) + 2 * labels
    return MIN_SAMPLES + labels


def _too_few_texts(rows: Sequence[Row], labels: int, path: Path, *, test_is_split_off: bool) -> DataError:
    given = len({row.text for row in rows})
    enough = enough_texts(labels, test_is_split_off=test_is_split_off)
    what = f"has {given} different texts, too few to hold {MIN_SAMPLES} golden samples out of the training"
    remedy = f"Give more rows ({enough} different texts, one row each, would do), or a validation file"
    return DataError(what, where=str(path), remedy=remedy)


def _check_golden(validation: Labelled, path: Path) -> None:
    """Fail before the training where a validation file has too few golden samples for a bundle."""
    found = len(set(validation.texts))
    if found >= MIN_SAMPLES:
        return
    what = f"has {found} different texts, a bundle takes {MIN_SAMPLES} golden samples from them"
    remedy = "Give more rows, or leave validation out of [data] to have it split off train"
    raise DataError(what, where=str(path), remedy=remedy)


def _label_order(rows: Sequence[Row], path: Path) -> tuple[str, ...]:
    """Numbers by value, words by alphabet: the same for every order of rows."""
    counts = Counter(row.label for row in rows)
    if len(counts) < 2:
        only = next(iter(counts))
        remedy = "Classification needs rows of at least two classes; check label in [data]"
        raise DataError(f"has one class only ('{only}', {counts[only]} rows)", where=str(path), remedy=remedy)
    if all(label.removeprefix("-").isdecimal() for label in counts):
        return tuple(sorted(counts, key=lambda label: (int(label), label)))
    return tuple(sorted(counts))


def _encode(rows: Sequence[Row], index: dict[str, int], path: Path) -> Labelled:
    unseen = Counter(row.label for row in rows if row.label not in index)
    if unseen:
        label, count = unseen.most_common(1)[0]
        raise DataError(
            f"has the label '{label}' ({count} rows), which is not in the training data",
            where=str(path),
            remedy=f"Correct it or add training rows; known labels: {', '.join(list(index)[:20])}",
        )
    return Labelled(texts=tuple(row.text for row in rows), labels=tuple(index[row.label] for row in rows))
