# requires: neural-compressor[pt]==3.10 torch==2.13.0 transformers==4.57.6 onnx==1.23.2 onnxscript onnxruntime==1.32.0
"""neural-compressor's static int8 (PT2E) at its defaults, as its documentation shows it, exported to ONNX by torch.

It has no way to ONNX of its own. What torch exports keeps fp32 weights behind QuantizeLinear; onnxruntime's own basic
optimisations fold them to 8 bits.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path.pop(0)  # this file has the package's name
import numpy as np
import onnxruntime
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import convert, get_default_static_config, prepare
from transformers import AutoModelForSequenceClassification

_, calibration, out, tuned = (Path(argument) for argument in sys.argv[1:5])
packed = np.load(calibration)
samples: dict[str, dict[str, torch.Tensor]] = {}
for key in packed.files:
    number, name = key.split("/")
    samples.setdefault(number, {})[name] = torch.from_numpy(packed[key].astype(np.int64))
names = list(next(iter(samples.values())))


class Logits(torch.nn.Module):
    """Tensors in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(tuned, attn_implementation="eager")

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(names, tensors, strict=True))).logits


with redirect_stdout(sys.stderr), torch.no_grad():
    ids = torch.arange(1000, 1032).reshape(2, 16)
    filled = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    example = tuple(filled[name] for name in names)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    exported = export(Logits(), example_inputs=example, dynamic_shapes=(tuple(free for _ in names),))
    prepared = prepare(exported, quant_config=get_default_static_config())
    for sample in samples.values():
        prepared(*(sample[name] for name in names))
    quantized = convert(prepared)
    torch.onnx.export(
        quantized,
        example,
        str(out / "fp32-weights.onnx"),
        dynamo=True,
        opset_version=18,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=tuple(free for _ in names),
        external_data=False,
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out / "static.onnx")
    onnxruntime.InferenceSession(str(out / "fp32-weights.onnx"), options, providers=["CPUExecutionProvider"])
    (out / "fp32-weights.onnx").unlink()
print("neural-compressor static int8 (PT2E)\tstatic.onnx")
