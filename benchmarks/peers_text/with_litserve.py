# requires: litserve==0.2.19 onnxruntime==1.32.0 numpy tokenizers==0.22.2
# path: /predict
# settings: default fast-queue batching
"""LitServe. ``default``: as it comes, one worker. ``fast-queue``: its ``fast_queue`` between server and worker, which
its documentation has for high load. ``batching``: that and its dynamic batches."""

from __future__ import annotations

import sys

import litserve
from text_classifier import TextClassifier

MODEL, PORT, THREADS, SETTING = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
BATCHING = SETTING == "batching"


class Api(litserve.LitAPI):
    """The request document is everybody's; with batching ``predict`` gets a list."""

    def setup(self, device):
        self.classify = TextClassifier(MODEL, THREADS)

    def decode_request(self, request):
        return request["inputs"][0]["data"][0]

    def batch(self, texts):
        return list(texts)

    def unbatch(self, found):
        return found

    def predict(self, texts):
        return self.classify(texts) if BATCHING else self.classify([texts])[0]

    def encode_response(self, found):
        label, score = found
        return {"outputs": [{"name": "label", "datatype": "BYTES", "shape": [1], "data": [label]},
                            {"name": "score", "datatype": "FP32", "shape": [1], "data": [score]}]}  # fmt: skip


if __name__ == "__main__":
    api = Api(max_batch_size=8, batch_timeout=0.002) if BATCHING else Api()
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=SETTING != "default")
    server.run(port=PORT, log_level="warning", generate_client_file=False)
