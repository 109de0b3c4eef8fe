"""Text classification: tokenize and pad, then softmax over the labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import BundleRefused, MissingExtra, RequestError
from aios_edge.golden import RawInput
from aios_edge.manifest import Manifest, TensorSpec
from aios_edge.oip.datatypes import Tensor
from aios_edge.tasks.task import Prediction

TEXT, TEXT_PAIR = "text", "text_pair"

#: The model inputs we can fill: name -> attribute of a ``tokenizers.Encoding``.
_SOURCES = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class TextClassification:
    """A bundle's tokenizer and labels; see :class:`aios_edge.tasks.task.Task`."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        """Raises :class:`BundleRefused` for a tokenizer or inputs that can't be used, :class:`MissingExtra`."""
        self._labels = manifest.labels
        self._names = tuple(spec.name for spec in manifest.inputs)
        self._text = manifest.preprocess
        self._softmax = manifest.postprocess
        if unknown := [name for name in self._names if name not in _SOURCES]:
            known = ", ".join(_SOURCES)
            raise BundleRefused("task", f"text gives {known}, the model wants {', '.join(unknown)}", where=str(root))
        self._tokenizer = _load_tokenizer(root / self._text.tokenizer, self._text.max_length)
        self.natural_names: tuple[str, ...] = (TEXT, TEXT_PAIR) if self._text.pair else (TEXT,)
        self.natural_inputs = tuple(TensorSpec(name=n, datatype="BYTES", shape=(-1,)) for n in self.natural_names)
        self.natural_outputs = (
            TensorSpec(name="label", datatype="BYTES", shape=(-1,)),
            TensorSpec(name="score", datatype="FP32", shape=(-1,)),
            TensorSpec(name="probabilities", datatype="FP32", shape=(-1, len(self._labels))),
        )

    def raw_tensors(self, inputs: Mapping[str, Tensor]) -> tuple[RawInput, ...] | None:
        """Texts of a request: BYTES [N] or [N, 1] in UTF-8 named ``text``, for pairs also ``text_pair``."""
        if TEXT not in inputs and TEXT_PAIR not in inputs:
            return None
        if set(inputs) != set(self.natural_names):
            raise RequestError(
                f"the natural input of this model is {' and '.join(self.natural_names)}, not {', '.join(inputs)}",
                remedy=f"Send {' and '.join(self.natural_names)}, or only the model's own tensors",
            )
        columns = [_texts(name, inputs[name]) for name in self.natural_names]
        if len({len(column) for column in columns}) != 1:
            raise RequestError("text and text_pair have different numbers of elements")
        return tuple(columns[0]) if len(columns) == 1 else tuple(zip(*columns, strict=True))

    def encode(self, raw: Sequence[RawInput]) -> dict[str, NDArray[Any]]:
        """INT64 tensors [N, L], only those the manifest lists, padded on the right to the longest text.

        Longer texts are cut to the manifest's ``max_length``, special tokens kept.
        """
        # One by one on purpose: encode_batch starts a thread per core inside the tokenizer, which would take cores
        # that the profile didn't give to this worker, and for a handful of sentences costs more than it saves.
        # Calling encode also makes TOKENIZERS_PARALLELISM, a setting of the whole process, unnecessary.
        encodings = [self._tokenizer.encode(*self._parts(item)) for item in raw]
        columns = {name: [getattr(encoding, _SOURCES[name]) for encoding in encodings] for name in self._names}
        if len(encodings) == 1:  # nothing to pad
            return {name: np.array(column, dtype=np.int64) for name, column in columns.items()}
        longest = max((len(encoding) for encoding in encodings), default=0)
        tensors: dict[str, NDArray[Any]] = {}
        for name, column in columns.items():
            fill = self._text.pad_id if name == "input_ids" else 0
            rows = np.full((len(raw), longest), fill, dtype=np.int64)
            for row, values in zip(rows, column, strict=True):
                row[: len(values)] = values
            tensors[name] = rows
        return tensors

    def lengths(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
        """Tokens per row; without a mask, everything up to the last token that isn't padding."""
        if (mask := inputs.get("attention_mask")) is not None:
            return tuple(int(total) for total in mask.sum(axis=1))
        true = inputs["input_ids"] != self._text.pad_id
        ends = np.where(true.any(axis=1), true.shape[1] - np.argmax(true[:, ::-1], axis=1), 0)
        return tuple(int(end) for end in ends)

    def decode(self, outputs: Mapping[str, NDArray[Any]], *, finite: bool = True) -> tuple[Prediction, ...]:
        """softmax(output / temperature) of [N, C] logits, computed in float64."""
        logits = outputs.get(self._softmax.output)
        if logits is None or logits.ndim != 2 or logits.shape[1] != len(self._labels):
            found = "is missing" if logits is None else f"has shape {list(logits.shape)}"
            raise BundleRefused("task", f"output {self._softmax.output!r} {found}, not [N, {len(self._labels)}]")
        table = softmax(logits, self._softmax.temperature)
        # NaN has no class; -inf alone is fine, its probability is 0
        if finite and not np.isfinite(table).all():
            raise BundleRefused("task", f"output {self._softmax.output!r} is NaN or infinite for an input")
        return tuple(
            Prediction(
                label=self._labels[best] if math.isfinite(row[best]) else "",
                score=row[best],
                probabilities=tuple(row),
            )
            # the best of NaN and others is NaN
            for row, best in zip(table.tolist(), table.argmax(axis=1).tolist(), strict=True)
        )

    def prediction_tensors(self, predictions: Sequence[Prediction]) -> dict[str, Tensor]:
        """``label`` BYTES [N], ``score`` FP32 [N], ``probabilities`` FP32 [N, C]."""
        count = len(predictions)
        label = np.empty(count, dtype=np.object_)
        label[:] = [prediction.label.encode() for prediction in predictions]
        score = np.array([prediction.score for prediction in predictions], dtype=np.float32)
        table = np.array([prediction.probabilities for prediction in predictions], dtype=np.float32)
        return {
            "label": Tensor("BYTES", label),
            "score": Tensor("FP32", score),
            "probabilities": Tensor("FP32", table.reshape(count, len(self._labels))),
        }

    def _parts(self, item: RawInput) -> tuple[str, ...]:
        if isinstance(item, str) == self._text.pair:
            wanted = "a pair of texts" if self._text.pair else "one text"
            raise RequestError(f"this model takes {wanted} per input")
        return (item,) if isinstance(item, str) else tuple(item)


def softmax(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """softmax(logits / temperature) along the last axis; the largest is subtracted first, so nothing overflows."""
    with np.errstate(invalid="ignore"):  # inf - inf: the NaN is the caller's to find
        table: NDArray[np.float64] = logits.astype(np.float64)
        table /= temperature
        table -= table.max(axis=-1, keepdims=True)
        np.exp(table, out=table)
        table /= table.sum(axis=-1, keepdims=True)
    return table


def _load_tokenizer(path: Path, max_length: int) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra("tokenizers", "text", why="Tokenizing text") from error
    try:
        # From the bundle's file and nowhere else: the package's hub client is never asked.
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        tokenizer.no_padding()  # ours is per batch, whatever the file says
        tokenizer.enable_truncation(max_length)
    except Exception as error:  # the Rust side raises plain Exception
        raise BundleRefused("tokenizer", f"can't be loaded ({error})"[:300], where=str(path)) from error
    return tokenizer


def _texts(name: str, tensor: Tensor) -> list[str]:
    where = f"input {name!r}"
    shape = tensor.array.shape
    if tensor.datatype != "BYTES":
        raise RequestError(f"is {tensor.datatype}, not BYTES", where=where)
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 1):
        raise RequestError(f"has shape {list(shape)}", where=where, remedy="Send shape [N] or [N, 1]")
    texts = []
    for index, item in enumerate(tensor.array.ravel().tolist()):
        try:
            texts.append(item.decode())
        except UnicodeDecodeError:
            raise RequestError(f"element {index} is not UTF-8", where=where, remedy="Encode texts as UTF-8") from None
    return texts
