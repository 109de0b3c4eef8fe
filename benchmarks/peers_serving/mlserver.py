# requires: mlserver==1.7.1 onnxruntime==1.32.0 uvloop==0.21.0
# path: /v2/models/tiny/infer
"""MLServer with a custom runtime around onnxruntime, as its documentation shows one, and its default one worker."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

RUNTIME = """
import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class OnnxModel(MLModel):
    async def load(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.settings.parameters.extra["threads"]
        self._session = ort.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        rows = NumpyCodec.decode_input(payload.inputs[0])
        logits = self._session.run(None, {"input_ids": rows})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])
"""


def main(model: str, port: int, threads: int) -> None:
    """Write MLServer's three files and become it."""
    folder = Path(tempfile.mkdtemp())
    (folder / "onnx_model.py").write_text(RUNTIME)
    (folder / "settings.json").write_text(
        json.dumps({"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2, "debug": False})
    )
    (folder / "model-settings.json").write_text(
        json.dumps(
            {
                "name": "tiny",
                "implementation": "onnx_model.OnnxModel",
                "parameters": {"uri": model, "extra": {"threads": threads}},
            }
        )
    )
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    os.execv(sys.executable, [sys.executable, "-m", "mlserver.cli.main", "start", str(folder)])


main(str(Path(sys.argv[1]).absolute()), int(sys.argv[2]), int(sys.argv[3]))
