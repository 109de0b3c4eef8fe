# requires: optimum==2.1.0 optimum-onnx==0.1.0 transformers==4.57.6 torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0
"""optimum's dynamic quantization for AVX512-VNNI, as its documentation shows it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this file has the package's name
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from transformers import BertConfig

source, _, out = (Path(argument) for argument in sys.argv[1:4])
quantizer = ORTQuantizer(source, config=BertConfig())
quantizer.quantize(
    save_dir=out, quantization_config=AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
)
print(f"optimum dynamic, avx512_vnni\t{source.stem}_quantized.onnx")
