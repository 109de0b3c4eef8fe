"""From a verified choice to a bundle: manifest, contract, golden samples."""

from __future__ import annotations

from dataclasses import dataclass

from aios_edge import contract as c
from aios_edge.contract import CONTRACT_SCHEMA, Conditions, Contract, GoldenSpec, Observed, Promise
from aios_edge.manifest import (
    MANIFEST_SCHEMA,
    Manifest,
    Measured,
    Precision,
    Provenance,
    Purpose,
    Scalar,
    SessionSpec,
    Softmax,
    TensorSpec,
    TextInput,
)
from aios_edge.profile import DeviceProfile
from exporters.encode import TOKENIZER
from exporters.select import UNMEASURED

#: Batch sizes where the cost per item was not measured on the target: a GPU's usual sweet spot is above; a CPU gains
#: little from batches, and an int8 model alone answers exactly as it was evaluated.
UNMEASURED_BATCH, UNMEASURED_BATCH_CPU = 8, 1
_OUTPUT = "logits"
#: Manifest, contract, golden samples, model card and SBOM, beside model and tokenizer; the real sizes are checked when
#: the bundle is written.
DOCUMENTS_BYTES = 130_000


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What all bundles of one export share."""

    name: str
    version: str
    task: str
    labels: tuple[str, ...]
    inputs: tuple[str, ...]
    text: TextInput
    licence: str


def manifest_of(
    identity: Identity,
    *,
    profile: str,
    precision: Precision,
    session: SessionSpec,
    max_batch_size: int,
    provenance: Provenance,
    measured: Measured,
    temperature: float = 1.0,
    purpose: Purpose = "serve",
    provider_options: dict[str, dict[str, Scalar]] | None = None,
) -> Manifest:
    """The manifest, without its list of files."""
    return Manifest(
        schema=MANIFEST_SCHEMA,
        name=identity.name,
        version=identity.version,
        task=identity.task,
        profile=profile,
        precision=precision,
        labels=identity.labels,
        inputs=tuple(TensorSpec(name=name, datatype="INT64", shape=(-1, -1)) for name in identity.inputs),
        outputs=(TensorSpec(name=_OUTPUT, datatype="FP32", shape=(-1, len(identity.labels))),),
        preprocess=identity.text,
        postprocess=Softmax(output=_OUTPUT, temperature=temperature),
        session=session,
        max_batch_size=max_batch_size,
        provenance=provenance,
        licence=identity.licence,
        measured=measured,
        purpose=purpose,
        provider_options=provider_options or {},
    )


def draft(identity: Identity) -> Manifest:
    """A manifest good enough to encode text with, before anything is measured."""
    nothing = Measured(accuracy=0.0, accuracy_drop=0.0, agreement=0.0, size_bytes=1)
    origin = Provenance(source="", candidate="", recipe_sha256="", data="", finetune="")
    return manifest_of(
        identity,
        profile="",
        precision="fp32",
        session=SessionSpec(),
        max_batch_size=1,
        provenance=origin,
        measured=nothing,
    )


def text_input(*, max_length: int, pad_id: int, pair: bool) -> TextInput:
    """Pre-processing with the tokenizer where a bundle has it."""
    return TextInput(tokenizer=TOKENIZER, max_length=max_length, pad_id=pad_id, pair=pair)


def contract_of(
    profile: DeviceProfile,
    measured: Measured,
    golden: GoldenSpec,
    *,
    rows: int,
    host: str,
    observed: dict[str, Observed],
    split: str = "test",
) -> Contract:
    """What the bundle promises: accuracy and size as measured, latency and memory as the profile's budget.

    ``rows`` of ``split`` are what accuracy was measured on, on ``host``; ``observed`` is what was measured on the
    target.
    """
    budgets = profile.budgets
    test = Conditions(batch=1, samples=rows, method=f"{split} split, one sample at a time", host=host)
    promises = [
        _promise(c.ACCURACY, ">=", measured.accuracy, "share", "measured", "export-only", test),
        _promise(c.ACCURACY_DROP, "<=", measured.accuracy_drop, "share", "measured", "export-only", test),
        _promise(c.AGREEMENT, ">=", measured.agreement, "share", "measured", "export-only", test),
        _promise(c.SIZE, "<=", measured.size_bytes, "byte", "measured", "activation", Conditions()),
    ]
    if budgets.bundle_size_bytes is not None:
        size = budgets.bundle_size_bytes
        promises.append(_promise(c.BUNDLE_SIZE, "<=", size, "byte", "budget", "activation", Conditions()))
    provider = profile.providers[0].name if profile.providers else None
    if budgets.latency_p95_s is not None:
        when = Conditions(
            batch=budgets.latency_batch,
            length=budgets.latency_length,
            threads=profile.threads.intra_op,
            provider=provider,
        )
        promises.append(_promise(c.LATENCY_P95, "<=", budgets.latency_p95_s, "s", "budget", "activation", when))
    if budgets.memory_bytes is not None:
        when = Conditions(provider=provider, method="resident set of the worker with the model loaded")
        promises.append(_promise(c.MEMORY, "<=", budgets.memory_bytes, "byte", "budget", "activation", when))
    why = f"{UNMEASURED}: the exporting host is not of this profile's class"
    unmeasured = {name: why for name in (c.LATENCY_P95, c.MEMORY) if name not in observed}
    unmeasured["energy_j_per_inference"] = f"{UNMEASURED}: the exporter does not measure energy"
    return Contract(
        schema=CONTRACT_SCHEMA,
        profile=profile.name,
        promises=tuple(promises),
        golden=golden,
        unmeasured=unmeasured,
        measured=observed,
    )


def _promise(name: str, op: c.Op, value: float, unit: str, basis: str, check: str, conditions: Conditions) -> Promise:
    return Promise(
        name=name,
        op=op,
        value=float(value),
        unit=unit,
        basis=basis,  # type: ignore[arg-type]
        check=check,  # type: ignore[arg-type]
        conditions=conditions,
    )
