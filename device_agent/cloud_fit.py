"""Whether a remote model fits ours: pure. Checked when the endpoint connects, not at the first overload."""

from __future__ import annotations

from typing import Any

import msgspec

from aios_edge.manifest import Manifest, TensorSpec
from device_agent.metadata import natural_tensors


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a client of ours relies on: tensor names and datatypes, and the order of labels."""

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    natural_inputs: tuple[str, ...]

    @staticmethod
    def of(manifest: Manifest) -> ModelShape:
        """The shape of a bundle's model."""
        return ModelShape(
            name=manifest.name,
            version=manifest.version,
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            labels=manifest.labels,
            natural_inputs=tuple(tensor.name for tensor in natural_tensors(manifest)[0]),
        )


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    datatype: str


class _Metadata(msgspec.Struct, frozen=True):
    versions: Any = None  # a list of texts, which some servers leave out or null
    inputs: tuple[_Tensor, ...] = ()
    outputs: tuple[_Tensor, ...] = ()
    labels: tuple[str, ...] = ()
    natural_inputs: tuple[_Tensor, ...] = ()


_NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # what decoding a stranger's bytes raises


def misfit(ours: ModelShape, metadata: bytes) -> str | None:
    """Why the remote model can't stand in for ours; None when it can. ``metadata`` is its JSON document.

    It may take and give more tensors than ours. A server that doesn't tell its labels is believed.
    """
    try:
        theirs = msgspec.json.decode(metadata, type=_Metadata)
    except _NOT_JSON as error:
        return f"its metadata is not a model's ({error})"
    for side, wanted, offered in (("input", ours.inputs, theirs.inputs), ("output", ours.outputs, theirs.outputs)):
        known = {tensor.name: tensor.datatype for tensor in offered}
        for tensor in wanted:
            if tensor.name not in known:
                return f"it has no {side} {tensor.name!r}"
            if known[tensor.name] != tensor.datatype:
                return f"its {side} {tensor.name!r} is {known[tensor.name]}, ours {tensor.datatype}"
    if theirs.labels and theirs.labels != ours.labels:
        return f"its labels are {', '.join(theirs.labels)}; ours {', '.join(ours.labels)}"
    return None


def versions_of(metadata: bytes) -> tuple[str, ...]:
    """The versions that the metadata speaks of; none where it tells none."""
    try:
        told = msgspec.json.decode(metadata, type=_Metadata).versions
    except _NOT_JSON:
        return ()
    return tuple(version for version in told if isinstance(version, str)) if isinstance(told, list) else ()


def takes_natural(ours: ModelShape, metadata: bytes) -> bool:
    """Whether the remote model takes our task's natural input, so that requests with it may go there."""
    try:
        theirs = msgspec.json.decode(metadata, type=_Metadata)
    except _NOT_JSON:
        return False
    known = {tensor.name for tensor in (*theirs.inputs, *theirs.natural_inputs)}
    return known.issuperset(ours.natural_inputs)
