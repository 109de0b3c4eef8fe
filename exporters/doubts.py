"""What a person should know of data and model though the export goes on. Each finding is one sentence. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.profile import DeviceProfile
from exporters.data import Data, Labelled, leaks
from exporters.label_order import LUCK, exchanges
from exporters.plans import Plan, not_for
from exporters.quantize import CALIBRATION_SAMPLES
from exporters.recipe import SearchSection
from exporters.tokenizer_fit import UNKNOWN_WARNED, Coverage
from exporters.variants import Pruning

#: Fewer different texts than this show too little of what activations can be.
_CALIBRATION_TEXTS = 16


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


def of_search(search: SearchSection, profiles: Sequence[DeviceProfile]) -> tuple[str, ...]:
    """Before the training as well: candidates that the recipe asks for and that no profile can run."""
    nowhere = [name for name in search.candidates if all(name in not_for(profile, search) for profile in profiles)]
    if not nowhere:
        return ()
    return (f"[search] candidates does nothing with {', '.join(nowhere)}: no profile here runs it on the CPU first",)


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
    """After the training: a model that has learnt nothing, or labels that may be exchanged, on few rows."""
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
    said += [
        f"labels look exchanged, which may be luck: on the {split} split the model answers {found.told(data.labels)}"
        for found in exchanges(answer, truth, len(data.labels))
        if found.luck > LUCK
    ]
    return tuple(said)
