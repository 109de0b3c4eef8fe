"""What a bundle tells TensorRT: the shapes it will meet, the precision that was verified, that caches are kept. Pure.

Written from ONNX Runtime's documentation of the provider; not run on a board.
"""

from __future__ import annotations

from collections.abc import Sequence

from aios_edge.manifest import Precision, Scalar
from aios_edge.profile import DeviceProfile
from aios_edge.provider_options import CACHES, FP16, INT8, MAX_SHAPES, MIN_SHAPES, OPT_SHAPES, TENSORRT


def provider_options(
    profile: DeviceProfile, precision: Precision, inputs: Sequence[str], *, max_batch_size: int, max_length: int
) -> dict[str, dict[str, Scalar]]:
    """The manifest's section for a model whose inputs are all [batch, length]; empty where the profile has no TensorRT.

    The engine is tuned for the shape of the profile's latency budget and takes any up to the largest batch and the
    longest text. fp16 and int8 follow the precision whose accuracy was verified: TensorRT must neither round an fp32
    model, nor look for a calibrator where there are no Q/DQ nodes.
    """
    if all(provider.name != TENSORRT for provider in profile.providers):
        return {}
    budgets = profile.budgets
    usual = (budgets.latency_batch, min(budgets.latency_length, max_length))
    largest = (max(budgets.latency_batch, max_batch_size), max_length)
    return {
        TENSORRT: {
            MIN_SHAPES: _shapes(inputs, (1, 1)),
            OPT_SHAPES: _shapes(inputs, usual),
            MAX_SHAPES: _shapes(inputs, largest),
            FP16: precision == "fp16",
            INT8: precision == "qdq-s8-sym",
            **dict.fromkeys(CACHES, True),
        }
    }


def _shapes(inputs: Sequence[str], shape: tuple[int, int]) -> str:
    return ",".join(f"{name}:{shape[0]}x{shape[1]}" for name in inputs)
