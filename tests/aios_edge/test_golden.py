"""golden.npz: the same bytes for the same samples, readable by numpy and by a reader without it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from aios_edge.golden import encode_golden, read_golden, read_seal


def test_golden_bytes_are_the_same_whenever_they_are_written(
    tiny_parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    golden = tiny_parts["golden"]
    first = encode_golden(golden)
    real = time.localtime
    monkeypatch.setattr(time, "localtime", lambda *_: real(86400.0 * 365 * 40))
    reordered = dataclasses.replace(golden, inputs=dict(reversed(golden.inputs.items())))
    assert encode_golden(reordered) == first


def test_the_seal_is_what_numpy_reads(tiny_bundle: Any) -> None:
    path = tiny_bundle.file("golden.npz")
    seal, golden = read_seal(path), read_golden(path)
    sealed = (golden.contract_sha256, golden.manifest_sha256, len(golden.raw))
    assert (seal.contract_sha256, seal.manifest_sha256, seal.count) == sealed
