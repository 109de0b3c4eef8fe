"""The supervisor's handle on one worker: start it, give it batches, notice its death at once, stop it.

Nothing here imports numpy or onnxruntime. How a worker is spawned and its death noticed: worker_connection.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

import msgspec

from aios_edge.errors import AiosEdgeError, BundleRefused, RuntimeUnavailable, SettingsError, WorkerLost
from device_agent import wire
from device_agent.values import ActivationReport, InferenceRequest
from device_agent.worker_connection import Connection, Reply, WorkerSpec

log = logging.getLogger("device_agent.worker")


class BatchResult(msgspec.Struct, frozen=True, kw_only=True):
    """An answered batch: the worker's account of it, and the payload that its items' regions point into."""

    done: wire.Done
    payload: memoryview


class WorkerHandle:
    """One worker at a time for one bundle; each start is a new generation.

    ``on_lost`` is called with the exit's description when a worker that was ready ends in any way but :meth:`stop`,
    busy or idle; the handle can be started again from then on. All methods belong to one event loop.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        on_stage: Callable[[str], None] = lambda stage: None,
        on_lost: Callable[[str], None] = lambda description: None,
    ) -> None:
        self.spec = spec
        self.generation = 0
        self.rss_bytes: int | None = None  # at about the latest batch; None before the first, and in a thread
        self.tells_classes = False  # whether batches come back with each row's class
        self.ready_at = 0.0  # in the loop's time
        self.report: ActivationReport | None = None  # of the latest activation, refused ones included
        self._digest = spec.bundle_id  # of the model that went live: clients know that one's tensors
        self._on_stage = on_stage
        self._on_lost = on_lost
        self._connection: Connection | None = None
        self._ready = False
        self._batch_id = 0

    @property
    def pid(self) -> int | None:
        """The worker's process id; None when there is none, or when it is a thread."""
        process = self._connection.process if self._connection else None
        return process.pid if process else None

    @property
    def ready(self) -> bool:
        """Whether a batch can be run now or after the one in flight."""
        return self._ready

    @property
    def takes(self) -> bool:
        """Whether it is worth giving it one: it isn't dead already, of which ``on_lost`` tells a moment later."""
        connection = self._connection
        return self._ready and connection is not None and not connection.ended

    async def start(self, check: str = "full", *, timeout_s: float = 600.0) -> ActivationReport:
        """Start a worker and return what its activation found.

        ``check`` is ``full``, ``quick`` after a crash, or ``engine`` to build one. Raises :class:`BundleRefused` named
        after the check that failed (``timeout`` when it never ended; building a TensorRT engine takes minutes),
        :class:`WorkerLost` when the worker died meanwhile, :class:`RuntimeUnavailable` or :class:`SettingsError`.
        """
        if self._connection is not None:
            raise AiosEdgeError("already started", where=f"worker of {self.spec.model}", remedy="Stop it first")
        self.generation += 1
        connection = Connection(self.spec, self.generation, self._on_stage)
        self._connection = connection
        load = wire.Load(
            bundle_path=str(self.spec.bundle_path.absolute()),
            profile=self.spec.profile,
            generation=self.generation,
            raw=None
            if self.spec.raw_version is None
            else wire.RawModel(self.spec.model, self.spec.raw_version, self._digest),
            check=check,
            slowdown=self.spec.slowdown,
            state_dir=str(self.spec.state_dir.absolute()) if self.spec.state_dir else None,
            bundle_id=self.spec.bundle_id,
            engines=self.spec.engines,
            cpus=self.spec.cpus,
        )
        try:
            reply, _ = await asyncio.wait_for(connection.ask(load), timeout_s)
            if isinstance(reply, wire.Refused):
                self.report = reply.report
                raise _refusal(reply, self.spec)
            if not isinstance(reply, wire.Ready):
                raise WorkerLost("answered a load with something else", where=f"worker of {self.spec.model}")
        except asyncio.TimeoutError:
            await self._discard()
            raise BundleRefused(
                "timeout", f"was not ready after {timeout_s:g} s", where=str(self.spec.bundle_path)
            ) from None
        except BaseException:
            await self._discard()
            raise
        self.report = reply.report
        self._digest = reply.report.bundle_id
        self.rss_bytes = reply.report.rss_bytes
        self._ready, self.ready_at = True, connection.loop.time()
        connection.lost.add_done_callback(lambda future: self._gone(connection, future.result()))
        return reply.report

    def begin(self, requests: Sequence[InferenceRequest], on_end: Callable[[BatchResult | WorkerLost], None]) -> None:
        """Give it a batch; it runs one after the other. ``on_end`` is called later and once, with :class:`WorkerLost`
        when the worker dies before answering. Raises it when there is no worker."""
        connection = self._connection
        if connection is None or not self._ready:
            raise WorkerLost("is not running", where=f"worker of {self.spec.model}")

        def ended(reply: Reply | WorkerLost) -> None:
            if isinstance(reply, WorkerLost):
                on_end(reply)
                return
            done, content = reply
            if not isinstance(done, wire.Done):
                on_end(WorkerLost("answered a batch with something else", where=f"worker of {self.spec.model}"))
                return
            if connection.process is not None:  # a thread's resident set is the whole agent's
                self.rss_bytes = done.rss_bytes
            on_end(BatchResult(done=done, payload=content))

        self._batch_id += 1
        message, payload = _batch(requests, self._batch_id, self.generation, classes=self.tells_classes)
        connection.begin(message, payload, ended)

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the worker when its batch is done; after ``grace_s``, or when this is cancelled, it is killed."""
        connection, self._connection, self._ready = self._connection, None, False
        if connection is None:
            return
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(connection.finish(), grace_s)
        finally:
            connection.kill()
            await asyncio.shield(connection.lost)

    async def retire(self) -> None:
        """End the worker when its batch is answered, however long that takes; nobody gives it another."""
        if self._connection is not None:
            await self._connection.settled()
        await self.stop()

    def successor(self, spec: WorkerSpec | None = None, on_lost: Callable[[str], None] | None = None) -> WorkerHandle:
        """A handle for a worker that may take this one's place, or stand beside it: the same model, and no other files
        than those."""
        handle = WorkerHandle(spec or self.spec, on_lost=on_lost or self._on_lost)
        handle._digest = self._digest
        return handle

    def kill(self) -> None:
        """End the worker's process now, whatever it does; the batch in flight gets :class:`WorkerLost`.

        A thread can't be ended from outside: it loses its connection and ends after its current batch.
        """
        self._ready = False
        if self._connection is not None:
            self._connection.kill()

    def _gone(self, connection: Connection, description: str) -> None:
        if self._connection is connection:  # else it was stopped
            self._connection, self._ready = None, False
            log.warning("worker of %s %s", self.spec.model, description)
            self._on_lost(description)

    async def _discard(self) -> None:
        connection, self._connection, self._ready = self._connection, None, False
        if connection is not None:
            connection.kill()
            await connection.lost


def _batch(
    requests: Sequence[InferenceRequest], batch_id: int, generation: int, *, classes: bool
) -> tuple[wire.Run, bytes]:
    """The message and payload of a batch: the bodies one behind the other."""
    items: list[wire.RunItem] = []
    bodies: list[bytes] = []
    start = 0
    for request in requests:
        body = wire.Region(start, len(request.body))
        start += len(request.body)
        bodies.append(request.body)
        items.append(
            wire.RunItem(
                request_id=request.request_id,
                body=body,
                json_length=request.json_length,
                deadline_at=request.deadline_at,
            )
        )
    run = wire.Run(batch_id=batch_id, generation=generation, items=tuple(items), classes=classes)
    return run, b"".join(bodies)


def _refusal(refused: wire.Refused, spec: WorkerSpec) -> AiosEdgeError:
    where = str(spec.bundle_path)
    if refused.check == "runtime":
        return RuntimeUnavailable(refused.detail)
    if refused.check == "settings":
        return SettingsError(refused.detail)
    return BundleRefused(refused.check, refused.detail, where=where)


__all__ = ["BatchResult", "WorkerHandle", "WorkerSpec"]
