"""The protocol's gRPC clients in one process, and calls by hand for what no client would send."""

from __future__ import annotations

from typing import Any
from unittest import mock

import grpc
import numpy as np
from google.protobuf import descriptor_pool

from aios_edge.oip.datatypes import DTYPES, Tensor
from aios_edge.oip.elements import from_binary, to_binary
from device_agent.grpc_door.contents import FIELDS
from device_agent.grpc_door.messages import METHODS, SERVICE, ModelInferRequest

LIMIT_S = 30.0


def _triton() -> tuple[Any, Any]:
    # KServe's and Triton's messages have the same names, and protobuf takes a name only once in a pool.
    pool = descriptor_pool.DescriptorPool()
    with mock.patch.object(descriptor_pool, "Default", lambda: pool):
        import tritonclient.grpc
        import tritonclient.grpc.aio
    return tritonclient.grpc, tritonclient.grpc.aio


triton, triton_aio = _triton()


def call(
    channel: Any,
    method: str,
    message: Any = None,
    *,
    data: bytes | None = None,
    metadata: tuple[tuple[str, str], ...] = (),
    timeout: float | None = LIMIT_S,
    **options: Any,
) -> Any:
    """One unary call with our own messages, or with ``data`` that are none; raises ``grpc.RpcError``."""
    takes, gives = METHODS.get(method, METHODS["ServerLive"])
    stub = channel.unary_unary(f"/{SERVICE}/{method}", response_deserializer=gives.FromString)
    sent = data if data is not None else (message or takes()).SerializeToString()
    return stub(sent, metadata=metadata, timeout=timeout, **options)


def infer(channel: Any, model: str, inputs: dict[str, Tensor], *, raw: bool) -> dict[str, Tensor]:
    """Ask with tensors, all raw or all typed, and be answered the same way; raises ``grpc.RpcError``."""
    asked = ModelInferRequest(model_name=model)
    for name, tensor in inputs.items():
        given = asked.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.array.shape)
        if raw:
            asked.raw_input_contents.append(to_binary(tensor))
        else:
            getattr(given.contents, FIELDS[tensor.datatype]).extend(tensor.array.ravel().tolist())
    asked.parameters["binary_data_output"].bool_param = raw
    answer = call(channel, "ModelInfer", asked)
    data = answer.raw_output_contents
    assert len(data) == (len(answer.outputs) if raw else 0)
    found = {}
    for index, output in enumerate(answer.outputs):
        shape = tuple(output.shape)
        if raw:
            array = from_binary(output.datatype, shape, memoryview(data[index]), output.name)
        else:
            elements = list(getattr(output.contents, FIELDS[output.datatype]))
            array = np.empty(len(elements), dtype=DTYPES[output.datatype])
            array[:] = elements
            array = array.reshape(shape)
        found[output.name] = Tensor(output.datatype, array)
    return found


def refused(channel: Any, method: str, message: Any = None, **options: Any) -> grpc.Call:
    """The error of a call that must fail: ``code()``, ``details()``, ``trailing_metadata()``."""
    try:
        answer = call(channel, method, message, **options)
    except grpc.RpcError as error:
        return error  # type: ignore[return-value]
    raise AssertionError(f"answered: {answer}")


def told(error: grpc.Call) -> dict[str, str]:
    """Its trailing metadata."""
    return dict(error.trailing_metadata() or ())
