# requires: ray[serve]==2.60.0 onnxruntime==1.32.0 tokenizers==0.22.2
# path: /
# settings: default batching
"""Ray Serve, one replica. ``default``: as its documentation shows it. ``batching``: ``serve.batch``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import ray
from ray import serve
from starlette.requests import Request

MODEL, PORT, THREADS, SETTING = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class Text:
    """The model behind the same request document as everybody's."""

    def __init__(self) -> None:
        from text_classifier import TextClassifier

        self.classify = TextClassifier(MODEL, THREADS)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.002)
    async def together(self, texts: list[str]) -> list[tuple[str, float]]:
        return self.classify(texts)

    async def __call__(self, request: Request) -> dict:
        text = (await request.json())["inputs"][0]["data"][0]
        label, score = await self.together(text) if SETTING == "batching" else self.classify([text])[0]
        return {"outputs": [{"name": "label", "datatype": "BYTES", "shape": [1], "data": [label]},
                            {"name": "score", "datatype": "FP32", "shape": [1], "data": [score]}]}  # fmt: skip


os.environ["PYTHONPATH"] = str(Path(__file__).absolute().parent)  # of the replica's process
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(Text.bind(), route_prefix="/")
signal.sigwait({signal.SIGTERM, signal.SIGINT})
ray.shutdown()
