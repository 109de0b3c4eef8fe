from __future__ import annotations

from typing import Any

from aios_edge.bundle.read import open_bundle


def test_the_tiny_bundle_opens(tiny_bundle: Any) -> None:
    bundle = open_bundle(tiny_bundle.path)
    assert bundle == tiny_bundle
    assert bundle.file("model.onnx").is_file()
