# requires: ray[serve]==2.60.0 onnxruntime==1.32.0
# path: /
"""Ray Serve: one replica, as its documentation shows it."""

from __future__ import annotations

import signal
import sys

import numpy as np
import onnxruntime as ort
import ray
from ray import serve
from starlette.requests import Request

MODEL, PORT, THREADS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class Tiny:
    """The model behind the same request document as everybody's."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = ort.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])

    async def __call__(self, request: Request) -> dict:
        tensor = (await request.json())["inputs"][0]
        rows = np.asarray(tensor["data"], dtype=np.int64).reshape(tensor["shape"])
        logits = self.session.run(None, {"input_ids": rows})[0]
        return {"outputs": [{"name": "logits", "datatype": "FP32", "shape": logits.shape, "data": logits.ravel().tolist()}]}  # fmt: skip  # noqa: E501


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(Tiny.bind(), route_prefix="/")
signal.sigwait({signal.SIGTERM, signal.SIGINT})
ray.shutdown()
