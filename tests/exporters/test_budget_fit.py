"""Whether a smaller network may keep a budget, told from the whole one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aios_edge.profile import Budgets
from exporters.budget_fit import Whole, is_fast, is_light, with_room
from exporters.bundle import DOCUMENTS_BYTES
from exporters.plans import Plan
from exporters.structure import Shape, Structure

pytestmark = pytest.mark.export

MINILM = Structure(layers=6, heads=12, ffn=1536, vocabulary=30_522)
SHAPE = Shape(whole=MINILM, hidden=384, positions=512, labels=150)
RUNG = replace(MINILM, heads=4, ffn=512)
E4, E2 = (Plan(name=f"dynamic-s8-e{bits}", precision="dynamic-s8", rare_row_bits=bits) for bits in (4, 2))
WHOLE = Whole(size_bytes=23_000_000, p95_s=0.030, rss_bytes=121_000_000)


def test_time_goes_with_what_is_multiplied() -> None:
    assert is_fast(RUNG, SHAPE, Budgets(latency_p95_s=0.0101), WHOLE)
    assert not is_fast(RUNG, SHAPE, Budgets(latency_p95_s=0.0099), WHOLE)


def test_memory_goes_with_the_size_of_the_model() -> None:
    saved = WHOLE.size_bytes - SHAPE.size_bytes(RUNG, "dynamic-s8", 4)
    assert saved > 0
    assert is_light(RUNG, E4, SHAPE, Budgets(memory_bytes=121_000_000 - saved), WHOLE)
    assert not is_light(RUNG, E4, SHAPE, Budgets(memory_bytes=121_000_000 - saved - 1), WHOLE)
    assert is_light(RUNG, E2, SHAPE, Budgets(memory_bytes=121_000_000 - saved - 1), WHOLE)


def test_size_leaves_room_for_some_plans_only() -> None:
    sizes = {bits: SHAPE.shipped_bytes(RUNG, "dynamic-s8", bits) + DOCUMENTS_BYTES for bits in (4, 2)}
    assert with_room(RUNG, (E4, E2), SHAPE, Budgets(bundle_size_bytes=sizes[4])) == (E4, E2)
    assert with_room(RUNG, (E4, E2), SHAPE, Budgets(bundle_size_bytes=sizes[4] - 1)) == (E2,)
    assert with_room(RUNG, (E4, E2), SHAPE, Budgets(bundle_size_bytes=sizes[2] - 1)) == ()


def test_what_is_not_known_or_not_asked_for_forbids_nothing() -> None:
    unknown = Whole(size_bytes=23_000_000, p95_s=None, rss_bytes=None)
    strict = Budgets(latency_p95_s=1e-9, memory_bytes=1)
    assert is_fast(RUNG, SHAPE, strict, unknown) and is_light(RUNG, E4, SHAPE, strict, unknown)
    assert is_fast(RUNG, SHAPE, Budgets(), WHOLE) and is_light(RUNG, E4, SHAPE, Budgets(), WHOLE)
    assert with_room(RUNG, (E4,), SHAPE, Budgets()) == (E4,)
