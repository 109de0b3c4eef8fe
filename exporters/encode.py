"""Text to tensors, one sample at a time and trimmed: exactly what the agent does with a single request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.digest import canonical_json, sha256_bytes, sha256_file
from aios_edge.golden import RawInput
from aios_edge.manifest import Manifest
from aios_edge.tasks import task_for

Sample = dict[str, NDArray[Any]]  # input name -> [1, length]
TOKENIZER = "tokenizer.json"


class Encoder:
    """The task's own encoder behind two calls. ``root`` holds the tokenizer; ``max_length`` is in tokens."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self._task, self._tokenizer = task_for(manifest, root), root / manifest.preprocess.tokenizer
        self._pad_id = manifest.preprocess.pad_id
        self.max_length = manifest.preprocess.max_length

    def digest(self) -> str:
        """Stands for what samples depend on, their texts and the code aside."""
        return sha256_bytes(canonical_json([sha256_file(self._tokenizer), self.max_length]))[:32]

    def samples(self, texts: Iterable[RawInput]) -> list[Sample]:
        """Each text as a batch of one."""
        return [self._task.encode([text]) for text in texts]

    def counts(self, texts: Iterable[RawInput]) -> dict[str, NDArray[np.intp]]:
        """How often each value of each input occurs: input name -> counts by value."""
        samples = self.samples(texts)
        names = samples[0] if samples else ()
        return {name: np.bincount(np.concatenate([sample[name][0] for sample in samples])) for name in names}

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
