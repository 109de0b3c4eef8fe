"""Embedding tables by use: rows that training saw keep 8 bits, the others get 4, and the lookup stays one."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import graph, product_codes, rare_rows
from exporters.product_codes import in_codes
from exporters.rare_rows import fine_rows, in_nibbles
from exporters.tables import quantize_tables

pytestmark = pytest.mark.export

ROWS, WIDTH = 400, 32
IN_USE = (2, 3, 5, 8, 13, 399)


@pytest.fixture
def table() -> np.ndarray:
    found = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    found *= np.random.default_rng(1).uniform(0.2, 3, (ROWS, 1)).astype(np.float32)
    found[:, 9] *= 20
    found[:, 11] = 0
    found[7] = 0
    return found


def model(table: np.ndarray, lookups: tuple[str, ...] = ("ids",)) -> Any:
    nodes = [helper.make_node("Gather", ["table", name], [f"found_{name}"]) for name in lookups]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "n"]) for name in lookups],
        [helper.make_tensor_value_info(f"found_{name}", TensorProto.FLOAT, None) for name in lookups],
        [numpy_helper.from_array(table, "table")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def counts(rows: int = ROWS) -> np.ndarray:
    found = np.zeros(rows, dtype=np.intp)
    found[list(IN_USE)] = 1
    return found


def everything(made: Any, rows: int = ROWS) -> np.ndarray:
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["found_ids"], {"ids": np.arange(rows).reshape(2, -1)})[0].reshape(rows, -1)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def test_rows_in_use_keep_8_bits_and_the_others_get_4(table: np.ndarray) -> None:
    made = model(table)
    assert quantize_tables(made, {"ids": counts()}) == (1, 1)
    found = everything(made)
    used = list(IN_USE)
    step = np.abs(table[used]).max(axis=0) / 127
    assert (np.abs(found - table)[used] <= step / 2 + 1e-6).all()
    rare = np.setdiff1d(np.arange(ROWS), used)
    assert 0.02 < error(found[rare], table[rare]) < 0.13
    assert (found[7] == 0).all() and (found[:, 11] == 0).all()


def test_the_operators_do_what_the_encoding_meant(table: np.ndarray) -> None:
    made = model(table)
    quantize_tables(made, {"ids": np.zeros(0, dtype=np.intp)})  # nothing is in use
    assert np.allclose(everything(made), in_nibbles(table).floats(), atol=1e-6)


def test_it_is_smaller_and_in_standard_operators() -> None:
    table = np.random.default_rng(0).standard_normal((ROWS, 384)).astype(np.float32)
    whole, split = model(table), model(table)
    quantize_tables(whole)
    quantize_tables(split, {"ids": counts()})
    assert split.ByteSize() < 0.6 * whole.ByteSize()
    assert {node.domain for node in split.graph.node} == {""}
    assert "table" not in {tensor.name for tensor in split.graph.initializer}
    assert split.opset_import[0].version <= graph.MAX_OPSET


def test_the_scale_of_a_row_is_its_own_and_clips_where_that_pays() -> None:
    rows = np.random.default_rng(2).standard_normal((64, 384)).astype(np.float32)
    rows[:, 5] = 1  # no channel stands out
    scaled = rows * np.logspace(-2, 2, 64, dtype=np.float32)[:, None]
    assert error(in_nibbles(rows).floats(), rows) < 0.125  # the best 16 even levels for a normal variable leave 0.107
    for row, found in zip(scaled, in_nibbles(scaled).floats(), strict=True):
        assert error(found, row) < 0.16


def test_nibbles_are_the_same_however_many_rows_are_packed_at_once(
    table: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = in_nibbles(table)
    monkeypatch.setattr(rare_rows, "_ROWS_AT_ONCE", 60)
    parts = in_nibbles(table)
    assert (parts.packed == whole.packed).all() and np.allclose(parts.rows, whole.rows)


@pytest.mark.parametrize(
    ("lookups", "width", "named"),
    [(("ids", "others"), 32, "ids"), (("ids",), 33, "ids"), (("ids",), 32, "others")],
    ids=["two lookups", "odd width", "not counted"],
)
def test_what_cant_be_told_by_use_keeps_8_bits(lookups: tuple[str, ...], width: int, named: str) -> None:
    made = model(np.random.default_rng(0).standard_normal((ROWS, width)).astype(np.float32), lookups)
    assert quantize_tables(made, {named: counts()}) == (1, 0)
    (weight,) = (tensor for tensor in made.graph.initializer if tensor.name == "table")
    assert weight.data_type == TensorProto.INT8
    assert all(node.op_type != "BitShift" for node in made.graph.node)


@pytest.mark.parametrize("bits", [4, 2])
def test_where_no_row_is_rare_all_keep_8_bits(table: np.ndarray, bits: int) -> None:
    plain, made = model(table), model(table)
    assert quantize_tables(plain) == quantize_tables(made, {"ids": np.ones(ROWS, dtype=np.intp)}, bits) == (1, 0)
    assert made == plain
    one_rare = model(table)
    quantize_tables(one_rare, {"ids": np.arange(ROWS)}, bits)
    assert np.isfinite(everything(one_rare)).all()
    assert rare_rows.size_bytes(ROWS, ROWS, WIDTH, bits) >= table.size + 4 * WIDTH  # the estimate stays a high one


def test_a_width_without_books_keeps_8_bits() -> None:
    made = model(np.random.default_rng(0).standard_normal((ROWS, 34)).astype(np.float32))
    assert quantize_tables(made, {"ids": counts()}, bits=2) == (1, 0)
    assert [node.op_type for node in made.graph.node] == ["Gather", "Cast", "Mul"]


def test_many_rows_in_use_dont_undo_the_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rare_rows, "ALWAYS_FINE", 1)
    often = np.asarray([0, 5, 1, 9, 0, 2, 2, 7])
    assert fine_rows(often, 8).tolist() == [3, 7]  # a quarter, the most frequent
    assert fine_rows(often, 100).tolist() == [1, 2, 3, 5, 6, 7]
    assert fine_rows(often, 4).tolist() == [3]  # counts beyond the table


def test_words_in_use_keep_their_bits_when_a_vocabulary_is_cut() -> None:
    in_use = 7_000
    often = np.zeros(30_522, dtype=np.intp)
    often[:in_use] = 1
    assert len(fine_rows(often, 30_522)) == len(fine_rows(often, 10_000)) == in_use
    assert len(fine_rows(np.ones(250_000, dtype=np.intp), 250_000)) == 62_500  # and a large table shrinks all the same


def test_more_rows_than_16_bits_can_number() -> None:
    table = np.random.default_rng(0).standard_normal((40_000, 2)).astype(np.float32)
    made = model(table)
    quantize_tables(made, {"ids": counts()})
    assert error(everything(made, 40_000), table) < 0.15


@pytest.mark.parametrize("rows", [100, 3000])
def test_two_bits_a_channel_come_from_books(rows: int) -> None:
    table = np.random.default_rng(3).standard_normal((rows, 64)).astype(np.float32)
    table *= np.logspace(-2, 2, rows, dtype=np.float32)[:, None]
    table[:, 5] *= 20
    table[:, 6] = table[9] = 0
    made = model(table)
    assert quantize_tables(made, {"ids": np.zeros(0, dtype=np.intp)}, bits=2) == (1, 1)
    assert {node.domain for node in made.graph.node} == {""}
    found, codes = everything(made, rows), in_codes(table)
    assert np.allclose(found, codes.floats(), atol=1e-5)
    assert (found[9] == 0).all() and (found[:, 6] == 0).all()
    for row, wanted in zip(np.delete(found, 9, axis=0), np.delete(table, 9, axis=0), strict=True):
        assert error(np.delete(row, 5), np.delete(wanted, 5)) < 0.45
    assert (in_codes(table).numbers == codes.numbers).all()


def test_books_leave_less_than_levels_of_as_many_bits() -> None:
    rows = np.random.default_rng(4).standard_normal((6000, 16)).astype(np.float32)
    assert error(in_codes(rows).floats(), rows) < 0.33  # the best 4 levels for a normal variable leave 0.343


def test_two_bits_are_smaller_than_four() -> None:
    table = np.random.default_rng(0).standard_normal((3000, 384)).astype(np.float32)
    four, two = model(table), model(table)
    quantize_tables(four, {"ids": counts()}, bits=4)
    quantize_tables(two, {"ids": counts()}, bits=2)
    assert two.ByteSize() < 0.75 * four.ByteSize()
    # Rows in use don't suffer.
    used = list(IN_USE)
    assert np.array_equal(everything(four, 3000)[used], everything(two, 3000)[used])


@pytest.mark.parametrize("make", [in_codes, in_nibbles])
def test_no_second_table_is_made(make: Callable[[np.ndarray], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(5).standard_normal((100_000, 16)).astype(np.float32)
    for module in (product_codes, rare_rows):
        monkeypatch.setattr(module, "_ROWS_AT_ONCE", 1000)
    monkeypatch.setattr(product_codes, "_SAMPLE", 1000)
    tracemalloc.start()
    try:
        make(table)
        assert tracemalloc.get_traced_memory()[1] < table.nbytes
    finally:
        tracemalloc.stop()


def test_codes_are_the_same_however_many_rows_are_coded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(5).standard_normal((1000, 8)).astype(np.float32)
    whole = in_codes(table)
    monkeypatch.setattr(product_codes, "_ROWS_AT_ONCE", 77)
    parts = in_codes(table)
    assert (parts.numbers == whole.numbers).all() and np.allclose(parts.rows, whole.rows)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("rows", [400, 40_000])
def test_what_a_split_table_takes_is_known_before(rows: int, bits: int) -> None:
    table = np.random.default_rng(6).standard_normal((rows, 16)).astype(np.float32)
    made = model(table)
    quantize_tables(made, {"ids": counts(rows)}, bits=bits)
    stored = sum(len(tensor.raw_data) for tensor in made.graph.initializer)
    assert stored <= rare_rows.size_bytes(rows, len(IN_USE), 16, bits) <= stored + 256


def test_eight_bits_of_a_large_table_take_no_other_one_in_floats() -> None:
    table = np.random.default_rng(0).normal(size=(60_000, 64)).astype(np.float32)
    table[:, 3] = 0
    tracemalloc.start()
    entries, scale = rare_rows.in_s8(table)
    assert tracemalloc.get_traced_memory()[1] < table.nbytes
    tracemalloc.stop()
    assert scale[3] == 1 and np.array_equal(scale, np.where(scale == 1, 1, np.abs(table).max(axis=0) / np.float32(127)))
    assert np.array_equal(entries, np.rint(table / scale).astype(np.int8))
