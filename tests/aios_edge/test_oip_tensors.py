"""Tensors in JSON and binary: round trips, everything that must be refused, and the encoder of Triton's client."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_edge.errors import RemoteError, RequestError
from aios_edge.manifest import TensorSpec
from aios_edge.oip.datatypes import DTYPES, FLOATS, INTEGERS, Tensor, narrow_bf16, widen_bf16
from aios_edge.oip.envelope import RequestedOutput, encode_response
from aios_edge.oip.tensors import (
    DecodedRequest,
    decode_inputs,
    decode_response,
    encode_outputs,
    encode_request,
)

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, finite: bool) -> Tensor:
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(SHAPES)
    count = math.prod(shape)
    if datatype == "BYTES":
        element = st.text().map(str.encode) if finite else st.binary(max_size=12)
        array = np.empty(count, dtype=np.object_)
        array[:] = draw(st.lists(element, min_size=count, max_size=count))
        return Tensor(datatype, array.reshape(shape))
    if datatype == "BOOL":
        values = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=np.bool_)
        return Tensor(datatype, values.reshape(shape))
    size = DTYPES[datatype].itemsize
    array = np.frombuffer(draw(st.binary(min_size=count * size, max_size=count * size)), DTYPES[datatype])
    if finite and datatype in FLOATS:
        good = np.isfinite(widen_bf16(array) if datatype == "BF16" else array)
        array = np.where(good, array, DTYPES[datatype].type(0))
    return Tensor(datatype, array.reshape(shape))


def same(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit."""
    if left.datatype != right.datatype or left.array.shape != right.array.shape:
        return False
    if left.datatype == "BYTES":
        return bool(left.array.ravel().tolist() == right.array.ravel().tolist())
    return left.array.dtype == right.array.dtype and left.array.tobytes() == right.array.tobytes()


@pytest.mark.parametrize("binary", [True, False])
def test_every_datatype_survives_request_and_response(binary: bool) -> None:
    @settings(max_examples=300, deadline=None)
    @given(tensors(finite=not binary), tensors(finite=not binary))
    def round_trip(first: Tensor, second: Tensor) -> None:
        sent = {"a": first, "b": second}
        decoded = decode_inputs(*encode_request(sent, binary=binary, id="7"))
        assert decoded.binary_output is binary
        assert all(same(sent[name], decoded.inputs[name]) for name in ("a", "b"))
        outputs, tail = encode_outputs(decoded.inputs, decoded)
        response = decode_response(
            *encode_response(model_name="m", model_version="1", outputs=outputs, binary=tail, id="7")
        )
        assert all(same(sent[name], response.outputs[name]) for name in ("a", "b"))
        assert (response.id, response.model_name, response.model_version) == ("7", "m", "1")

    round_trip()


def request(datatype: str, shape: Any, data: Any, **more: Any) -> bytes:
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "data": data, **more}
    return json.dumps({"inputs": [tensor]}).encode()


def decoded(datatype: str, shape: Any, data: Any) -> Any:
    return decode_inputs(request(datatype, shape, data), None).inputs["x"].array


def test_nested_and_flat_data_are_the_same() -> None:
    nested, flat = (decoded("INT16", [2, 1, 3], data) for data in ([[[1, 2, 3]], [[4, 5, 6]]], [1, 2, 3, 4, 5, 6]))
    assert nested.tolist() == flat.tolist() == [[[1, 2, 3]], [[4, 5, 6]]]
    assert decoded("BYTES", [2, 1], [["a"], ["ä"]]).tolist() == [[b"a"], ["ä".encode()]]
    assert decoded("FP32", [2, 0], [[], []]).shape == decoded("FP32", [2, 0], []).shape == (2, 0)


def test_scalars_have_no_dimensions() -> None:
    for data in (5, [5]):
        array = decoded("FP64", [], data)
        assert array.shape == () and array.item() == 5


def test_an_integral_number_is_an_integer_however_it_is_written() -> None:
    body = b'{"inputs":[{"name":"x","datatype":"INT64","shape":[2],"data":[2.0, 1e3]}]}'
    assert decode_inputs(body, None).inputs["x"].array.tolist() == [2, 1000]
    assert decoded("FP32", [1], [3]).tolist() == [3.0]


@pytest.mark.parametrize("datatype", sorted(INTEGERS))
def test_integer_limits(datatype: str) -> None:
    limits = np.iinfo(DTYPES[datatype])
    assert decoded(datatype, [2], [int(limits.min), int(limits.max)]).tolist() == [limits.min, limits.max]
    for outside in (int(limits.min) - 1, int(limits.max) + 1, 10**400):
        with pytest.raises(RequestError, match="out of the range"):
            decoded(datatype, [1], [outside])


@pytest.mark.parametrize("count", [1, 257, 1000])
@pytest.mark.parametrize("datatype", sorted(INTEGERS))
def test_integer_limits_in_a_crowd(datatype: str, count: int) -> None:
    limits = np.iinfo(DTYPES[datatype])
    crowd = [number % 100 for number in range(count)]
    for edge in (int(limits.min), int(limits.max)):
        array = decoded(datatype, [count + 1], [*crowd, edge])
        assert array.dtype == DTYPES[datatype] and array.tolist() == [*crowd, edge]
    for outside in (int(limits.min) - 1, int(limits.max) + 1, 2**63, 2**64, -(2**63) - 1, 10**400):
        if not limits.min <= outside <= limits.max:
            with pytest.raises(RequestError, match="out of the range"):
                decoded(datatype, [count + 1], [*crowd, outside])
    with pytest.raises(RequestError, match=f"element {count} is true or false"):
        decoded(datatype, [count + 1], [*crowd, True])
    assert decoded(datatype, [count + 1, 1], [[number] for number in [*crowd, 2.0]]).ravel().tolist() == [*crowd, 2]


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("INT64", [1], [1.5], "a fraction"),
        ("INT32", [2], [1.0, 2.5], "element 1 is a fraction"),
        ("INT32", [3], [1.5, "x", 1.0], "element 1 is text"),
        ("INT64", [1], ["1"], "text"),
        ("INT64", [1], [True], "true or false"),
        ("INT64", [1], [None], "null"),
        ("INT64", [1], [{}], "an object"),
        ("FP32", [1], ["1"], "text"),
        ("FP32", [1], [False], "true or false"),
        ("FP32", [1], [1e39], "out of the range"),
        ("FP16", [1], [70000], "out of the range"),
        ("BF16", [1], [3.4e38], "out of the range"),
        ("FP64", [1], [10**400], "out of the range"),
        ("BOOL", [1], [1], "a number"),
        ("BYTES", [1], [1], "a number"),
        ("FP8", [1], [1], "not a datatype"),
        ("FP32", [2], [1], "has 1 elements"),
        ("FP32", [-1], [1], "dimension -1"),
        ("FP32", [2**40], [1], "dimension"),
        ("FP32", [1] * 40, [1], "40 dimensions"),
        ("FP32", [2**31 - 1, 2**31 - 1], [1], "takes"),
        ("FP32", [0] + [2**31 - 1] * 4, [], "too large"),
        ("FP32", [2, 2], [[1, 2], [3]], "1 elements, not 2"),
        ("FP32", [2, 2], [[1, 2], 3], "unevenly"),
        ("FP32", [2, 2], [[1, 2]], "1 rows"),
        ("FP32", [2], [[1], [2]], "a list"),
        ("FP32", [1], 1, "not a list"),
        ("FP32", [1], None, "neither"),
    ],
)
def test_data_that_do_not_fit_are_refused(datatype: str, shape: Any, data: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        decoded(datatype, shape, data)
    assert caught.value.http_status == 400 and "'x'" in str(caught.value)


def test_numbers_too_large_for_a_double_are_refused() -> None:
    with pytest.raises(RequestError, match="range"):
        decode_inputs(b'{"inputs":[{"name":"x","datatype":"FP64","shape":[1],"data":[1e400]}]}', None)


def binary(datatype: str, shape: Any, data: bytes, size: Any = None, /, **more: Any) -> tuple[bytes, int]:
    parameters = {"binary_data_size": len(data) if size is None else size}
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "parameters": parameters, **more}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + data, len(head)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (binary("FP32", [2], b"1234"), "takes 8"),
        (binary("FP32", [1], b"1234", 8), "are left in the body"),
        (binary("FP32", [1], b"12345678", 4), "left over"),
        (binary("FP32", [1], b"1234", -4), "not a size"),
        (binary("FP32", [1], b"1234", "4"), "not a size"),
        (binary("FP32", [1], b"1234", data=[1]), "both"),
        (binary("BOOL", [1], b"\x02"), "0 or 1"),
        (binary("BYTES", [1], b"\x05\x00\x00\x00abc"), "longer than the data"),
        (binary("BYTES", [2], b"\x03\x00\x00\x00abcde"), "before the length"),
        (binary("BYTES", [1], b"\x01\x00\x00\x00abc"), "left over"),
        (binary("BYTES", [2**30], b"\x01\x00\x00\x00a"), "too few"),
        (binary("BYTES", [1], b"\xff\xff\xff\xff"), "longer"),
    ],
)
def test_binary_data_that_do_not_fit_are_refused(content: tuple[bytes, int], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        decode_inputs(*content)


def test_names_are_unique_and_shared_memory_is_refused() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    with pytest.raises(RequestError, match="twice"):
        decode_inputs(json.dumps({"inputs": [tensor, tensor]}).encode(), None)
    with pytest.raises(RequestError, match=r"'x'.*shared_memory_region"):
        decode_inputs(request("FP32", [1], [1], parameters={"shared_memory_region": "r"}), None)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"shared_memory_region": "r", "shared_memory_byte_size": 4}, "shared_memory_region.*shared memory"),
        ({"binary_dta": True}, "binary_dta.*binary_data"),
        ({"binary_data": True, "own": 1}, "own.*binary_data"),
        ({"classification": 2}, "classification"),
    ],
)
def test_a_parameter_of_an_output_that_would_be_ignored_is_refused(parameters: Any, says: str) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    body = {"inputs": [tensor], "outputs": [{"name": "y", "parameters": parameters}]}
    with pytest.raises(RequestError, match=f"output 'y': .*{says}") as caught:
        decode_inputs(json.dumps(body).encode(), None)
    assert caught.value.http_status == 400


@pytest.mark.parametrize("datatype", sorted(set(DTYPES) - {"BYTES"}))
def test_binary_data_lie_where_vector_code_wants_them_however_long_the_json_is(datatype: str) -> None:
    for padding in range(16):
        array = np.ones(3, dtype=DTYPES[datatype])
        body, length = binary(datatype, [3], array.tobytes(), pad="p" * padding)
        found = decode_inputs(body, length).inputs["x"].array
        assert found.ctypes.data % 16 == 0 and found.tolist() == array.tolist()


def spec(datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name="x", datatype=datatype, shape=shape)


def test_a_body_without_json_is_the_only_input() -> None:
    got = decode_inputs(np.arange(6, dtype="<f4").tobytes(), 0, (spec("FP32", -1, 3),))
    assert got.binary_output and got.inputs["x"].array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert decode_inputs(bytes(8), 0, (spec("INT16", -1, -1),)).inputs["x"].array.shape == (1, 4)
    assert decode_inputs(b"a text", 0, (spec("BYTES", -1),)).inputs["x"].array.tolist() == [b"a text"]
    for specs in (None, (), (spec("FP32", -1), spec("FP32", -1))):
        with pytest.raises(RequestError, match="one input"):
            decode_inputs(b"1234", 0, specs)
    for one in (spec("FP32", -1, 3), spec("BYTES", 2), spec("FP32", 0, -1)):
        with pytest.raises(RequestError):
            decode_inputs(b"12345", 0, (one,))


def asked(*outputs: RequestedOutput, binary_output: bool = False) -> DecodedRequest:
    return DecodedRequest(inputs={}, outputs=outputs or None, binary_output=binary_output)


def test_each_output_comes_the_way_it_was_asked_for() -> None:
    body = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "b"}, {"name": "a", "parameters": {"binary_data": False}}],
    }
    have = {name: Tensor("INT32", np.array([1, 2], dtype=np.int32)) for name in "abc"}
    outputs, tail = encode_outputs(have, decode_inputs(json.dumps(body).encode(), None))
    assert json.loads(outputs) == [
        {"name": "b", "datatype": "INT32", "shape": [2], "parameters": {"binary_data_size": 8}},
        {"name": "a", "datatype": "INT32", "shape": [2], "data": [1, 2]},
    ]
    assert tail == struct.pack("<ii", 1, 2)


@pytest.mark.parametrize("datatype", sorted(FLOATS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 256, 257])  # long ones are looked at by numpy
def test_json_refuses_what_it_cannot_carry_and_binary_carries_it(datatype: str, value: float, size: int) -> None:
    array = np.array([1.0] * (size - 1) + [value], dtype=np.float32)
    array = narrow_bf16(array) if datatype == "BF16" else array.astype(DTYPES[datatype])
    have = {"y": Tensor(datatype, array)}
    with pytest.raises(RequestError, match="binary") as caught:
        encode_outputs(have, asked())
    assert caught.value.http_status == 422
    assert encode_outputs(have, asked(binary_output=True))[1] == array.tobytes()


def test_bytes_that_are_no_text_need_binary_too() -> None:
    have = {"y": Tensor("BYTES", np.array([b"\xff"], dtype=np.object_))}
    with pytest.raises(RequestError, match="binary") as caught:
        encode_outputs(have, asked())
    assert caught.value.http_status == 422


def test_unknown_and_repeated_outputs_are_refused() -> None:
    have = {"y": Tensor("BOOL", np.array([True]))}
    with pytest.raises(RequestError, match="Outputs: y"):
        encode_outputs(have, asked(RequestedOutput(name="z")))
    with pytest.raises(RequestError, match="twice"):
        encode_outputs(have, asked(RequestedOutput(name="y"), RequestedOutput(name="y")))
    with pytest.raises(RequestError, match="true or false"):
        encode_outputs(have, asked(RequestedOutput(name="y", parameters={"binary_data": 1})))


def test_bf16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, math.inf, 3.4e38], dtype=np.float32)
    assert widen_bf16(narrow_bf16(values)).tolist() == [1.0, 1.0, 1.015625, -0.0, math.inf, math.inf]
    assert np.isnan(widen_bf16(narrow_bf16(np.array([math.nan], dtype=np.float32)))).all()
    every = np.arange(65536, dtype=np.uint16)
    finite = every[~np.isnan(widen_bf16(every))]
    assert (narrow_bf16(widen_bf16(finite)) == finite).all()


def test_arrays_find_their_datatype() -> None:
    assert Tensor.of(np.array(["a", "ä"])).array.tolist() == [b"a", "ä".encode()]
    swapped = Tensor.of(np.array([1, 2], dtype=">i4"))
    assert swapped.datatype == "INT32" and swapped.array.tobytes() == struct.pack("<ii", 1, 2)
    with pytest.raises(RequestError, match="complex128"):
        Tensor.of(np.array([1j]))
    with pytest.raises(RequestError, match="not text or bytes"):
        Tensor.of(np.array([None], dtype=np.object_))


@given(st.binary(max_size=200), st.none() | st.integers(-2, 210))
def test_arbitrary_bytes_raise_nothing_else(content: bytes, json_length: int | None) -> None:
    with contextlib.suppress(RequestError):
        decode_inputs(content, json_length, (spec("FP16", -1, 2),))
    with contextlib.suppress(RemoteError):
        decode_response(content, json_length)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([*sorted(DTYPES), "FP8"]),
    st.lists(st.integers(-1, 4) | st.integers(), max_size=4) | JSON,
    JSON,
    JSON,
    st.binary(max_size=20),
)
def test_a_nearly_valid_request_raises_nothing_else(
    datatype: str, shape: Any, data: Any, parameters: Any, tail: bytes
) -> None:
    tensors_ = [
        {"name": "x", "datatype": datatype, "shape": shape, "data": data},
        {"name": "y", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(tail)}},
    ]
    for inputs in (tensors_[:1], tensors_[1:], tensors_):
        head = json.dumps({"inputs": inputs, "parameters": parameters, "outputs": parameters}).encode()
        for outputs in (head, json.dumps({"inputs": inputs}).encode()):
            with contextlib.suppress(RequestError):
                decode_inputs(outputs + tail, len(outputs))


TRITON = {name: dtype for name, dtype in DTYPES.items() if name != "BF16"}  # its BF16 needs a package of its own


@pytest.mark.parametrize("as_binary", [True, False])
@pytest.mark.parametrize("datatype", sorted(TRITON))
def test_tritonclient_and_we_understand_each_other(datatype: str, as_binary: bool) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult

    array = np.array([[0, 1, 1]]).astype(TRITON[datatype])
    if datatype == "BYTES":
        array = np.array([[b"", "ä".encode(), b"abc"]], dtype=np.object_)
    tensor = InferInput("x", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=as_binary)
    wanted = [InferRequestedOutput("x", binary_data=as_binary)]
    body, length = InferenceServerClient.generate_request_body([tensor], outputs=wanted, request_id="7", timeout=5)
    got = decode_inputs(body, length)
    assert same(got.inputs["x"], Tensor(datatype, array))

    ours, our_length = encode_request({"x": Tensor(datatype, array)}, binary=as_binary)
    assert ours[our_length or 0 :] == body[length or 0 :] or not as_binary

    outputs, tail = encode_outputs(got.inputs, got)
    content, length = encode_response(model_name="m", model_version="1", outputs=outputs, binary=tail)
    result = InferResult.from_response_body(content, header_length=length).as_numpy("x")
    if datatype == "BYTES" and not as_binary:
        result = np.array([[item.encode() for item in row] for row in result.tolist()], dtype=np.object_)
    assert result.tolist() == array.tolist()
