# requires: nncf==3.4.0 onnx==1.23.2 onnxruntime==1.32.0
"""NNCF's post-training quantization for transformers, as its documentation shows it for ONNX."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this file has the package's name
import nncf
import numpy as np
import onnx

source, calibration, out = (Path(argument) for argument in sys.argv[1:4])
packed = np.load(calibration)
samples: dict[str, dict[str, np.ndarray]] = {}
for key in packed.files:
    number, name = key.split("/")
    samples.setdefault(number, {})[name] = packed[key]
quantized = nncf.quantize(
    onnx.load(str(source)),
    nncf.Dataset(list(samples.values())),
    model_type=nncf.ModelType.TRANSFORMER,
    subset_size=len(samples),
)
onnx.save(quantized, str(out / "ptq.onnx"))
print("NNCF PTQ, transformer\tptq.onnx")
