"""A raw ONNX model that answers what it is asked, so that every answer tells whose it is."""

from __future__ import annotations

from pathlib import Path


def write_identity(folder: Path) -> None:
    """``folder/model.onnx``: y = x, INT64 of one free dimension."""
    import onnx
    from onnx import TensorProto, helper

    folder.mkdir(parents=True)
    x, y = (helper.make_tensor_value_info(name, TensorProto.INT64, ["n"]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, folder / "model.onnx")
