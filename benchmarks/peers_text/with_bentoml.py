# requires: bentoml==1.4.40 onnxruntime==1.32.0 numpy tokenizers==0.22.2
# path: /infer
# settings: default batching
"""BentoML, one worker. ``default``: as it comes. ``batching``: its adaptive batches."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

SERVICE = """
import os
import bentoml
from text_classifier import TextClassifier

how = dict(batchable=True, max_batch_size=8, max_latency_ms=1000) if os.environ["SETTING"] == "batching" else {}


@bentoml.service(workers=1)
class Text:
    def __init__(self) -> None:
        self.classify = TextClassifier(os.environ["MODEL"], int(os.environ["THREADS"]))

    @bentoml.api(**how)
    def infer(self, inputs: list[dict]) -> list[dict]:
        return [{"outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": [label]},
            {"name": "score", "datatype": "FP32", "shape": [1], "data": [score]}]}
            for label, score in self.classify([each["data"][0] for each in inputs])]
"""


def main(model: str, port: int, threads: int, setting: str) -> None:
    """Write the service and become its server."""
    folder = Path(tempfile.mkdtemp())
    (folder / "service.py").write_text(SERVICE)
    os.environ |= {"MODEL": model, "THREADS": str(threads), "SETTING": setting}
    os.environ |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(folder)}
    os.environ["PYTHONPATH"] = str(Path(__file__).absolute().parent)
    command = [sys.executable, "-m", "bentoml", "serve", "service:Text", "--port", str(port), "-q"]
    os.chdir(folder)
    os.execv(sys.executable, command)


main(str(Path(sys.argv[1]).absolute()), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
