# requires: onnxruntime==1.32.0 onnx==1.23.2 torch==2.13.0
"""onnxruntime's own dynamic quantization: as its documentation shows it, and with its transformer optimizer first."""

from __future__ import annotations

import sys
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model

source, _, out = (Path(argument) for argument in sys.argv[1:4])
quantize_dynamic(str(source), str(out / "default.onnx"))
print("ORT dynamic, defaults\tdefault.onnx")
optimize_model(str(source), model_type="bert", num_heads=12, hidden_size=384).save_model_to_file(
    str(out / "fused.onnx")
)
quantize_dynamic(
    str(out / "fused.onnx"),
    str(out / "fused-s8.onnx"),
    per_channel=True,
    weight_type=QuantType.QInt8,
    extra_options={"DefaultTensorType": 1},
)
print("ORT dynamic, transformer optimizer, per channel\tfused-s8.onnx")
