"""What a client is told about a model: Open Inference Protocol metadata from a manifest. No numpy, no tokenizer."""

from __future__ import annotations

from aios_edge.manifest import Manifest, TensorSpec
from aios_edge.oip.envelope import PLATFORM, ModelMetadata, TensorMetadata
from device_agent.raw_model import is_raw

Tensors = tuple[TensorMetadata, ...]


def model_metadata(manifest: Manifest) -> ModelMetadata:
    """The document behind ``GET /v2/models/{m}``."""
    natural_inputs, natural_outputs = natural_tensors(manifest)
    return ModelMetadata(
        name=manifest.name,
        versions=(manifest.version,),
        platform=PLATFORM,
        inputs=_tensors(manifest.inputs),
        outputs=_tensors(manifest.outputs),
        labels=manifest.labels,
        natural_inputs=natural_inputs,
        natural_outputs=natural_outputs,
    )


def natural_tensors(manifest: Manifest) -> tuple[Tensors, Tensors]:
    """The tensors of the task's natural input and output, as :mod:`aios_edge.tasks` answers them in the worker.
    A raw model has none."""
    if is_raw(manifest):
        return (), ()
    names = ("text", "text_pair") if manifest.preprocess.pair else ("text",)
    return tuple(TensorMetadata(name=name, datatype="BYTES", shape=(-1,)) for name in names), (
        TensorMetadata(name="label", datatype="BYTES", shape=(-1,)),
        TensorMetadata(name="score", datatype="FP32", shape=(-1,)),
        TensorMetadata(name="probabilities", datatype="FP32", shape=(-1, len(manifest.labels))),
    )


def _tensors(specs: tuple[TensorSpec, ...]) -> Tensors:
    return tuple(TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs)
