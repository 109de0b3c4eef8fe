"""Text to tensors, one sample at a time and trimmed: exactly what the agent does with a single request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.golden import RawInput
from aios_edge.manifest import Manifest
from aios_edge.tasks import task_for

Sample = dict[str, NDArray[Any]]  # input name -> [1, length]
TOKENIZER = "tokenizer.json"


class Encoder:
    """The task's own encoder behind two calls. ``root`` holds the tokenizer; ``max_length`` is in tokens."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self._task = task_for(manifest, root)
        self._pad_id = manifest.preprocess.pad_id
        self.max_length = manifest.preprocess.max_length

    def samples(self, texts: Iterable[RawInput]) -> list[Sample]:
        """Each text as a batch of one."""
        return [self._task.encode([text]) for text in texts]

    def pad(self, samples: Sequence[Sample]) -> Sample:
        """Samples as one batch, padded on the right to the longest."""
        longest = max(length_of(sample) for sample in samples)
        batch: Sample = {}
        for name in samples[0]:
            fill = self._pad_id if name == "input_ids" else 0
            rows = np.full((len(samples), longest), fill, dtype=samples[0][name].dtype)
            for index, sample in enumerate(samples):
                rows[index, : length_of(sample)] = sample[name][0]
            batch[name] = rows
        return batch


def length_of(sample: Sample) -> int:
    """Tokens of a sample."""
    return int(next(iter(sample.values())).shape[1])
