"""How numbers become 8-bit integers: the arithmetic that a candidate's products are going to have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

LEVELS = 127
#: With ``reduce_range``: x86 without VNNI adds two u8 x s8 products in 16 bits, and 8-bit weights saturate there.
REDUCED_LEVELS = 64  # as onnxruntime has them


@dataclass(frozen=True)
class Scheme:
    """One scale for an activation, one per output channel for a weight.

    ``static``: the activation's scale is fixed by calibration, else found for each request. ``symmetric``: s8 with zero
    point 0, else u8. ``weight_levels``: the largest integer of an s8 weight.
    """

    static: bool = False
    symmetric: bool = False
    weight_levels: int = LEVELS

    def grid(self, low: Any, high: Any) -> tuple[Any, Any]:
        """Scale and zero point (as float32) for values in ``low`` … ``high``; 0 is represented exactly."""
        low, high = np.minimum(0, low), np.maximum(0, high)
        if self.symmetric:
            scale = np.maximum(np.maximum(-low, high), 1e-12) / LEVELS
            return np.float32(scale), np.zeros_like(scale, dtype=np.float32)
        scale = np.maximum(high - low, 1e-12) / 255
        return np.float32(scale), np.float32(np.round(-low / scale))

    def rounded(self, values: Array, low: Any, high: Any) -> Array:
        """What is left of ``values`` in integers; ``low`` and ``high`` broadcast to them."""
        scale, zero = self.grid(low, high)
        least, most = (-128, 127) if self.symmetric else (0, 255)
        found: Array = (np.clip(np.round(values / scale) + zero, least, most) - zero) * scale
        return found


def weight_scale(weight: Array, levels: int) -> Array:
    """Scale of each output channel [N] of a weight [C, N]."""
    scale: Array = (np.abs(weight).max(axis=0) / levels).astype(np.float32)
    scale[scale == 0] = 1
    return scale


def rounded_weight(weight: Array, levels: int) -> Array:
    """What is left of a weight [C, N] in s8."""
    scale = weight_scale(weight, levels)
    found: Array = np.round(weight / scale) * scale
    return found
