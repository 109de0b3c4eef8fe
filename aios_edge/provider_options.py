"""What a bundle may ask of an execution provider. Pure.

The exporter writes such options (``exporters/tensorrt.py``), the agent lays them over those of the device profile
(``device_agent/provider_chain.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

TENSORRT = "TensorrtExecutionProvider"

#: TensorRT builds an engine for the shapes it meets, silently and for minutes, and builds it again for shapes beyond
#: those (ONNX Runtime's documentation of the provider): pinned shapes and caches keep that to the first start.
MIN_SHAPES, OPT_SHAPES, MAX_SHAPES = "trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"
FP16, INT8 = "trt_fp16_enable", "trt_int8_enable"
#: Switch -> where the cache lies; the bundle has the switch, the agent the place.
CACHES = {
    "trt_engine_cache_enable": "trt_engine_cache_path",
    "trt_timing_cache_enable": "trt_timing_cache_path",
}

#: An allow-list, because other options load plug-in libraries or write where they are told to.
ALLOWED: dict[str, frozenset[str]] = {
    TENSORRT: frozenset((MIN_SHAPES, OPT_SHAPES, MAX_SHAPES, FP16, INT8, *CACHES)),
}


def options_fault(options: Mapping[str, Mapping[str, object]]) -> str | None:
    """Why a bundle's options can't be taken, or None."""
    for provider, asked in options.items():
        if provider not in ALLOWED:
            return f"names {provider!r}; a bundle may have options for {', '.join(ALLOWED)} only"
        if unknown := sorted(set(asked) - ALLOWED[provider]):
            return f"sets {', '.join(unknown)} of {provider}, which is not a bundle's to set"
    return None
