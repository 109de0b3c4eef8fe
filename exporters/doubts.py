"""What a person should know of data and model though the export goes on. Each finding is one sentence. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.data import Data, Labelled, leaks
from exporters.plans import Plan
from exporters.quantize import CALIBRATION_SAMPLES
from exporters.tokenizer_fit import UNKNOWN_WARNED, Coverage
from exporters.variants import Pruning

#: Fewer different texts than this show too little of what activations can be.
_CALIBRATION_TEXTS = 16
#: An answer stands for another label when that is the truth of so many of its rows, of which there are so many.
_MEANS_ANOTHER, _ROWS_OF_ANOTHER = 2 / 3, 5
_LABELS_NAMED = 5


def of_data(data: Data, plans: Sequence[Plan], found: Coverage) -> tuple[str, ...]:
    """Before the training: shared rows, unknown tokens, too little to calibrate with."""
    said = []
    if shared := leaks(data.train, data.validation):
        said.append(f"{shared} of {len(data.validation)} validation rows have a text that is in the training data too")
    if found.unknown >= UNKNOWN_WARNED:
        said.append(
            f"the tokenizer doesn't know {found.unknown:.1%} of the tokens of the validation texts; of {found.mute:.1%}"
            " of the texts it knows none"
        )
    texts = len(set(data.train.spread(CALIBRATION_SAMPLES)))
    if texts < _CALIBRATION_TEXTS and any("s8" in plan.precision for plan in plans):
        said.append(f"8-bit candidates are calibrated with {texts} different training texts only")
    return tuple(said)


def of_pruning(prunings: Mapping[str, Pruning]) -> tuple[str, ...]:
    """Before the training as well: a wish to prune, by profile, that nothing can come of."""
    said = []
    for name, pruning in prunings.items():
        whole = pruning.shape.whole
        if not pruning.rungs:
            said.append(
                f"[prune] does nothing for {name}: of layers = {whole.layers}, heads = {whole.heads},"
                f" ffn = {whole.ffn} the search takes nothing away"
            )
        elif not pruning.plans:
            said.append(f"[prune] does nothing for {name}: nothing that it prefers can be made of a pruned network")
    return tuple(said)


def of_answers(split: str, answer: NDArray[Any], rows: Labelled, data: Data) -> tuple[str, ...]:
    """After the training: a model that has learnt nothing, or another order of labels."""
    truth = np.asarray(rows.labels)
    right = float(np.mean(answer == truth))
    most = int(np.bincount(np.asarray(data.train.labels)).argmax())
    always = float(np.mean(truth == most))
    said = []
    if right <= always:
        said.append(
            f"the fine-tuned model is no better than a constant: it is right on {right:.4f} of the {split} rows,"
            f" always answering '{data.labels[most]}' on {always:.4f}"
        )
    if moved := permuted(answer, truth, len(data.labels)):
        pairs = [f"'{data.labels[a]}' for '{data.labels[b]}'" for a, b in sorted(moved.items())]
        more = " …" if len(pairs) > _LABELS_NAMED else ""
        named = ", ".join(pairs[:_LABELS_NAMED]) + more
        said.append(f"labels look exchanged: on {split} rows the model answers {named}; check the data's labels")
    return tuple(said)


def permuted(answer: NDArray[Any], truth: NDArray[Any], classes: int) -> dict[int, int]:
    """Answer -> the label that it really stands for, of labels that are exchanged among each other; mostly none."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (answer, truth), 1)
    means = table.argmax(axis=1)
    moved = {
        a: int(means[a])
        for a in range(classes)
        if means[a] != a and table[a, means[a]] >= max(_ROWS_OF_ANOTHER, _MEANS_ANOTHER * table[a].sum())
    }
    while set(moved) != set(moved.values()):  # what isn't part of a cycle is only confused
        both = set(moved) & set(moved.values())
        moved = {a: b for a, b in moved.items() if a in both and b in both}
    return moved
