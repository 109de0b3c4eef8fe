"""What a bundle tells TensorRT, for every precision and shape."""

from __future__ import annotations

import re

import msgspec
import pytest

from aios_edge.manifest import Precision
from aios_edge.profile_files import load_profile, shipped_profiles
from aios_edge.provider_options import options_fault
from exporters.tensorrt import provider_options

TENSORRT = "TensorrtExecutionProvider"
INPUTS = ("input_ids", "attention_mask")
JETSON = load_profile("jetson-orin-nano")


def options(precision: Precision = "fp16", **changes: int) -> dict[str, object]:
    sizes = {"max_batch_size": 8, "max_length": 128, **changes}
    return dict(provider_options(JETSON, precision, INPUTS, **sizes)[TENSORRT])


def test_every_input_has_its_shapes_from_the_shortest_to_the_longest() -> None:
    found = options()
    assert found["trt_profile_min_shapes"] == "input_ids:1x1,attention_mask:1x1"
    assert found["trt_profile_opt_shapes"] == "input_ids:1x32,attention_mask:1x32"  # the latency budget's
    assert found["trt_profile_max_shapes"] == "input_ids:8x128,attention_mask:8x128"


@pytest.mark.parametrize(("batch", "length"), [(1, 16), (8, 512), (2, 32)])
def test_shapes_never_contradict_each_other(batch: int, length: int) -> None:
    found = options(max_batch_size=batch, max_length=length)
    sizes = [
        [int(size) for size in re.findall(r"\d+", str(found[f"trt_profile_{which}_shapes"]))]
        for which in ("min", "opt", "max")
    ]
    assert all(low <= usual <= high for low, usual, high in zip(*sizes, strict=True))
    assert sizes[2][-1] == length


@pytest.mark.parametrize(
    ("precision", "fp16", "int8"),
    [("fp32", False, False), ("fp16", True, False), ("qdq-s8-sym", False, True), ("dynamic-s8", False, False)],
)
def test_flags_follow_the_precision_that_was_verified(precision: Precision, fp16: bool, int8: bool) -> None:
    found = options(precision)
    assert (found["trt_fp16_enable"], found["trt_int8_enable"]) == (fp16, int8)
    assert found["trt_engine_cache_enable"] is found["trt_timing_cache_enable"] is True


def test_only_profiles_with_tensorrt_get_any_and_an_agent_takes_them() -> None:
    for profile in map(load_profile, shipped_profiles()):
        found = provider_options(profile, "fp16", INPUTS, max_batch_size=1, max_length=32)
        assert bool(found) == (TENSORRT in [provider.name for provider in profile.providers])
        assert options_fault(found) is None


def test_a_budget_beyond_the_bundles_own_sizes_is_still_within_the_engine() -> None:
    budgets = msgspec.structs.replace(JETSON.budgets, latency_batch=16, latency_length=500)
    wide = msgspec.structs.replace(JETSON, budgets=budgets)
    found = provider_options(wide, "fp16", INPUTS, max_batch_size=8, max_length=128)[TENSORRT]
    assert (
        found["trt_profile_opt_shapes"] == "input_ids:16x128,attention_mask:16x128" == found["trt_profile_max_shapes"]
    )
