"""The manifest of a bundle: what is in it, how to run it, and where it came from.

Files are JSON; an unknown field of a newer *minor* schema is ignored when read, an unknown *major* is refused.
The bundle's id is the sha256 of the canonical form of the document as it lies on disk (:func:`bundle_id`).
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

MANIFEST_SCHEMA = "1.1"  # 1.1: provider_options, purpose, and threads and spinning of the session

Scalar = str | int | float | bool
#: ``serve``: made to go live. ``measure``: a candidate to be timed on its target; its accuracy was seen on validation
#: rows only, and an agent doesn't serve it.
Purpose = Literal["serve", "measure"]
#: Precisions name the candidates of the exporter: see ``exporters/plans.py``.
Precision = Literal["fp32", "fp16", "dynamic-s8", "static-s8", "qdq-u8s8", "qdq-s8-sym"]
#: Variants that a profile may prefer by name; their bundles have the precision they are a variant of.
VARIANTS: dict[str, Precision] = {
    "dynamic-s8-e4": "dynamic-s8",
    "dynamic-s8-e2": "dynamic-s8",
    "qdq-u8s8-mixed": "qdq-u8s8",
    "tuned-s8": "static-s8",
}
#: All that a profile may prefer and a recipe ask for.
CANDIDATES: tuple[str, ...] = (*get_args(Precision), *VARIANTS)


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the bundle: POSIX path relative to the bundle, sha256 in hex, size."""

    path: str
    sha256: str
    size_bytes: int


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Name, Open Inference Protocol datatype (``INT64``, ``FP32`` …) and shape; -1 is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class SessionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The ONNX Runtime session options the bundle was measured with; the agent uses exactly these.

    Threads and spinning are None where nothing was measured on the target: then the device profile's count. Who
    decides, and when an agent refuses: :mod:`aios_edge.session`.
    """

    graph_optimization_level: Literal["disable", "basic", "extended", "all"] = "all"
    disabled_optimizers: tuple[str, ...] = ()
    config_entries: dict[str, str] = {}
    intra_op_threads: int | None = None
    inter_op_threads: int | None = None
    spinning: bool | None = None


class TextInput(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="text"):
    """Pre-processing of text: ``tokenizer`` is the path of a tokenizer.json in the bundle."""

    tokenizer: str
    max_length: int
    pad_id: int
    pair: bool = False  # the model takes two texts


class Softmax(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="softmax"):
    """Post-processing of single-label classification: softmax(``output`` / temperature) over the labels."""

    output: str = "logits"
    temperature: float = 1.0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What the exporter measured on the test split, kept beside the contract so that neither can be altered alone."""

    accuracy: float
    accuracy_drop: float
    agreement: float
    size_bytes: int


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model came from: enough to ask for it again, nothing of the machine it was made on."""

    source: str
    candidate: str
    recipe_sha256: str
    data: str
    finetune: str
    tools: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """manifest.json. ``files`` lists every other file of the bundle.

    ``provider_options``: execution provider -> what this model needs of it, laid over the profile's options
    (:mod:`aios_edge.provider_options`).
    """

    schema: str
    name: str
    version: str  # SemVer
    task: str  # Hugging Face task name
    profile: str
    precision: Precision
    labels: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: TextInput
    postprocess: Softmax
    session: SessionSpec
    max_batch_size: int
    provenance: Provenance
    licence: str
    measured: Measured
    model: str = "model.onnx"
    purpose: Purpose = "serve"
    provider_options: dict[str, dict[str, Scalar]] = {}
    files: tuple[FileEntry, ...] = ()
