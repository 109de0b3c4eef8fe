"""The supervisor's handle on one worker: start it, give it batches, notice its death at once, stop it.

A worker is a spawned process (never forked: onnxruntime's threads and locks don't survive a fork), or, where the
profile's ``isolation`` is ``thread``, a thread of this process that speaks the same messages over the same kind of
socketpair. Nothing here imports numpy or onnxruntime.

The worker's end of the pair is held by the worker alone, so the kernel's end-of-file is its death notice: no
heartbeat, no polling, and every way to die looks the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aios_edge.errors import AiosEdgeError, BundleRefused, RuntimeUnavailable, SettingsError, WorkerLost
from aios_edge.profile import Isolation
from device_agent import wire
from device_agent.values import ActivationReport, InferenceRequest
from device_agent.worker_exit import exit_status, log_lines

log = logging.getLogger("device_agent.worker")

EXIT_GRACE_S = 0.05  # between end-of-file and exit status; a worker that lingers longer is killed


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker is started with. ``profile`` is a TOML path or a shipped name; ``intra_op_threads`` the
    profile's; ``slowdown`` emulates a weaker device."""

    model: str
    bundle_path: Path
    profile: str
    isolation: Isolation = "process"
    intra_op_threads: int = 1
    slowdown: float = 1.0


@dataclass(frozen=True, kw_only=True)
class BatchResult:
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
        self.rss_bytes: int | None = None  # after the latest batch; None before the first, and in a thread
        self.report: ActivationReport | None = None  # of the latest activation, refused ones included
        self._on_stage = on_stage
        self._on_lost = on_lost
        self._connection: _Connection | None = None
        self._ready = False
        self._batch_id = 0
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The worker's process id; None when there is none, or when it is a thread."""
        process = self._connection.process if self._connection else None
        return process.pid if process else None

    @property
    def ready(self) -> bool:
        """Whether a batch can be run now or after the one in flight."""
        return self._ready

    async def start(self, check: str = "full", *, timeout_s: float = 600.0) -> ActivationReport:
        """Start a worker and return what its activation found.

        ``check`` is ``full``, or ``quick`` after a crash. Raises :class:`BundleRefused` named after the check that
        failed (``timeout`` when it never ended; building a TensorRT engine takes minutes), :class:`WorkerLost` when
        the worker died meanwhile, :class:`RuntimeUnavailable` or :class:`SettingsError`.
        """
        if self._connection is not None:
            raise AiosEdgeError("already started", where=f"worker of {self.spec.model}", remedy="Stop it first")
        self.generation += 1
        connection = _Connection(self.spec, self.generation, self._on_stage)
        self._connection = connection
        load = wire.Load(
            bundle_path=str(self.spec.bundle_path.absolute()),
            profile=self.spec.profile,
            generation=self.generation,
            check=check,
            slowdown=self.spec.slowdown,
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
        self.rss_bytes = reply.report.rss_bytes
        self._ready = True
        connection.lost.add_done_callback(lambda future: self._gone(connection, future.result()))
        return reply.report

    async def run(self, requests: Sequence[InferenceRequest]) -> BatchResult:
        """Run one batch; a second call waits its turn. :class:`WorkerLost` when the worker dies before answering."""
        async with self._turn:
            connection = self._connection
            if connection is None or not self._ready:
                raise WorkerLost("is not running", where=f"worker of {self.spec.model}")
            self._batch_id += 1
            message, payload = _batch(requests, self._batch_id, self.generation)
            reply, content = await connection.ask(message, payload)
            if not isinstance(reply, wire.Done):
                raise WorkerLost("answered a batch with something else", where=f"worker of {self.spec.model}")
            if connection.process is not None:  # a thread's resident set is the whole agent's
                self.rss_bytes = reply.rss_bytes
            return BatchResult(done=reply, payload=content)

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the worker: it finishes the batch in flight; after ``grace_s`` it is killed."""
        connection, self._connection, self._ready = self._connection, None, False
        if connection is None:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(connection.finish(), grace_s)
        connection.kill()
        await connection.lost

    def kill(self) -> None:
        """End the worker's process now, whatever it does; the batch in flight gets :class:`WorkerLost`.

        A thread can't be ended from outside: it loses its connection and ends after its current batch.
        """
        self._ready = False
        if self._connection is not None:
            self._connection.kill()

    def _gone(self, connection: _Connection, description: str) -> None:
        if self._connection is connection:  # else it was stopped
            self._connection, self._ready = None, False
            log.warning("worker of %s %s", self.spec.model, description)
            self._on_lost(description)

    async def _discard(self) -> None:
        connection, self._connection, self._ready = self._connection, None, False
        if connection is not None:
            connection.kill()
            await connection.lost


class _Connection:
    """One generation of a worker: its socket, its process or thread, and the reply that is waited for."""

    def __init__(self, spec: WorkerSpec, generation: int, on_stage: Callable[[str], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = self.loop.create_future()  # how the worker ended
        self.process: subprocess.Popen[bytes] | None = None
        self._where = f"worker of {spec.model}"
        self._generation = generation
        self._on_stage = on_stage
        self._waiting: tuple[int | None, asyncio.Future[tuple[wire.Message, memoryview]]] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._sock, theirs = wire.pair()
        try:
            if spec.isolation == "process":
                self.process = _spawn(spec, theirs)
            else:
                _start_thread(spec, theirs)
                theirs = self._sock  # the thread owns its end now
        except OSError as error:
            self._sock.close()
            raise RuntimeUnavailable(f"can't be started ({error.strerror})", where=self._where) from error
        finally:
            if theirs is not self._sock:
                theirs.close()
        if self.process is not None and self.process.stdout is not None:
            log_lines(self.loop, self.process.stdout, f"worker of {spec.model} [{self.process.pid}]")
        self.loop.add_reader(self._sock, self._on_readable)

    async def ask(self, message: wire.Load | wire.Run, payload: bytes = b"") -> tuple[wire.Message, memoryview]:
        """Send a message and wait for the reply to it, or for the worker's death."""
        reply: asyncio.Future[tuple[wire.Message, memoryview]] = self.loop.create_future()
        self._waiting = (message.batch_id if isinstance(message, wire.Run) else None, reply)
        if self.lost.done() or self._ending is not None or not await self._send(message, payload):
            raise WorkerLost(await asyncio.shield(self.lost), where=self._where)
        return await reply

    async def finish(self) -> None:
        """Ask the worker to end and wait until it has."""
        if self._ending is None:
            await self._send(wire.Stop())
        await asyncio.shield(self.lost)

    def kill(self) -> None:
        """SIGKILL for a process; a thread loses its connection."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()  # Popen has not reaped it, so the pid is still ours
        if self.process is None:
            self._end("was told to end")

    async def _send(self, message: wire.Message, payload: bytes = b"") -> bool:
        while True:
            try:
                wire.send(self._sock, message, payload)
                return True
            except BlockingIOError:
                self._writable.clear()
                self.loop.add_writer(self._sock, self._on_writable)
                await self._writable.wait()
            except OSError:  # it is gone; the end-of-file tells how
                self._end("closed its connection")
                return False

    def _on_writable(self) -> None:
        self.loop.remove_writer(self._sock)
        self._writable.set()

    def _on_readable(self) -> None:
        try:
            received = wire.receive(self._sock)
        except BlockingIOError:
            return
        except (ConnectionError, OSError) as error:
            if self.process is not None:
                self.process.kill()  # whoever sends nonsense is not a worker any more
            self._end(f"sent nonsense: {error}")
            return
        if received is None:
            self._end("closed its connection")
            return
        message, payload = received
        if isinstance(message, (wire.Load, wire.Run, wire.Stop)) or message.generation != self._generation:
            return  # a reply of an old generation
        if isinstance(message, wire.Loading):
            self._on_stage(message.stage)
        elif self._waiting is not None:
            batch_id, reply = self._waiting
            answered = message.batch_id if isinstance(message, wire.Done) else None
            if answered == batch_id and not reply.done():  # else its caller has gone
                reply.set_result((message, payload))

    def _end(self, what: str) -> None:
        if self._ending is None:
            self.loop.remove_reader(self._sock)
            self._on_writable()  # whoever waits to send finds the socket closed
            self._sock.close()
            self._ending = self.loop.create_task(self._reap(what))

    async def _reap(self, what: str) -> None:
        """Learn how the process ended (:mod:`device_agent.worker_exit`) and tell whoever waits."""
        description = what
        if self.process is not None:
            description = await exit_status(self.process, grace_s=EXIT_GRACE_S, else_what=what)
        if not self.lost.done():
            self.lost.set_result(description)
        if self._waiting is not None and not self._waiting[1].done():
            self._waiting[1].set_exception(WorkerLost(description, where=self._where))
            self._waiting[1].exception()  # its caller may be gone: not an error of ours then


def _batch(requests: Sequence[InferenceRequest], batch_id: int, generation: int) -> tuple[wire.Run, bytes]:
    """The message and payload of a batch: the bodies one behind the other."""
    items: list[wire.RunItem] = []
    start = 0
    for request in requests:
        body = wire.Region(start, len(request.body))
        start += len(request.body)
        items.append(
            wire.RunItem(
                request_id=request.request_id,
                body=body,
                json_length=request.json_length,
                deadline_at=request.deadline_at,
            )
        )
    run = wire.Run(batch_id=batch_id, generation=generation, items=tuple(items))
    return run, b"".join(request.body for request in requests)


def _refusal(refused: wire.Refused, spec: WorkerSpec) -> AiosEdgeError:
    where = str(spec.bundle_path)
    if refused.check == "runtime":
        return RuntimeUnavailable(refused.detail)
    if refused.check == "settings":
        return SettingsError(refused.detail)
    return BundleRefused(refused.check, refused.detail, where=where)


def _spawn(spec: WorkerSpec, theirs: socket.socket) -> subprocess.Popen[bytes]:
    threads = str(spec.intra_op_threads)
    environment = os.environ | {
        # Libraries that start a thread per core by themselves must keep to the profile's number.
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",  # a native crash leaves its stack in our log
    }
    return subprocess.Popen(
        [sys.executable, "-m", "device_agent.worker", "--fd", str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(theirs.fileno(),),
        env=environment,
        start_new_session=True,  # Ctrl-C in a terminal is for the supervisor, which drains first
    )


def _start_thread(spec: WorkerSpec, theirs: socket.socket) -> None:
    from device_agent.worker import serve  # numpy and onnxruntime: only where the profile asks for a thread

    def body() -> None:
        with theirs:
            serve(theirs)

    threading.Thread(target=body, name=f"worker-{spec.model}", daemon=True).start()
