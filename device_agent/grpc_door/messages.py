"""The protocol's messages, built from ``open_inference.binpb``, the compiled form of the ``.proto`` beside it.

In a pool of their own: in the common one their names would clash with those of a program around the agent that has
KServe's or Triton's client loaded. A descriptor also suits every runtime of protobuf, where generated modules demand
one that is no older than their compiler.
"""

from __future__ import annotations

import importlib.resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"

#: A message or its class. They are made at run time, so there is nothing to check their fields against.
Message = Any

_pool = descriptor_pool.DescriptorPool()
_files = importlib.resources.files(__package__).joinpath("open_inference.binpb").read_bytes()
for _file in descriptor_pb2.FileDescriptorSet.FromString(_files).file:
    _pool.AddSerializedFile(_file.SerializeToString())


def _of(name: str) -> Message:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))


#: Of each method: what it takes, and what it gives.
METHODS: dict[str, tuple[Message, Message]] = {
    method.name: (
        message_factory.GetMessageClass(method.input_type),
        message_factory.GetMessageClass(method.output_type),
    )
    for method in _pool.FindServiceByName(SERVICE).methods
}
ModelInferRequest = _of("ModelInferRequest")
ModelInferResponse = _of("ModelInferResponse")
ModelStreamInferResponse = _of("ModelStreamInferResponse")
