"""How far to prune: the ladder, the explicit wish, and which rung comes next."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.errors import RecipeError
from exporters import quantize
from exporters.recipe import PruneSection
from exporters.structure import LADDER, Outcome, Shape, Structure, asked_for, beginning, following, ladder

WHOLE = Structure(layers=6, heads=12, ffn=1536, vocabulary=30522)
MINILM = Shape(whole=WHOLE, hidden=384, positions=512, labels=150, in_use=3_800)
KEPT, COSTLY, INACCURATE, HOPELESS = (
    Outcome(costly=costly, inaccurate=inaccurate) for inaccurate in (False, True) for costly in (False, True)
)


def test_the_ladder_gets_narrower_rung_by_rung() -> None:
    rungs = ladder(MINILM, 8000)
    products = [MINILM.products(rung) for rung in rungs]
    assert len(rungs) == len(LADDER)
    assert all(narrower < wider for wider, narrower in itertools.pairwise(products))
    assert rungs[0].name == "l6-h6-f768-v8000" and rungs[1].name == "l6-h4-f512-v8000"
    assert MINILM.products(rungs[1]) * 3 == MINILM.products(WHOLE)
    assert rungs[2].name == "l6-h4-f320-v8000" and MINILM.products(rungs[2]) * 4 == MINILM.products(WHOLE)


@given(layers=st.integers(1, 24), heads=st.integers(1, 32), ffn=st.integers(1, 4096), vocabulary=st.integers(1, 50_000))
def test_no_rung_is_empty_or_as_large_as_the_network(layers: int, heads: int, ffn: int, vocabulary: int) -> None:
    whole = Structure(layers=layers, heads=heads, ffn=ffn, vocabulary=vocabulary)
    shape = Shape(whole=whole, hidden=32 * heads, positions=128, labels=2)
    rungs = ladder(shape, vocabulary)
    for wider, rung in itertools.pairwise((whole, *rungs)):
        assert 1 <= rung.layers <= layers and 1 <= rung.heads <= heads and 1 <= rung.ffn <= ffn
        assert shape.products(rung) < shape.products(wider)


@pytest.mark.parametrize(
    ("layers", "heads", "ffn", "vocabulary", "bits", "measured"),
    [
        (6, 12, 1536, 30522, 8, 23.08),
        (6, 12, 1536, 30522, 4, 18.20),
        (6, 4, 512, 30522, 4, 11.01),
        (6, 4, 512, 10_000, 8, 8.00),
        (4, 2, 384, 8_000, 8, 5.19),
    ],
)
def test_size_is_an_estimate_of_the_files_and_not_a_low_one(
    layers: int, heads: int, ffn: int, vocabulary: int, bits: int, measured: float
) -> None:
    """Measured in MB, as dynamic-s8 of CLINC150."""
    found = MINILM.size_bytes(Structure(layers=layers, heads=heads, ffn=ffn, vocabulary=vocabulary), "dynamic-s8", bits)
    assert measured * 1e6 <= found <= measured * 1.01e6


def test_tables_in_fp16_are_estimated_so() -> None:
    more = MINILM.size_bytes(WHOLE, "qdq-s8-sym") - MINILM.size_bytes(WHOLE, "dynamic-s8")
    assert more > WHOLE.vocabulary * MINILM.hidden


def test_a_table_that_cant_be_split_is_estimated_whole() -> None:
    odd = replace(MINILM, hidden=390)  # even, but no multiple of four
    whole = odd.size_bytes(WHOLE, "dynamic-s8", 8)
    assert odd.size_bytes(WHOLE, "dynamic-s8", 2) == whole > odd.size_bytes(WHOLE, "dynamic-s8", 4)


def test_the_size_of_all_that_can_be_built_is_known() -> None:
    for precision in quantize.BUILDERS:
        assert MINILM.size_bytes(WHOLE, precision) > WHOLE.vocabulary * MINILM.hidden
    with pytest.raises(KeyError):
        MINILM.size_bytes(WHOLE, "dynamic-s4")


def test_where_nobody_counted_as_many_rows_as_may_keep_8_bits() -> None:
    uncounted = replace(MINILM, in_use=None)
    for bits in (2, 4):
        assert uncounted.size_bytes(WHOLE, "dynamic-s8", bits) > MINILM.size_bytes(WHOLE, "dynamic-s8", bits)


@given(size=st.integers(0, 40_000_000), bits=st.sampled_from([2, 4, 8]), heads=st.integers(1, 12))
def test_as_many_pieces_as_fit_and_no_more(size: int, bits: int, heads: int) -> None:
    narrow = Structure(layers=6, heads=heads, ffn=512, vocabulary=0)
    shape = replace(MINILM, tokenizer=700_000, beside_pieces=3_000)
    fit = shape.pieces_within(size, narrow, "dynamic-s8", bits)
    if fit:
        assert shape.shipped_bytes(replace(narrow, vocabulary=fit), "dynamic-s8", bits) <= size
    if fit < WHOLE.vocabulary:
        assert shape.shipped_bytes(replace(narrow, vocabulary=fit + 1), "dynamic-s8", bits) > size


def test_what_the_recipe_spells_out_is_taken_and_the_rest_stays_whole() -> None:
    found = asked_for(PruneSection(heads=4), MINILM, 30522)
    assert found == Structure(layers=6, heads=4, ffn=1536, vocabulary=30522)
    with pytest.raises(RecipeError, match="heads = 13, but the model has 12"):
        asked_for(PruneSection(heads=13), MINILM, 30522)


def test_the_search_narrows_while_promises_are_kept_and_widens_when_not() -> None:
    rungs = ladder(MINILM, 8000)
    every = [True] * len(rungs)
    assert following(rungs, {}, every) == rungs[1]
    assert following(rungs, {rungs[1]: KEPT}, every) == rungs[2]
    assert following(rungs, {rungs[1]: KEPT, rungs[2]: INACCURATE}, every) is None
    assert following(rungs, {rungs[1]: INACCURATE}, every) == rungs[0]
    assert following(rungs, {rungs[1]: INACCURATE, rungs[0]: KEPT}, every) is None
    assert following(rungs, {rungs[1]: INACCURATE, rungs[0]: INACCURATE}, every) is None


def test_what_is_too_large_or_too_slow_gets_narrower_not_wider() -> None:
    rungs = ladder(MINILM, 8000)
    every = [True] * len(rungs)
    assert following(rungs, {rungs[1]: COSTLY}, every) == rungs[2]
    assert following(rungs, {rungs[1]: COSTLY, rungs[2]: COSTLY}, every) == rungs[3]
    assert following(rungs, {rungs[1]: COSTLY, rungs[2]: INACCURATE}, every) is None
    assert following(rungs, {rungs[1]: INACCURATE, rungs[0]: COSTLY}, every) is None
    assert following(rungs, {rungs[1]: HOPELESS}, every) is None  # narrower it is less accurate, wider it costs more
    assert following(rungs, {rungs[-1]: COSTLY}, every) is None


def test_a_search_without_a_budget_begins_at_a_third_of_the_width_or_where_it_can() -> None:
    rungs = ladder(MINILM, 8000)
    assert beginning(rungs) == 1 and MINILM.products(rungs[1]) * 3 == MINILM.products(WHOLE)
    assert beginning(rungs[:1]) == 0


def test_the_budget_says_where_the_search_begins() -> None:
    rungs = ladder(MINILM, 8000)
    tight = [False, False, False, False, True, True]
    assert following(rungs, {}, tight) == rungs[4]
    assert following(rungs, {rungs[4]: INACCURATE}, tight) is None  # a wider one would not fit
    assert following(rungs, {}, [False] * len(rungs)) == rungs[-1]  # the nearest there is
    assert following((), {}, []) is None


@given(
    st.lists(st.sampled_from([KEPT, COSTLY, INACCURATE, HOPELESS]), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_the_search_ends_and_never_trains_a_rung_twice(outcomes: list[Outcome], fits: list[bool]) -> None:
    rungs = ladder(MINILM, 8000)
    tried: dict[Structure, Outcome] = {}
    while (rung := following(rungs, tried, fits)) is not None:
        assert rung not in tried
        place = rungs.index(rung)
        assert all(place > rungs.index(other) for other, outcome in tried.items() if outcome.costly)
        assert all(place < rungs.index(other) for other, outcome in tried.items() if outcome.inaccurate)
        tried[rung] = outcomes[place]
    assert 1 <= len(tried) <= len(rungs)
