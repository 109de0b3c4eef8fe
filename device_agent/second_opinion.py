"""An unsure answer of this device is kept while the cloud is asked the same; the better of both is given, in time."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from device_agent.answer import Answer, Unanswered
from device_agent.cloud import CloudPool
from device_agent.router import KEPT_ANSWER_S
from device_agent.values import Cloud, InferenceRequest, Reason


async def second_opinion(
    local: Answer,
    decision: Cloud,
    request: InferenceRequest,
    cloud: CloudPool,
    now: float,
    tried: tuple[str, ...] = (),
) -> Answer:
    """The cloud's answer where it comes in time to be given, else the one that was kept, which says so. ``tried``:
    endpoints that failed the request before it was answered here."""
    theirs: object = None
    if request.deadline_at is None:
        theirs = await cloud.infer(decision, request, request.model, tried=tried)
    else:
        hurried = msgspec.structs.replace(request, deadline_at=request.deadline_at - KEPT_ANSWER_S)
        # The cloud keeps that deadline by itself, and learns from it; this is for the case that it doesn't.
        with contextlib.suppress(asyncio.TimeoutError):
            theirs = await asyncio.wait_for(
                cloud.infer(decision, hurried, request.model, tried=tried),
                request.deadline_at - KEPT_ANSWER_S / 2 - now,
            )
    if isinstance(theirs, Answer) and theirs.status == 200:
        return msgspec.structs.replace(  # it ran here all the same, and is counted
            theirs,
            queue_s=local.queue_s,
            compute_s=local.compute_s,
            batch_size=local.batch_size,
            energy=local.energy,
        )
    why = theirs.reason if isinstance(theirs, Unanswered) else Reason.CLOUD_FAILED
    return msgspec.structs.replace(local, reason=why)
