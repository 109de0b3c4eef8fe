"""Requests that a fresh worker answers before any client's.

The activation's latency is that of the model alone. What a request really costs here, with decoding, tokenizing and
encoding, and how it grows with length and batch, is seen by sending some the way clients do. They warm the path up as
well.
"""

from __future__ import annotations

from aios_edge.manifest import Manifest
from device_agent.learning import Learning
from device_agent.made_up_request import made_up_request, text_tensors
from device_agent.raw_model import is_raw
from device_agent.surroundings import Surroundings
from device_agent.values import InferenceRequest
from device_agent.watched_run import run_watched
from device_agent.worker_pool import WorkerHandle

#: Words of each request, batch by batch: short, long, several; the first pays for the warm-up and isn't counted.
BATCHES: tuple[tuple[int, ...], ...] = ((8,), (8,), (24,), (16,), (8,), (24,), (12, 12))
LIMIT_S = 2.0  # emulated devices can be very slow


async def rehearse(worker: WorkerHandle, manifest: Manifest, learning: Learning, around: Surroundings) -> None:
    """Learn what requests cost here before the first client's arrives. :class:`WorkerLost` leaves what was learnt."""
    if is_raw(manifest):  # nobody knows what its clients send
        return
    began = around.clock()
    pair = manifest.preprocess.pair
    for number, words in enumerate(BATCHES):
        started = around.clock()
        if started - began > LIMIT_S and number > 1:
            break
        batch = rehearsal_batch(manifest.name, words[: manifest.max_batch_size], pair=pair, now=started)
        result = await run_watched(worker, batch, around.policy.batch_timeout_s)
        if number == 0:  # paid for the warm-up
            continue
        if number == 1:  # the activation measured the model alone: begin from what a request really takes
            learning.begin(result.done.busy_s, result.done.items[0].length)
        learning.learn(batch, result, around.clock() - started)


def rehearsal_batch(model: str, words: tuple[int, ...], *, pair: bool, now: float) -> list[InferenceRequest]:
    """One batch of requests with the text task's natural input."""
    names = ("text", "text_pair") if pair else ("text",)
    texts = [" ".join(["a", "good", "film", "with", "story"][index % 5] for index in range(count)) for count in words]
    return [
        made_up_request(model, text_tensors(names, text), number=-number, now=now, natural=True)
        for number, text in enumerate(texts, 1)
    ]
