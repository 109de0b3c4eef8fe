"""A batch with a watchdog: whatever goes wrong with it ends the worker, and the caller hears :class:`WorkerLost`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aios_edge.errors import WorkerLost
from device_agent.values import InferenceRequest
from device_agent.worker_pool import BatchResult, WorkerHandle

OVERRUN = 20.0  # so many times its prediction is no slow batch any more


async def run_watched(
    worker: WorkerHandle, requests: Sequence[InferenceRequest], timeout_s: float, predicted_s: float = 0.0
) -> BatchResult:
    """Run a batch; a worker that takes longer than ``timeout_s``, or answers nonsense, is killed. Where a batch was
    predicted to take long (a slow device, a huge request), it may take ``OVERRUN`` times that.

    A worker in a thread can't be killed: it loses its connection, and its thread is left to its endless loop.
    """
    overrun = False
    within_s = max(timeout_s, OVERRUN * predicted_s)

    def give_up() -> None:
        nonlocal overrun
        overrun = True
        worker.kill()

    watchdog = asyncio.get_running_loop().call_later(within_s, give_up)
    where = f"worker of {requests[0].model}"
    try:
        result = await worker.run(requests)
        for item in result.done.items:
            item.outputs.of(result.payload), item.binary.of(result.payload)
        return result
    except WorkerLost as lost:
        worker.kill()  # lost to us: it must not take another batch, even if it still lives
        if overrun:
            raise WorkerLost(f"did not end a batch within {within_s:.3g} s and was killed", where=where) from lost
        raise
    except Exception as error:  # nonsense from the worker, no descriptors or memory left here
        worker.kill()
        raise WorkerLost(f"failed a batch ({type(error).__name__}: {error}) and was killed", where=where) from error
    finally:
        watchdog.cancel()
