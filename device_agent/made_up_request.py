"""A request that no client sent: to learn what requests cost, or to see whether they are answered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from device_agent.values import InferenceRequest


def text_tensors(names: Iterable[str], text: str) -> list[dict[str, Any]]:
    """A text, as each of a task's natural inputs."""
    return [{"name": name, "datatype": "BYTES", "shape": [1], "data": [text]} for name in names]


def made_up_request(
    model: str, tensors: Sequence[dict[str, Any]], *, number: int, now: float, natural: bool
) -> InferenceRequest:
    """Of these input tensors, in JSON. ``number``: not above 0, clients' are positive."""
    return InferenceRequest(
        request_id=number,
        model=model,
        body=msgspec.json.encode({"inputs": tensors}),
        json_length=None,
        client_id=None,
        priority=0,
        deadline_at=None,
        local_only=True,
        arrived_at=now,
        cost_hint_bytes=sum(len(msgspec.json.encode(tensor["data"])) for tensor in tensors),
        natural=natural,
    )
