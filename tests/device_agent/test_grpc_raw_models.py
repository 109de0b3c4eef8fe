"""Raw ONNX models at the gRPC door: every datatype, scalars and empty tensors, the same to the bit as over HTTP."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_clients import call, infer, triton
from raw_models import NUMBERS, echo, some, write

from aios_edge.oip.datatypes import DTYPES, Tensor, narrow_bf16, widen_bf16
from aios_edge.oip.elements import to_binary
from aios_edge.oip.tensors import decode_response, encode_request
from device_agent.grpc_door.contents import RAW_ONLY
from device_agent.grpc_door.messages import ModelInferRequest


@pytest.fixture(scope="module")
def agent(start_agent: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from onnx import helper

    root = tmp_path_factory.mktemp("repository")
    typed = [datatype for datatype in NUMBERS if datatype not in RAW_ONLY]
    for name, datatypes in (("numbers", NUMBERS), ("typed", typed), ("texts", ["BYTES"])):
        echo(root / name / "1", datatypes, ["a", "b"])
        echo(root / f"{name}_scalar" / "1", datatypes, [])
    value = helper.make_tensor("value", 1, [2], [1.0, 2.0])
    write(root / "constant" / "1", [helper.make_node("Constant", [], ["y"], value=value)], {}, {"y": ("FP32", [2])})
    agent = start_agent(f'[repository]\npath = "{root}"', http='grpc_bind = "127.0.0.1:0"')
    yield agent
    assert agent.stop() == 0


def over_http(agent: Any, model: str, inputs: dict[str, Tensor], *, binary: bool) -> dict[str, bytes]:
    body, length = encode_request(inputs, binary=binary)
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    asked = urllib.request.Request(f"{agent.url}/v2/models/{model}/infer", body, headers)
    with urllib.request.urlopen(asked, timeout=30) as response:
        found = response.headers.get("Inference-Header-Content-Length")
        answer = decode_response(response.read(), int(found) if found else None)
    return {name: to_binary(tensor) for name, tensor in answer.outputs.items()}


def over_grpc(agent: Any, model: str, inputs: dict[str, Tensor], *, raw: bool) -> dict[str, bytes]:
    with grpc.insecure_channel(agent.grpc) as channel:
        found = infer(channel, model, inputs, raw=raw)
    for name, tensor in found.items():
        assert tensor.array.shape == inputs[name.replace("out_", "in_")].array.shape
    return {name: to_binary(tensor) for name, tensor in found.items()}


@pytest.mark.parametrize("shape", [(3, 1), (0, 2), (2, 0), ()])
@pytest.mark.parametrize("name", ["numbers", "typed", "texts"])
def test_every_datatype_is_the_same_at_every_door(agent: Any, name: str, shape: tuple[int, ...]) -> None:
    datatypes = {"texts": ["BYTES"], "numbers": NUMBERS}.get(name, [d for d in NUMBERS if d not in RAW_ONLY])
    model = name if shape else f"{name}_scalar"
    sent = {f"in_{datatype}": some(datatype, shape) for datatype in datatypes}
    expected = {f"out_{datatype}": to_binary(sent[f"in_{datatype}"]) for datatype in datatypes}
    for binary in (True, False):
        assert over_http(agent, model, sent, binary=binary) == expected
    assert over_grpc(agent, model, sent, raw=True) == expected
    if name != "numbers":
        assert over_grpc(agent, model, sent, raw=False) == expected


def test_what_json_cannot_carry_goes_both_ways(agent: Any) -> None:
    for datatype in ("FP32", "FP64"):
        sent = {f"in_{d}": some(d, (3, 1)) for d in NUMBERS if d not in RAW_ONLY}
        odd = np.array([[np.nan], [np.inf], [-np.inf]], dtype=DTYPES[datatype])
        sent[f"in_{datatype}"] = Tensor(datatype, odd)
        for raw in (True, False):
            assert over_grpc(agent, "typed", sent, raw=raw)[f"out_{datatype}"] == odd.tobytes()


def test_a_model_without_inputs_answers(agent: Any) -> None:
    with grpc.insecure_channel(agent.grpc) as channel:
        asked = ModelInferRequest(model_name="constant")
        assert call(channel, "ModelInfer", asked).raw_output_contents[0] == np.array([1.0, 2.0], dtype="<f4").tobytes()
        asked.parameters["binary_data_output"].bool_param = False
        assert list(call(channel, "ModelInfer", asked).outputs[0].contents.fp32_contents) == [1.0, 2.0]


def test_an_answer_with_bf16_goes_raw_whoever_asks(agent: Any) -> None:
    asked = ModelInferRequest(model_name="numbers")
    sent = {f"in_{datatype}": some(datatype, (3, 1)) for datatype in NUMBERS}
    for name, tensor in sent.items():
        asked.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.array.shape)
        asked.raw_input_contents.append(to_binary(tensor))
    asked.parameters["binary_data_output"].bool_param = False
    with grpc.insecure_channel(agent.grpc) as channel:
        assert len(call(channel, "ModelInfer", asked).raw_output_contents) == len(NUMBERS)
        asked.outputs.add(name="out_INT8")
        assert list(call(channel, "ModelInfer", asked).outputs[0].contents.int_contents) == [-128, 127, 7]


def test_tritonclient_takes_raw_models_as_they_are(agent: Any) -> None:
    with triton.InferenceServerClient(agent.grpc) as client:
        metadata = client.get_model_metadata("numbers", as_json=True)
        assert {tensor["datatype"] for tensor in metadata["inputs"]} == set(NUMBERS)
        inputs, sent = [], {datatype: some(datatype, (3, 1)).array for datatype in NUMBERS}
        sent["BF16"] = widen_bf16(narrow_bf16(np.array([[1.5], [-2.0], [0.1]], dtype=np.float32)))  # its numpy form
        for datatype, array in sent.items():
            inputs.append(triton.InferInput(f"in_{datatype}", [3, 1], datatype))
            inputs[-1].set_data_from_numpy(narrowed(array) if datatype == "BF16" else array)
        answer = client.infer("numbers", inputs)
        for datatype, array in sent.items():
            found = answer.as_numpy(f"out_{datatype}")
            assert np.array_equal(found.astype(array.dtype), array), datatype
        given = triton.InferInput("in_BYTES", [3, 1], "BYTES")
        given.set_data_from_numpy(some("BYTES", (3, 1)).array)
        assert client.infer("texts", [given]).as_numpy("out_BYTES").tolist() == some("BYTES", (3, 1)).array.tolist()


def narrowed(array: Any) -> Any:
    """BF16 as numpy has it with the package that Triton's client asks for."""
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16)
