# requires: mlserver==1.7.1 onnxruntime==1.32.0 uvloop==0.21.0 tokenizers==0.22.2
# path: /v2/models/text/infer
# settings: default in-process batching
"""MLServer with a custom runtime. ``default``: as it comes, the model in its one worker process. ``in-process``:
``parallel_workers`` 0, which its documentation has for models that need no process of their own. ``batching``: that and
adaptive batching."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

RUNTIME = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceResponse
from text_classifier import TextClassifier


class TextModel(MLModel):
    async def load(self):
        self._classify = TextClassifier(self.settings.parameters.uri, self.settings.parameters.extra["threads"])
        return True

    async def predict(self, payload):
        found = self._classify(StringCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[
            StringCodec.encode_output("label", [label for label, _ in found]),
            NumpyCodec.encode_output("score", np.array([[score] for _, score in found]))])
"""


def main(bundle: str, port: int, threads: int, setting: str) -> None:
    """Write MLServer's three files and become it."""
    folder = Path(tempfile.mkdtemp())
    (folder / "text_model.py").write_text(RUNTIME)
    server = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2, "debug": False}
    model = {
        "name": "text",
        "implementation": "text_model.TextModel",
        "parameters": {"uri": bundle, "extra": {"threads": threads}},
    }
    if setting != "default":
        server["parallel_workers"] = 0
    if setting == "batching":
        model |= {"max_batch_size": 8, "max_batch_time": 0.002}
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    os.environ["PYTHONPATH"] = f"{folder}:{Path(__file__).absolute().parent}"
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, "-m", "mlserver.cli.main", "start", str(folder)])


main(str(Path(sys.argv[1]).absolute()), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
