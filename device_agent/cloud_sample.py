"""A request of our own making, asked of an endpoint before a client's is sent there again.

A server whose metadata can be had may still answer nothing, or nonsense, or late; without this each check of an open
breaker would cost some client its answer to find that out.
"""

from __future__ import annotations

import math

from device_agent.cloud_fit import ModelShape
from device_agent.made_up_request import made_up_request, text_tensors
from device_agent.values import InferenceRequest

MAX_ELEMENTS = 65_536  # of all tensors: more is too much to send for a look
_ONES: dict[str, object] = {"BOOL": True, "BYTES": "a"}
_NOT_IN_JSON = ("FP16", "BF16")
_TEXT = "a good film with story"


def sample_request(ours: ModelShape, now: float, *, natural: bool) -> InferenceRequest | None:
    """Of one row: a text where the endpoint takes the task's ``natural`` input, else ones, which are also a mask that
    masks nothing. None where it would be very large, or can't be put in JSON."""
    if natural and ours.natural_inputs:
        tensors = text_tensors(ours.natural_inputs, _TEXT)
    else:
        shapes = [[max(size, 1) for size in spec.shape] for spec in ours.inputs]
        counts = [math.prod(shape) for shape in shapes]
        if sum(counts) > MAX_ELEMENTS or any(spec.datatype in _NOT_IN_JSON for spec in ours.inputs):
            return None
        tensors = [
            {
                "name": spec.name,
                "datatype": spec.datatype,
                "shape": shape,
                "data": [_ONES.get(spec.datatype, 1)] * count,
            }
            for spec, shape, count in zip(ours.inputs, shapes, counts, strict=True)
        ]
    return made_up_request(ours.name, tensors, number=0, now=now, natural=natural)
