"""Which validation rows become golden samples, and how closely a device must repeat their answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aios_edge.contract import GoldenSpec
from aios_edge.golden import MIN_SAMPLES, Golden, RawInput
from exporters.data import Labelled
from exporters.encode import Encoder, Sample, length_of
from exporters.evaluate import Logits

_SMALL_MARGINS = 6  # samples whose two best logits are close: the first to flip when something is off

CPU = "CPUExecutionProvider"
_OTHER = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
#: Largest difference of a logit from the recorded one, as a share of the largest logit: (CPU, other providers).
#: fp32 on another CPU differs by rounding; other providers may compute in TF32 or fp16 (11 bits of mantissa).
_TOLERANCE = {
    "fp32": (1e-3, 2e-2),
    "fp16": (2e-2, 2e-2),
    "dynamic-s8": (2e-2, 5e-2),
    "static-s8": (2e-2, 5e-2),
    "qdq-u8s8": (2e-2, 5e-2),
    "qdq-s8-sym": (2e-2, 5e-2),
}
#: Least share of equal argmax. Samples with small margins are among them on purpose, and may flip.
_AGREEMENT = {
    "fp32": 0.98,
    "fp16": 0.95,
    "dynamic-s8": 0.90,
    "static-s8": 0.90,
    "qdq-u8s8": 0.90,
    "qdq-s8-sym": 0.90,
}


def pick(
    held_out: Labelled, lengths: Sequence[int], margins: NDArray[np.float64], count: int = MIN_SAMPLES
) -> list[int]:
    """Rows for the golden samples: the smallest margins, then each class over its whole range of lengths.

    ``count`` rows with different texts, or all there are.
    """
    labels = held_out.labels
    first: dict[RawInput, int] = {}
    for row, text in enumerate(held_out.texts):
        first.setdefault(text, row)
    rows = list(first.values())
    if len(rows) <= count:
        return rows
    chosen = dict.fromkeys(sorted(rows, key=lambda row: margins[row])[:_SMALL_MARGINS])
    queues = []
    for label in sorted(set(labels)):
        own = sorted((row for row in rows if labels[row] == label), key=lambda row: (lengths[row], row))
        spread = np.linspace(0, len(own) - 1, min(len(own), count)).astype(int)
        # Every k-th first: however few a class gets, they reach from its shortest to its longest.
        queues.append([own[spread[i]] for i in _by_halves(len(spread))])
    while len(chosen) < count and any(queues):
        for queue in queues:
            while queue and queue[0] in chosen:
                queue.pop(0)
            if queue and len(chosen) < count:
                chosen[queue.pop(0)] = None
    for row in rows:
        if len(chosen) >= count:
            break
        chosen[row] = None
    return sorted(chosen)


def record(
    rows: Sequence[int], held_out: Labelled, samples: Sequence[Sample], fp32: Logits, shipped: Logits, encoder: Encoder
) -> Golden:
    """The samples with the answers of the shipped model and of the same network in fp32, each given to the sample
    alone."""
    picked = [samples[row] for row in rows]
    return Golden(
        raw=tuple(held_out.texts[row] for row in rows),
        inputs=encoder.pad(picked),
        length=np.asarray([length_of(sample) for sample in picked], dtype=np.int64),
        fp32={"logits": fp32[list(rows)]},
        shipped={"logits": shipped[list(rows)]},
        contract_sha256="",
        manifest_sha256="",
    )


def judge(golden: Golden, precision: str) -> GoldenSpec:
    """Tolerances for a precision.

    Quantized models round at other places on other instruction sets (8-bit products saturate on some), so a device
    may differ from the recorded answers as far as quantization itself moved them from fp32, and no further.
    """
    shipped, fp32 = golden.shipped["logits"], golden.fp32["logits"]
    scale = max(1.0, float(np.abs(shipped).max()))
    moved = float(np.abs(shipped - fp32).max()) if precision != "fp32" else 0.0
    cpu, other = (max(share * scale, moved) for share in _TOLERANCE[precision])
    return GoldenSpec(
        count=len(golden.raw),
        min_agreement=_AGREEMENT[precision],
        tolerance={CPU: cpu, **dict.fromkeys(_OTHER, other)},
    )


def margins_of(logits: Logits) -> NDArray[np.float64]:
    """Distance of the two largest logits of each row."""
    ordered = np.sort(logits.astype(np.float64), axis=1)
    margins: NDArray[np.float64] = ordered[:, -1] - ordered[:, -2]
    return margins


def _by_halves(count: int) -> list[int]:
    """0 … count-1 so that every beginning of the list is spread evenly: ends first, then middles of middles."""
    order = dict.fromkeys([0, max(0, count - 1)])
    step = count
    while step > 1:
        step = (step + 1) // 2
        order.update(dict.fromkeys(range(0, count, step)))
    return [index for index in order if index < count]
