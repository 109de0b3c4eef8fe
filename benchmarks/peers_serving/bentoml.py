# requires: bentoml==1.4.40 onnxruntime==1.32.0 numpy
# path: /infer
"""BentoML: a service with one worker, as its documentation shows one."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

SERVICE = """
import os
import bentoml
import numpy as np
import onnxruntime as ort


@bentoml.service(workers=1)
class Tiny:
    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["THREADS"])
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    @bentoml.api
    def infer(self, inputs: list[dict]) -> dict:
        tensor = inputs[0]
        rows = np.asarray(tensor["data"], dtype=np.int64).reshape(tensor["shape"])
        logits = self.session.run(None, {"input_ids": rows})[0]
        return {"outputs": [
            {"name": "logits", "datatype": "FP32", "shape": list(logits.shape), "data": logits.ravel().tolist()}]}
"""


def main(model: str, port: int, threads: int) -> None:
    """Write the service and become its server."""
    folder = Path(tempfile.mkdtemp())
    (folder / "service.py").write_text(SERVICE)
    os.environ |= {"MODEL": model, "THREADS": str(threads), "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(folder)}
    command = [sys.executable, "-m", "bentoml", "serve", "service:Tiny", "--port", str(port), "-q"]
    os.chdir(folder)
    os.execv(sys.executable, command)


main(str(Path(sys.argv[1]).absolute()), int(sys.argv[2]), int(sys.argv[3]))
