"""Messages to what the desk takes, and back: every datatype, typed and raw, and whatever a stranger may send."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aios_edge.errors import MissingExtra, RemoteError, RequestError
from aios_edge.oip.datatypes import DTYPES, FLOATS, Tensor, narrow_bf16
from aios_edge.oip.elements import to_binary
from aios_edge.oip.envelope import encode_response, parse_request
from aios_edge.oip.tensors import DecodedRequest, decode_inputs, encode_outputs
from device_agent import grpc_door
from device_agent.grpc_door.callers import Visit
from device_agent.grpc_door.calls import Infer, understood
from device_agent.grpc_door.contents import FIELDS, RAW_ONLY, from_bytes, json_to_bytes, to_bytes
from device_agent.grpc_door.messages import METHODS, ModelInferRequest, ModelInferResponse
from device_agent.grpc_door.refusal import CHECK, PUSHBACK, REASON, refusal, refused_reply
from device_agent.grpc_door.request import infer_body
from device_agent.grpc_door.response import infer_response
from device_agent.values import Reason

ALL = sorted(DTYPES)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)


@st.composite
def tensors(draw: st.DrawFn, datatype: str | None = None, *, finite: bool = False) -> Tensor:
    """Any tensor of the protocol; ``finite``: what JSON carries too."""
    datatype = draw(st.sampled_from(ALL)) if datatype is None else datatype
    shape = draw(SHAPES)
    if datatype == "BYTES":
        texts = st.text("aä\0\U0001f600", max_size=5).map(str.encode) if finite else st.binary(max_size=5)
        items = draw(st.lists(texts, min_size=math.prod(shape), max_size=math.prod(shape)))
        array = np.empty(len(items), dtype=np.object_)
        array[:] = items
        return Tensor(datatype, array.reshape(shape))
    if datatype == "BF16":
        if finite:
            floats = hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32))
            return Tensor(datatype, narrow_bf16(draw(floats)))
        return Tensor(datatype, draw(hnp.arrays(np.uint16, shape)))
    options = {"allow_nan": False, "allow_infinity": False} if finite and datatype in FLOATS else {}
    return Tensor(datatype, draw(hnp.arrays(DTYPES[datatype], shape, elements=options)))


def message(sent: dict[str, Tensor], *, raw: bool, **more: Any) -> Any:
    """A request with these inputs, built as a client does: with numpy."""
    request = ModelInferRequest(model_name="m", **more)
    for name, tensor in sent.items():
        given = request.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.array.shape)
        if raw:
            request.raw_input_contents.append(to_binary(tensor))
        else:
            getattr(given.contents, FIELDS[tensor.datatype]).extend(tensor.array.ravel().tolist())
    return request


def identical(left: Tensor, right: Tensor) -> bool:
    same_kind = (left.datatype, left.array.shape) == (right.datatype, right.array.shape)
    return same_kind and to_binary(left) == to_binary(right)


@given(st.data(), st.booleans())
def test_a_worker_gets_what_a_client_sent(data: st.DataObject, raw: bool) -> None:
    kinds = st.sampled_from(ALL if raw else sorted(FIELDS))
    sent = {f"x{index}": data.draw(tensors(data.draw(kinds))) for index in range(data.draw(st.integers(0, 3)))}
    if not raw:  # a NaN's payload is Python's and protobuf's to keep, not ours
        sent = {
            name: Tensor(t.datatype, np.nan_to_num(t.array)) if t.datatype in FLOATS else t for name, t in sent.items()
        }
    made = infer_body(message(sent, raw=raw, id="q"), None)
    decoded = decode_inputs(made.body, made.json_length)
    assert list(decoded.inputs) == list(sent)
    assert all(identical(decoded.inputs[name], tensor) for name, tensor in sent.items())
    assert decoded.binary_output and made.raw == (raw or not sent)
    assert parse_request(made.body, made.json_length).id == "q"


@given(st.lists(tensors(), max_size=3), st.booleans())
def test_a_client_gets_what_a_worker_gave(given: list[Tensor], raw: bool) -> None:
    outputs = {f"y{index}": tensor for index, tensor in enumerate(given)}
    listed, binary = encode_outputs(outputs, DecodedRequest(inputs={}, binary_output=True))
    body, length = encode_response(model_name="m", model_version="1", outputs=listed, binary=binary, id="q")
    answer = infer_response(body, length, raw=raw)
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "1", "q")
    goes_raw = raw or any(tensor.datatype in RAW_ONLY for tensor in given)
    assert len(answer.raw_output_contents) == (len(given) if goes_raw else 0)
    for index, (output, tensor) in enumerate(zip(answer.outputs, given, strict=True)):
        assert (output.datatype, tuple(output.shape)) == (tensor.datatype, tensor.array.shape)
        assert "binary_data_size" not in output.parameters
        if goes_raw:
            assert answer.raw_output_contents[index] == to_binary(tensor) and not output.HasField("contents")
            continue
        found = getattr(output.contents, FIELDS[tensor.datatype])
        mine = tensor.array.ravel().tolist()
        assert len(found) == len(mine)
        assert all(a == b or (a != a and b != b) for a, b in zip(found, mine, strict=True))


@given(st.lists(tensors(finite=True), max_size=3))
def test_a_cloud_that_answers_in_json_gives_the_same(given: list[Tensor]) -> None:
    outputs = {f"y{index}": tensor for index, tensor in enumerate(given)}
    listed, _ = encode_outputs(outputs, DecodedRequest(inputs={}))
    body, length = encode_response(model_name="m", model_version="1", outputs=listed)
    assert length is None
    answer = infer_response(body, None, raw=True)
    for tensor, found in zip(given, answer.raw_output_contents, strict=True):
        again = (
            Tensor(tensor.datatype, np.frombuffer(found, DTYPES[tensor.datatype]))
            if tensor.datatype != "BYTES"
            else None
        )
        assert found == to_binary(tensor) or (again is not None and (again.array == tensor.array.ravel()).all()), tensor


def test_nested_json_is_flat_in_bytes() -> None:
    from msgspec import Raw

    assert json_to_bytes("INT16", Raw(b"[[1,2],[3,4]]")) == struct.pack("<4h", 1, 2, 3, 4)
    assert json_to_bytes("BF16", Raw(b"[1.00390625, -0.0]")) == b"\x80\x3f\x00\x80"  # halfway: to even
    for datatype, text in (("BOOL", b"[1]"), ("INT8", b"[300]"), ("BYTES", b"[1]"), ("FP16", b"[1e9]"), ("X", b"[1]")):
        with pytest.raises(ValueError):
            json_to_bytes(datatype, Raw(text))
    for text in (b'[{"a":1}]', b"null", b"[null]", b"[", b"\xff"):
        with pytest.raises(ValueError):
            json_to_bytes("FP32", Raw(text))


class Desk:
    """Nobody asks it anything."""


def visit() -> Visit:
    return Visit(Desk(), lambda completion: None, "/x")  # type: ignore[arg-type]


@given(st.binary(max_size=60), st.sampled_from(sorted(METHODS)))
def test_any_bytes_are_understood_or_refused(data: bytes, method: str) -> None:
    try:
        understood(visit(), method, data, None)
    except RequestError as error:
        assert error.http_status == 400


@given(st.data())
def test_a_message_with_some_bytes_changed_is_understood_or_refused(data: st.DataObject) -> None:
    sent = {f"x{index}": data.draw(tensors(kind)) for index, kind in enumerate(("INT64", "BYTES", "FP32"))}
    whole = bytearray(message(sent, raw=data.draw(st.booleans())).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        asked = understood(visit(), "ModelInfer", bytes(whole), 1.0)
        assert isinstance(asked, Infer)
        decode_inputs(asked.made.body, asked.made.json_length)
    except RequestError as error:
        assert error.http_status == 400


@given(st.data())
def test_an_answer_with_some_bytes_changed_is_told_or_refused(data: st.DataObject) -> None:
    outputs = {"y": data.draw(tensors()), "z": data.draw(tensors())}
    listed, binary = encode_outputs(outputs, DecodedRequest(inputs={}, binary_output=True))
    body, length = encode_response(model_name="m", model_version="1", outputs=listed, binary=binary)
    broken = bytearray(body)
    for _ in range(data.draw(st.integers(0, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        infer_response(bytes(broken), length, raw=data.draw(st.booleans()))
    except RemoteError as error:
        assert "HTTP" in str(error)


def refused(request: Any, remaining_s: float | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        infer_body(request, remaining_s)
    assert caught.value.http_status == 400
    return str(caught.value)


def test_what_contradicts_itself_is_refused_by_name() -> None:
    one = {"x": Tensor("INT32", np.array([1, 2], dtype=np.int32))}
    both = message(one, raw=True)
    both.inputs[0].contents.int_contents.append(1)
    assert "raw_input_contents" in refused(both) and "'x'" in refused(both)
    twice = message(one, raw=True)
    twice.raw_input_contents.append(b"")
    assert "2 tensors" in refused(twice)
    wrong = message(one, raw=False)
    wrong.inputs[0].contents.fp32_contents.append(1.0)
    assert "fp32_contents" in refused(wrong) and "int_contents" in refused(wrong)
    few = message(one, raw=False)
    few.inputs[0].shape[0] = 3
    assert "has 2 elements, shape [3] takes 3" in refused(few)
    for datatype in RAW_ONLY:
        few.inputs[0].datatype = datatype
        assert "raw_input_contents" in refused(few)
    few.inputs[0].datatype = "INT128"
    assert "'INT128' is not a datatype" in refused(few)
    wide = message({"x": Tensor("INT32", np.array([300], dtype=np.int32))}, raw=False)
    wide.inputs[0].datatype = "INT8"
    assert "out of the range of INT8" in refused(wide)
    empty = message(one, raw=True)
    empty.parameters["timeout"].SetInParent()
    assert "parameters.timeout: has no value" in refused(empty)
    layout = message(one, raw=True)
    layout.outputs.add(name="y").parameters["binary_data"].bool_param = True
    assert "binary_data_output" in refused(layout)
    layout = message(one, raw=True)
    layout.parameters["binary_data_output"].string_param = "yes"
    assert "not true or false" in refused(layout)


def test_a_shape_of_any_numbers_is_left_to_the_worker() -> None:
    request = message({"x": Tensor("INT32", np.array([1, 2], dtype=np.int32))}, raw=False)
    request.inputs[0].shape[0] = -1
    made = infer_body(request, None)
    with pytest.raises(RequestError, match="dimension -1"):
        decode_inputs(made.body, made.json_length)


@given(st.integers(0, 2**40), st.floats(0, 1e12) | st.none())
def test_the_sooner_deadline_counts(timeout_us: int, remaining_s: float | None) -> None:
    request = message({}, raw=True)
    if timeout_us:
        request.parameters["timeout"].int64_param = timeout_us
    made = infer_body(request, remaining_s)
    found = parse_request(made.body, made.json_length).timeout_s
    limits = [limit for limit in (timeout_us / 1e6 or None, remaining_s) if limit is not None]
    expected = min(limits, default=None)
    if expected is None or (timeout_us == 0 and expected > 2**53 / 1e6):
        assert found is None
    else:
        assert found is not None and found == pytest.approx(max(expected, 1e-6), abs=1e-6)


def test_a_timeout_that_is_none_is_refused_as_everywhere() -> None:
    request = message({}, raw=True)
    request.parameters["timeout"].string_param = "soon"
    made = infer_body(request, 1.0)
    with pytest.raises(RequestError, match="microseconds"):
        parse_request(made.body, made.json_length)


def test_parameters_of_every_kind_go_both_ways() -> None:
    request = message({}, raw=True)
    values = {"a": True, "b": -3, "c": "x", "d": 0.5, "e": 2**64 - 1}
    for name, field in zip("abcde", ("bool", "int64", "string", "double", "uint64"), strict=True):
        setattr(request.parameters[name], f"{field}_param", values[name])
    made = infer_body(request, None)
    assert parse_request(made.body, made.json_length).parameters == {**values, "binary_data_output": True}
    told = {**values, "f": None, "g": [1, {"h": 2}]}
    body, length = encode_response(model_name="m", model_version="1", outputs=b"[]", parameters=told)
    answer = infer_response(body, length, raw=True)
    found = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in answer.parameters.items()}
    assert found == {**values, "e": "18446744073709551615", "g": '[1,{"h":2}]'}, "null is left out"


def test_who_sends_typed_data_gets_typed_data_unless_told_otherwise() -> None:
    one = {"x": Tensor("INT32", np.array([1], dtype=np.int32))}
    for raw in (True, False):
        assert infer_body(message(one, raw=raw), None).raw == raw
        for wish in (True, False):
            request = message(one, raw=raw)
            request.parameters["binary_data_output"].bool_param = wish
            assert infer_body(request, None).raw == wish


def test_bytes_that_are_no_elements_are_no_answer() -> None:
    for datatype, data in (("INT32", b"abc"), ("BYTES", b"\x05\0\0\0a"), ("BYTES", b"\x05\0")):
        with pytest.raises(ValueError):
            from_bytes(datatype, data)


def test_typed_elements_keep_their_bits() -> None:
    request = ModelInferRequest.InferInputTensor() if hasattr(ModelInferRequest, "InferInputTensor") else None
    assert request is not None
    request.contents.fp64_contents.extend([5e-324, -0.0, math.inf])
    assert to_bytes("FP64", [3], request.contents, "x") == struct.pack("<3d", 5e-324, -0.0, math.inf)


def test_each_refusal_has_its_status() -> None:
    codes = {
        status: refusal(status, "x").code
        for status in (400, 401, 403, 404, 413, 415, 422, 429, 500, 501, 502, 503, 504)
    }
    assert codes[400] == "INVALID_ARGUMENT" and codes[401] == "UNAUTHENTICATED" and codes[403] == "PERMISSION_DENIED"
    assert codes[404] == "NOT_FOUND" and codes[413] == codes[429] == "RESOURCE_EXHAUSTED"
    assert codes[415] == codes[501] == "UNIMPLEMENTED" and codes[422] == "FAILED_PRECONDITION"
    assert codes[500] == "INTERNAL" and codes[502] == codes[503] == "UNAVAILABLE" and codes[504] == "DEADLINE_EXCEEDED"
    assert refusal(418, "x").code == "UNKNOWN"
    exhausted = {reason for reason in Reason if refusal(503, "x", reason=reason.value).code == "RESOURCE_EXHAUSTED"}
    assert exhausted == {Reason.QUEUE_FULL, Reason.BUDGET}


def test_a_refusal_says_when_to_come_back_and_why() -> None:
    shed = refused_reply(503, b'{"error":"full","parameters":{"route":null,"reason":"queue_full"}}', 0.0421)
    assert shed.text == "full" and dict(shed.metadata) == {REASON: "queue_full", PUSHBACK: "42"}
    assert dict(refusal(413, "too long").metadata) == {PUSHBACK: "-1"}, "no waiting helps"
    assert dict(refused_reply(422, b'{"error":"no","parameters":{"check":"golden"}}', None).metadata) == {
        CHECK: "golden"
    }
    assert len(refusal(400, "ä" * 10_000).text) <= 600


def test_the_descriptor_is_what_the_compiler_makes_of_the_proto(tmp_path: Path) -> None:
    folder = Path(grpc_door.__file__).parent
    made = tmp_path / "made.binpb"
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{folder}",
        f"--descriptor_set_out={made}",
        "open_inference.proto",
    ]
    subprocess.run(command, check=True, capture_output=True)
    found, expected = (
        descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
        for path in (folder / "open_inference.binpb", made)
    )
    assert found == expected, "run: make proto"


def test_field_numbers_are_the_public_protocols() -> None:
    """Against KServe's own copy, which any client may have; what Triton adds is asked for by its client elsewhere."""
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as public

    for name, theirs in public.DESCRIPTOR.message_types_by_name.items():
        if name.startswith("Repository"):  # Triton's, which came first and has more fields
            continue
        ours = ModelInferRequest.DESCRIPTOR.file.message_types_by_name[name]
        fields = {field.name: field for field in ours.fields}
        for field in theirs.fields:
            assert (fields[field.name].number, fields[field.name].type) == (field.number, field.type), field.full_name
    assert ModelInferResponse.DESCRIPTOR.full_name == "inference.ModelInferResponse"


@pytest.mark.parametrize(("module", "package"), [("grpc", "grpcio"), ("google.protobuf", "protobuf")])
def test_without_the_extra_the_error_has_the_line_to_type(module: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from device_agent.grpc_extra import load_grpc\nfrom aios_edge.errors import MissingExtra\n"
        "try: load_grpc()\nexcept MissingExtra as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"'{package}'" in done.stdout and "pip install 'aios-edge[grpc]'" in done.stdout
    assert issubclass(MissingExtra, Exception) and "grpc_bind" in done.stdout
