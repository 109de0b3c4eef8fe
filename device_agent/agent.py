"""The daemon: puts doors, models, cloud and reports together, and takes them apart in order.

Start: sockets (so that a busy port costs nothing), bundles, workers with their whole contract checked, cloud, reports,
doors. Stop (SIGTERM, SIGINT): the doors close, queued work is answered, workers end, ``offline`` is published.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from aios_edge.profile_files import load_profile
from aios_edge.telemetry import Scalar, StatusBody
from device_agent import state_dir
from device_agent.agent_views import agent_state, agent_status, gauges, status_body
from device_agent.answer import Energy, energy_share
from device_agent.bundle_check import check_bundles, profile_mismatch
from device_agent.cloud import CloudPool
from device_agent.deployment import Deployment
from device_agent.desk import FrontDesk
from device_agent.http import App, HttpApp
from device_agent.http_server import HttpServer
from device_agent.listen import address, open_sockets, remove_socket_file
from device_agent.metrics import Metrics
from device_agent.power.meter import PROC, SYS, PowerMeter
from device_agent.reporter import Reporter, ReporterOptions
from device_agent.settings import Settings
from device_agent.status import AgentStatus
from device_agent.strain import Strain
from device_agent.surroundings import Surroundings
from device_agent.tenant_books import TenantBooks
from device_agent.tenant_door import TenantDoor
from device_agent.tls import door_certificate
from device_agent.trace_writer import TraceWriter
from device_agent.values import CheckedBundles, Completion
from device_agent.window import Gauges

log = logging.getLogger("device_agent")


class Agent:
    """``await Agent(settings).run()`` serves until it is told to stop, by a signal or :meth:`shut_down`.

    Raises :class:`ResourceError` for a socket that is taken, :class:`SettingsError` or :class:`ProfileError` for what
    is written wrong, and :class:`PromiseBroken` when not a single bundle may serve. The roots are where sensors are.
    """

    def __init__(self, settings: Settings, *, sys_root: Path = SYS, proc_root: Path = PROC) -> None:
        self.settings = settings
        self.profile = load_profile(settings.device.profile)
        self.listen: tuple[str, ...] = ()
        self._certificate = door_certificate(settings.http.tls_cert, settings.http.tls_key)
        self.ready = asyncio.Event()  # serving; for whoever runs the agent inside a program
        self._started_at = time.monotonic()
        self._stopping = asyncio.Event()
        self._metrics = Metrics()
        self._strain = Strain(settings.policy, self._emit)
        self._reporter = self._make_reporter(PowerMeter(self.profile.power, sys_root, proc_root))
        self._cloud = CloudPool(settings.cloud, settings.policy, self._emit)
        policy = settings.policy
        self._trace = TraceWriter(policy.trace, policy.trace_bytes) if policy.trace else None
        self._around = Surroundings(
            policy=policy,
            cloud=self._cloud,
            emit=self._emit,
            energy=self._energy,
            strain=lambda: self._strain.reason,
            trace=self._trace.write if self._trace else None,
            device=lambda: (self._strain.state, self._strain.sampled_at),
        )
        self._deployment = Deployment(settings, self.profile, self._around)
        self._books = TenantBooks.of(
            settings.tenant, settings.device.state_dir, self._emit, self._reporter.unauthorized
        )
        self._desk = FrontDesk(self._deployment, settings.policy, self._metrics, self.status)

    async def run(self) -> None:
        """Serve until stopped; returns after a clean stop."""
        sockets = open_sockets(self.settings.http)
        self.listen = tuple(address(sock, tls=self._certificate is not None) for sock in sockets)
        why = "stopped"
        held = contextlib.ExitStack()
        try:
            held.enter_context(state_dir.hold(self.settings.device.state_dir))
            if mismatch := profile_mismatch(self.profile):
                log.warning("%s", mismatch)
            self._books.open(self.settings.device.state_dir)
            await self._reporter.start()
            with self._signals():
                await self._serve(sockets)
        except BaseException as error:
            why = f"failed: {error}"
            raise
        finally:
            for sock in sockets:
                sock.close()
            if self.settings.http.unix_socket is not None:
                remove_socket_file(self.settings.http.unix_socket)
            await self._cloud.stop()
            await self._books.close()
            if self._trace is not None:
                await self._trace.stop()
            await self._reporter.stop(why)
            held.close()
            log.info("stopped")

    async def _serve(self, sockets: tuple[socket.socket, ...]) -> None:
        """Doors open (live, not ready), activate, serve, and close the doors when everyone was answered."""
        certificate = self._certificate
        tls = None if certificate is None else certificate.context
        server = HttpServer(self._app(), drain_s=self.settings.policy.drain_s, tls=tls)
        doors = asyncio.create_task(server.serve(sockets=list(sockets)), name="doors")
        activation = asyncio.create_task(self._deployment.activate_all(), name="activation")
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        renewal = asyncio.create_task(certificate.watch(self._emit), name="certificate") if certificate else None
        try:
            await asyncio.wait((activation, stopping, doors), return_when=asyncio.FIRST_COMPLETED)
            if activation.done():
                activation.result()
                self._cloud.start(self.settings.device.state_dir)
                self.ready.set()
                self._reporter.status_changed()
                log.info("ready on %s", ", ".join(self.listen))
                await asyncio.wait((stopping, doors), return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping: %d requests are still answered", self._desk.in_flight)
        finally:
            self._desk.draining = True
            server.should_exit = True
            for task in (activation, stopping, *((renewal,) if renewal else ())):
                task.cancel()
            self._deployment.give_up_changes()
            await asyncio.wait((doors,), timeout=self.settings.policy.drain_s)
            # Who still waits is told so while the doors are there to say it.
            await self._deployment.stop()
            await asyncio.gather(activation, stopping, doors, return_exceptions=True)
        if not self._stopping.is_set():
            doors.result()  # nobody stopped them: they failed

    def shut_down(self) -> None:
        """Begin the orderly stop."""
        self._stopping.set()

    async def check(self) -> CheckedBundles:
        """Activate every bundle in a worker, serve nothing.

        Raises only for what is written wrong, and :class:`ResourceError` for a state folder that can't be used.
        """
        return await check_bundles(self.settings, self.profile, self._around)

    def status(self) -> AgentStatus:
        """Everything, now."""
        now = time.monotonic()
        return agent_status(
            self.settings,
            self.profile,
            state=agent_state(self._deployment, serving=self.ready.is_set(), draining=self._desk.draining),
            now=now,
            uptime_s=now - self._started_at,
            listen=self.listen,
            deployment=self._deployment,
            cloud=self._cloud,
            reporter=self._reporter,
            strain=self._strain,
            metrics=self._metrics,
            desk=self._desk,
        )

    # Putting it together

    def _app(self) -> App:
        limit, tenants = self.settings.http.max_body_bytes, self.settings.tenant
        if not tenants:
            return HttpApp(self._desk, max_body_bytes=limit, record=self._record)
        return TenantDoor(tenants, self._desk, self._deployment, self._books, max_body_bytes=limit, record=self._record)

    def _make_reporter(self, meter: PowerMeter) -> Reporter:
        mqtt, device = self.settings.mqtt, self.settings.device
        options = ReporterOptions(
            group=device.group,
            device=device.id,
            mqtt=None if mqtt is None else mqtt.options(),
            interval_s=mqtt.interval_s if mqtt else 10.0,
            sample_s=min(1.0, mqtt.interval_s) if mqtt else 1.0,
            outbox_path=device.state_dir / "outbox.sqlite",
            outbox_bytes=mqtt.outbox_bytes if mqtt else 16_000_000,
        )
        return Reporter(
            options,
            meter=meter,
            status_body=self._status_body,
            gauges=self._gauges,
            on_reading=self._strain.look,
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handled: list[signal.Signals] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: the caller's business
                loop.add_signal_handler(number, self.shut_down)
                handled.append(number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    # What others ask

    def _record(self, completion: Completion) -> None:
        self._metrics.record(completion)
        self._reporter.record(completion)

    def _emit(self, kind: str, **detail: Scalar) -> None:
        self._reporter.event(kind, **detail)

    def _energy(self, compute_s: float, batch_size: int) -> Energy:
        return energy_share(self._reporter.last_reading, compute_s, batch_size)

    def _status_body(self) -> StatusBody:
        return status_body(self.settings, self.profile, self._deployment)

    def _gauges(self) -> Gauges:
        return gauges(self._deployment, self._cloud, self._strain)
