# requires: olive-ai==0.13.0 requests onnx==1.23.2 onnxruntime==1.32.0 torch==2.13.0 transformers==4.57.6
"""Olive's workflow for BERT on a CPU: its transformer optimizer, then dynamic or static quantization by default."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from shutil import rmtree
from typing import Any

sys.path.pop(0)  # this file has the package's name
os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
import numpy as np
import olive
from olive.data.registry import Registry

source, calibration, out = (Path(argument) for argument in sys.argv[1:4])


@Registry.register_dataset()
def training_rows(**_: Any) -> list[tuple[dict[str, np.ndarray], int]]:
    """The calibration samples; Olive wants a label beside each and puts the batch's dimension back."""
    packed = np.load(calibration)
    samples: dict[str, dict[str, np.ndarray]] = {}
    for key in packed.files:
        number, name = key.split("/")
        samples.setdefault(number, {})[name] = packed[key][0]
    return [(sample, 0) for sample in samples.values()]


FUSION = {"type": "OrtTransformersOptimization", "model_type": "bert"}
QUANTIZATION = {
    "dynamic": {"type": "OnnxDynamicQuantization"},
    "static": {"type": "OnnxStaticQuantization", "data_config": "training_rows"},
}
for kind, quantization in QUANTIZATION.items():
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": str(source)},
        "data_configs": [{"name": "training_rows", "load_dataset_config": {"type": "training_rows"}}],
        "passes": {"fusion": FUSION, "quantization": quantization},
        "output_dir": str(out / kind),
        "cache_dir": str(out / "cache"),
    }
    with redirect_stdout(sys.stderr):
        olive.run(workflow)
    model = next((out / kind).rglob("*.onnx"))
    print(f"Olive {kind}, transformer optimizer\t{model.relative_to(out)}")
rmtree(out / "cache")
