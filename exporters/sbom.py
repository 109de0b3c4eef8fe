"""``sbom.cdx.json``: what a bundle consists of and where it came from, as CycloneDX 1.6 (ECMA-424).

It lists what doesn't depend on the manifest: model, tokenizer and model card, each with its sha256. The manifest lists
all of these, contract, golden samples and the SBOM itself; were they here as well, each digest would need the other.
The same bundle gives the same bytes: no time, and a serial number made of the content.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from aios_edge.digest import canonical_json, sha256_bytes, sha256_file
from exporters.facts import Facts, share_interval

_SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
#: Licences that CycloneDX knows by this id. Any other is given as a name, which is always valid.
_SPDX = frozenset(
    {
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MPL-2.0",
        "LGPL-3.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later", "AGPL-3.0-only", "AGPL-3.0-or-later", "CC0-1.0",
        "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0",
    }
)  # fmt: skip
_PREFIX = "aios-edge:"  # of properties, so that no other tool's mean something else by the same name


def sbom(facts: Facts, files: Mapping[str, Path | bytes]) -> bytes:
    """The document; ``files`` are those of the bundle that don't depend on its manifest."""
    parts = [_file(name, files[name]) for name in sorted(files)]
    data = [_data(facts, index) for index in range(len(facts.splits))]
    source = _source(facts)
    document: dict[str, Any] = {
        "$schema": _SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [_tool(name, version) for name, version in _tools(facts).items()]},
            "component": _model(facts),
        },
        "components": [source, *data, *parts],
        "dependencies": [
            {"ref": "model", "dependsOn": [entry["bom-ref"] for entry in (source, *data, *parts)]},
            *({"ref": entry["bom-ref"]} for entry in (source, *data, *parts)),
        ],
    }
    content = sha256_bytes(canonical_json(document))
    serial = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{_PREFIX}{content}')}"
    return msgspec.json.format(msgspec.json.encode({**document, "serialNumber": serial}), indent=2) + b"\n"


def _model(facts: Facts) -> dict[str, Any]:
    m = facts.manifest
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": m.name,
        "version": m.version,
        "description": f"{m.task} for the device profile {m.profile}, {m.precision}",
        "licenses": _licences(m.licence),
        "pedigree": {"ancestors": [{"type": "machine-learning-model", "name": facts.source.name}]},
        "modelCard": _card(facts),
        "properties": _properties(
            profile=m.profile,
            precision=m.precision,
            candidate=m.provenance.candidate,
            recipe_sha256=m.provenance.recipe_sha256,
            manifest="manifest.json lists every file of the bundle with its sha256, this document included",
        ),
    }


def _card(facts: Facts) -> dict[str, Any]:
    m = facts.manifest
    limits = [f"not measured: {name} ({why})" for name, why in sorted(facts.contract.unmeasured.items())]
    family = str(facts.source.config.get("model_type") or "transformer")
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": m.task,
            "architectureFamily": family,
            "modelArchitecture": ", ".join(facts.source.config.get("architectures") or ()) or family,
            "datasets": [{"ref": f"data:{split.name}"} for split in facts.splits],
            "inputs": [{"format": "text pair" if m.preprocess.pair else "text"}],
            "outputs": [{"format": f"one of {len(m.labels)} labels, with scores"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": _figures(facts)},
        "considerations": {
            "useCases": [f"{m.task} of texts like those of the training data, up to {m.preprocess.max_length} tokens"],
            "technicalLimitations": [
                *limits,
                "not measured: fairness, robustness, other languages, texts of other origin; see MODEL_CARD.md",
            ],
        },
    }


def _figures(facts: Facts) -> list[dict[str, Any]]:
    found, drop, agreement = facts.metrics, facts.quality.drop, facts.quality.agreement
    assert drop is not None and agreement is not None
    accuracy, alike = share_interval(found.accuracy, found.rows), share_interval(agreement, found.rows)
    figures: tuple[tuple[str, float, tuple[float, float] | None], ...] = (
        ("accuracy", found.accuracy, accuracy),
        ("accuracy lost against fine-tuned fp32, paired", drop.value, (drop.low, drop.high)),
        ("agreement with fine-tuned fp32", agreement, alike),
        ("macro F1", found.f1, None),
        ("expected calibration error", facts.calibration.error_after, None),
    )
    entries = []
    for name, value, interval in figures:
        entry: dict[str, Any] = {"type": name, "value": f"{value:.6g}", "slice": f"test split, {found.rows} rows"}
        if interval is not None:
            low, high = interval
            entry["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
        entries.append(entry)
    return entries


def _source(facts: Facts) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": "source",
        "name": facts.source.name,
        "description": "the weights that were fine-tuned",
        "licenses": _licences(facts.manifest.licence),
        "properties": _properties(digest=facts.source.digest),
    }


def _data(facts: Facts, index: int) -> dict[str, Any]:
    split = facts.splits[index]
    contents = {"properties": _properties(rows=str(split.rows), digest=split.digest)}
    dataset = {"type": "dataset", "name": split.file, "description": f"{split.name} rows", "contents": contents}
    return {"type": "data", "bom-ref": f"data:{split.name}", "name": f"{split.name}: {split.file}", "data": [dataset]}


def _file(name: str, content: Path | bytes) -> dict[str, Any]:
    digest = sha256_bytes(content) if isinstance(content, bytes) else sha256_file(content)
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def _tools(facts: Facts) -> dict[str, str]:
    return dict(sorted(facts.manifest.provenance.tools.items()))


def _tool(name: str, version: str) -> dict[str, Any]:
    kind = "application" if name == "aios-edge" else "library"
    purl = f"pkg:pypi/{name}@{quote(version, safe='')}"
    return {"type": kind, "bom-ref": f"tool:{name}", "name": name, "version": version, "purl": purl}


def _licences(licence: str) -> list[dict[str, Any]]:
    return [{"license": {"id": licence} if licence in _SPDX else {"name": licence}}]


def _properties(**values: str) -> list[dict[str, str]]:
    return [{"name": f"{_PREFIX}{name}", "value": value} for name, value in values.items()]
