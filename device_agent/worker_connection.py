"""One generation of a worker: its socket, its process or thread, and the replies that are waited for.

A worker is a spawned process (never forked: onnxruntime's threads and locks don't survive a fork), or, where the
profile's ``isolation`` is ``thread``, a thread of this process that speaks the same messages over the same kind of
socketpair. The worker's end of the pair is held by the worker alone, so the kernel's end-of-file is its death
notice, and every way to die looks the same. One that lives and stands still is found by worker_watch.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aios_edge.errors import RuntimeUnavailable, WorkerLost
from aios_edge.profile import Isolation
from device_agent import wire
from device_agent.values import Engines
from device_agent.worker_exit import exit_status, log_lines
from device_agent.worker_watch import WorkerWatch

log = logging.getLogger("device_agent.worker")

NO_DESCRIPTOR_PAUSE_S = 0.02
EXIT_GRACE_S = 0.05  # between end-of-file and exit status; a worker that lingers longer is killed

Reply = tuple[wire.Message, memoryview]


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker is started with. ``profile`` is a TOML path or a shipped name; ``intra_op_threads`` those of the
    session; ``slowdown`` emulates a weaker device; ``state_dir`` is where engines are kept, None: nowhere.
    ``raw_version``: that of a raw model, which ``bundle_path`` holds instead of a bundle. ``bundle_id``: what must lie
    at ``bundle_path``, None: any bundle. ``engines``: when TensorRT is used. ``nice``: its share of the cores, of a
    process only. ``workers``: how many the model has. ``cpus``: those it keeps to; of all of them together, those that
    are shared out. ``max_rss_bytes``: above that it is replaced; 0: never, None: by ``promised_rss_bytes``, the
    contract's."""

    model: str
    bundle_path: Path
    profile: str
    isolation: Isolation = "process"
    intra_op_threads: int = 1
    slowdown: float = 1.0
    state_dir: Path | None = None
    raw_version: str | None = None
    bundle_id: str | None = None
    engines: Engines = "build"
    nice: int = 0
    workers: int = 1
    cpus: tuple[int, ...] = ()
    max_rss_bytes: int | None = None
    promised_rss_bytes: int | None = None


class Connection:
    """One generation of a worker: its socket, its process or thread, and the replies that are waited for."""

    def __init__(self, spec: WorkerSpec, generation: int, on_stage: Callable[[str], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = self.loop.create_future()  # how the worker ended
        self.process: subprocess.Popen[bytes] | None = None
        self.heard = 0  # messages that came
        self.ended = False  # the worker is gone, though nobody may know yet how
        self._where = f"worker of {spec.model}"
        self._generation = generation
        self._on_stage = on_stage
        self._waiting: dict[int | None, Callable[[Reply | WorkerLost], None]] = {}  # by batch; None: Load
        self._ending: asyncio.Task[None] | None = None
        self._unsent: deque[tuple[wire.Message, bytes]] = deque()
        self._settled: asyncio.Future[None] | None = None  # for whoever waits until nothing is owed
        self._given_up: str | None = None  # why it was killed though it lived
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
        self._watch = None if self.process is None else WorkerWatch(self, self.process.pid)

    @property
    def busy(self) -> bool:
        """Whether it owes a reply."""
        return bool(self._waiting)

    def begin(
        self, message: wire.Load | wire.Run, payload: bytes, on_reply: Callable[[Reply | WorkerLost], None]
    ) -> None:
        """Send a message; ``on_reply`` is called with the reply to it, or with the worker's death, later and once. A
        second may be sent before the first is answered: the worker takes one after the other."""
        self._waiting[message.batch_id if isinstance(message, wire.Run) else None] = on_reply
        if self.lost.done():
            self.loop.call_soon(self._tell_all, self.lost.result())
        elif self._ending is None:
            self._send(message, payload)

    async def ask(self, message: wire.Load | wire.Run, payload: bytes = b"") -> Reply:
        """Send a message and wait for the reply to it. Raises :class:`WorkerLost` when the worker dies instead."""
        answered: asyncio.Future[Reply | WorkerLost] = self.loop.create_future()
        self.begin(message, payload, lambda reply: None if answered.done() else answered.set_result(reply))
        reply = await answered
        if isinstance(reply, WorkerLost):
            raise reply
        return reply

    async def settled(self) -> None:
        """Wait until it owes no reply."""
        if self._waiting:
            self._settled = self.loop.create_future()
            await self._settled

    async def finish(self) -> None:
        """Ask the worker to end and wait until it has."""
        if self._ending is None:
            self._send(wire.Stop())
        await asyncio.shield(self.lost)

    def kill(self) -> None:
        """SIGKILL for a process; a thread loses its connection."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()  # Popen has not reaped it, so the pid is still ours
        if self.process is None:
            self._end("was told to end")

    def ping(self) -> None:
        """Ask for a sign of life; it counts as heard, and nobody waits for it."""
        if not self._unsent:
            with contextlib.suppress(OSError):  # full, or gone: neither is for a heartbeat to mend
                wire.send(self._sock, wire.Ping())

    def give_up(self, why: str) -> None:
        """End a process that lives and stands still; it may not even die at once."""
        self._given_up = why
        self.kill()
        self._end(why)

    def _send(self, message: wire.Message, payload: bytes = b"") -> None:
        """Now, or as soon as there is room; a worker that is gone is noticed here too."""
        self._unsent.append((message, payload))
        if len(self._unsent) == 1:
            self._send_more()

    def _send_more(self) -> None:
        while self._unsent:
            try:
                wire.send(self._sock, *self._unsent[0])
            except BlockingIOError:
                self.loop.add_writer(self._sock, self._on_writable)
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):  # a long payload needs a descriptor, if only for now
                    self.loop.call_later(NO_DESCRIPTOR_PAUSE_S, self._send_more)
                    return
                self._end("closed its connection")  # it is gone; the end-of-file tells how
                return
            self._unsent.popleft()

    def _on_writable(self) -> None:
        self.loop.remove_writer(self._sock)
        self._send_more()

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
        self.heard += 1
        message = received[0]
        if isinstance(message, (wire.Load, wire.Run, wire.Ping, wire.Stop)) or message.generation != self._generation:
            return  # a reply of an old generation
        if isinstance(message, wire.Loading):
            self._on_stage(message.stage)
        elif not isinstance(message, wire.Pong):
            self._tell(message.batch_id if isinstance(message, wire.Done) else None, received)

    def _end(self, what: str) -> None:
        if self._ending is None:
            self.ended = True
            if self._watch is not None:
                self._watch.end()
            self.loop.remove_reader(self._sock)
            self.loop.remove_writer(self._sock)
            self._unsent.clear()
            self._sock.close()
            self._ending = self.loop.create_task(self._reap(what))

    async def _reap(self, what: str) -> None:
        """Learn how the process ended (:mod:`device_agent.worker_exit`) and tell whoever waits."""
        description = what
        if self.process is not None:
            description = await exit_status(self.process, grace_s=EXIT_GRACE_S, else_what=what)
            if self._given_up is not None and not description.startswith(self._given_up):  # it died at once
                description = f"{self._given_up} and was killed"
        if not self.lost.done():
            self.lost.set_result(description)
        self._tell_all(description)

    def _tell_all(self, how: str) -> None:
        for batch_id in list(self._waiting):  # in the order in which they were asked
            try:
                self._tell(batch_id, WorkerLost(how, where=self._where))
            except Exception:  # whoever waits for the next one is to hear of it too
                log.exception("the loss of a batch could not be told")

    def _tell(self, batch_id: int | None, reply: Reply | WorkerLost) -> None:
        on_reply = self._waiting.pop(batch_id, None)
        if self._settled is not None and not self._settled.done() and not self._waiting:
            self._settled.set_result(None)
        if on_reply is not None:
            on_reply(reply)


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
        [sys.executable, "-m", "device_agent.worker", "--fd", str(theirs.fileno()), "--nice", str(spec.nice)],
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
