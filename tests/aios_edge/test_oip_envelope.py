"""The envelope: what the supervisor reads, refuses and rewrites without decoding a tensor."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.errors import RequestError
from aios_edge.oip import envelope as oip


def body(**fields: Any) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}
    return json.dumps({"inputs": [tensor], **fields}).encode()


def refusal(content: bytes, json_length: int | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        oip.parse_request(content, json_length)
    assert caught.value.http_status == 400
    return str(caught.value)


def test_the_envelope_is_read_and_data_stay_raw() -> None:
    parameters = {"priority": 1, "timeout": 1_500_000, "privacy": "local-only", "note": "x", "share": 0.5, "on": True}
    got = oip.parse_request(body(id="7", parameters=parameters, outputs=[{"name": "y"}]), None)
    assert (got.id, got.priority, got.timeout_s, got.local_only) == ("7", 1, 1.5, True)
    assert got.parameters == parameters and type(got.parameters["on"]) is bool
    assert isinstance(got.inputs[0].data, msgspec.Raw) and bytes(got.inputs[0].data) == b"[1, 2]"
    assert got.cost_hint_bytes == 6
    assert got.outputs is not None and json.loads(bytes(got.outputs)) == [{"name": "y"}]


def test_defaults_and_nulls() -> None:
    got = oip.parse_request(body(parameters=None, id=None, outputs=None), None)
    assert (got.id, got.priority, got.timeout_s, got.local_only, got.parameters) == (None, 0, None, False, {})
    assert oip.parse_request(body(parameters={"timeout": 0}), None).timeout_s is None


def test_a_binary_tail_counts_as_cost() -> None:
    head = json.dumps({"inputs": [{"name": "x", "datatype": "UINT8", "shape": [5]}]}).encode()
    assert oip.parse_request(head + b"12345", len(head)).cost_hint_bytes == 5


def test_a_body_without_json_has_no_envelope() -> None:
    got = oip.parse_request(b"raw bytes", 0)
    assert (got.inputs, got.cost_hint_bytes) == ((), 9)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"{", "truncated"),
        (b"[]", "object"),
        (b"{}", "inputs"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}', "binary"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[-Infinity]}]}', "binary"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1.5],"data":[1]}]}', "shape"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[true],"data":[1]}]}', "shape"),
        (b'{"inputs":[{"datatype":"FP32","shape":[1],"data":[1]}]}', "name"),
        (b'{"inputs":[{"name":"\xff","datatype":"FP32","shape":[1],"data":[1]}]}', "UTF-8"),
        (rb'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\ud800"]}]}', "not valid Unicode"),
        (rb'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\ud800 and more"]}]}', "not valid Unicode"),
        (rb'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\udc00"]}]}', "not valid Unicode"),
        (rb'{"id":"\ud83d\ude00","inputs":[{"na', "truncated"),
        (rb'{"id":"\ud83d', "truncated"),
        (body() + b"x", "trailing"),
        (b'{"inputs":[{"data":' + b"[" * 100_000, "nested"),
        (body(parameters={"a": [1]}), "parameters"),
        (body(parameters={"priority": -1}), "priority"),
        (body(parameters={"priority": True}), "priority"),
        (body(parameters={"timeout": "soon"}), "microseconds"),
        (body(parameters={"timeout": -5}), "microseconds"),
        (body(parameters={"timeout": 1.5}), "microseconds"),
        (body(parameters={"privacy": "localonly"}), "local-only"),
    ],
)
def test_a_malformed_request_is_a_400_that_says_why(content: bytes, says: str) -> None:
    assert says in refusal(content)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("timout", "timeout"),
        ("Timeout", "timeout"),
        ("timeout_ms", "timeout"),
        ("timeoutSeconds", "timeout"),
        ("privcay", "privacy"),
        ("Privacy", "privacy"),
        ("PRIORITY", "priority"),
        ("prority", "priority"),
    ],
)
def test_a_parameter_that_is_nearly_one_of_ours_is_refused(name: str, meant: str) -> None:
    said = refusal(body(parameters={"content_type": "x", name: 50}))
    assert f"parameters.{name}" in said and f"Did you mean '{meant}'?" in said


def test_parameters_of_the_clients_own_are_taken_however_many() -> None:
    own = ("content_type", "sequence_id", "headers", "property", "prio", "time", "binary_data_output", "", "é" * 9)
    parameters = dict.fromkeys((*own, "t" * 10000, *map(str, range(1000))), 1)
    assert oip.parse_request(body(parameters=parameters), None).parameters == parameters


@pytest.mark.parametrize("length", [-1, 10_000])
def test_an_impossible_json_length_is_refused(length: int) -> None:
    assert oip.JSON_LENGTH_HEADER in refusal(body(), length)


@pytest.mark.parametrize("header", ["-1", "1.5", "", "x", "+3", "٣", "1_000", "9" * 30, b"\xff"])
def test_a_header_that_is_no_length_is_refused(header: str | bytes) -> None:
    with pytest.raises(RequestError, match="length in bytes"):
        oip.parse_json_length(header)


def test_a_header_that_is_a_length() -> None:
    assert [oip.parse_json_length(h) for h in (None, "0", b"12", " 7 ")] == [None, 0, 12, 7]


@given(st.binary(max_size=300), st.none() | st.integers(-3, 310))
def test_arbitrary_bytes_raise_nothing_else(content: bytes, json_length: int | None) -> None:
    with contextlib.suppress(RequestError):
        oip.parse_request(content, json_length)


def test_responses_are_composed() -> None:
    text, length = oip.encode_response(
        model_name="m", model_version="1", outputs=b'[{"name":"y"}]', id="7", parameters={"energy_j": None}
    )
    assert length is None
    assert json.loads(text) == {
        "model_name": "m",
        "model_version": "1",
        "id": "7",
        "parameters": {"energy_j": None},
        "outputs": [{"name": "y"}],
    }
    content, length = oip.encode_response(model_name="m", model_version="1", outputs=b"[]", binary=b"\x00\x01")
    assert length is not None and content[length:] == b"\x00\x01"
    assert "id" not in json.loads(content[:length])


@pytest.mark.parametrize("tail", [None, b"\x00\xff\x00"])
def test_a_request_is_rewritten_without_touching_its_tensors(tail: bytes | None) -> None:
    head = body(id="a", parameters={"timeout": 5, "privacy": "x", "own": 1}, extra={"kept": [1.0, 2]})
    content, length = oip.rewrite_request(
        head + (tail or b""),
        None if tail is None else len(head),
        updates={"timeout": 3},
        removals=("privacy",),
    )
    text, rest = (content, None) if length is None else (content[:length], content[length:])
    assert rest == tail
    assert json.loads(text) == {**json.loads(head), "parameters": {"timeout": 3, "own": 1}}
    assert b'"data": [1, 2]' in text


def test_a_rewritten_request_may_lose_or_gain_its_parameters() -> None:
    lost, _ = oip.rewrite_request(body(parameters={"timeout": 1}), None, removals=("timeout",))
    assert "parameters" not in json.loads(lost)
    gained, _ = oip.rewrite_request(body(), None, updates={"timeout": 1})
    assert json.loads(gained)["parameters"] == {"timeout": 1}
    assert oip.rewrite_request(b"raw", 0, updates={"timeout": 1}) == (b"raw", 0)


def test_a_response_of_another_server_gets_our_names_and_parameters() -> None:
    head = b'{"model_name":"theirs","id":"x","parameters":{"route":"local","own":1,"k":2},"outputs":[{"name":"y"}]}'
    content, length = oip.rewrite_response(
        head + b"tail",
        len(head),
        model_name="m",
        model_version="2",
        id="7",
        defaults={"own": None, "energy_j": None},
        parameters={"route": "cloud"},
    )
    assert length is not None and content[length:] == b"tail"
    assert json.loads(content[:length]) == {
        "model_name": "m",
        "model_version": "2",
        "id": "7",
        "parameters": {"route": "cloud", "own": 1, "k": 2, "energy_j": None},
        "outputs": [{"name": "y"}],
    }
    content, _ = oip.rewrite_response(head, None, model_name="m", model_version="2", id=None, parameters={})
    assert "id" not in json.loads(content), "an id that the client didn't give is not the client's"
    for nonsense in (b"", b"<html>", b"{}", b'{"outputs":3}'):
        with pytest.raises(RequestError):
            oip.rewrite_response(nonsense, None, model_name="m", model_version="2", id=None, parameters={})


def test_metadata_leave_out_additions_that_are_empty() -> None:
    tensor = oip.TensorMetadata(name="x", datatype="FP32", shape=(-1, 2))
    plain = oip.ModelMetadata(name="m", versions=("1",), platform=oip.PLATFORM, inputs=(tensor,), outputs=())
    assert json.loads(msgspec.json.encode(plain)) == {
        "name": "m",
        "versions": ["1"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [],
    }
    assert json.loads(oip.LIVE) == {"live": True} and json.loads(oip.READY) == {"ready": True}
    assert json.loads(oip.error_body('a "quoted" thing')) == {"error": 'a "quoted" thing'}


def test_the_envelope_needs_no_numpy() -> None:
    code = "import sys, aios_edge.oip.envelope; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
