# requires: litserve==0.2.19 onnxruntime==1.32.0 numpy
# path: /predict
"""LitServe as its documentation shows it, with batching; one worker."""

from __future__ import annotations

import sys

sys.path.pop(0)  # this file has the package's name
import litserve
import numpy as np
import onnxruntime as ort

MODEL, PORT, THREADS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


class Api(litserve.LitAPI):
    """The model behind the same request document as everybody's."""

    def setup(self, device):
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = ort.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        tensor = request["inputs"][0]
        return np.asarray(tensor["data"], dtype=np.int64).reshape(tensor["shape"])

    def predict(self, rows):
        return self.session.run(None, {"input_ids": rows})[0]

    def encode_response(self, output):
        return {"outputs": [{"name": "logits", "datatype": "FP32", "shape": output.shape, "data": output.ravel().tolist()}]}  # fmt: skip  # noqa: E501


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=1)
    server.run(port=PORT, log_level="warning", generate_client_file=False)
