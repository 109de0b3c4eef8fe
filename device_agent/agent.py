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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aios_edge.profile_files import load_profile
from aios_edge.telemetry import Scalar, StatusBody
from aios_edge.topics import Topics
from device_agent import state_dir
from device_agent.agent_views import agent_state, agent_status, gauges, status_body
from device_agent.answer import Energy, energy_share
from device_agent.bundle_check import check_bundles, profile_mismatch
from device_agent.cloud import CloudPool
from device_agent.deployment import Deployment
from device_agent.desk import FrontDesk
from device_agent.grpc_extra import load_grpc
from device_agent.hosting import check_policy
from device_agent.http import App, HttpApp
from device_agent.http_server import HttpServer
from device_agent.inbound import Inbound
from device_agent.listen import address, open_sockets, remove_socket_file
from device_agent.memory_room import read_room
from device_agent.metrics import Metrics
from device_agent.mqtt_ask import Anybody, TenantAsks
from device_agent.mqtt_door import Asker, MqttDoor
from device_agent.policy_in_force import PolicyInForce, policy_values
from device_agent.power.meter import PROC, SYS, PowerMeter
from device_agent.reload import Reload
from device_agent.reporter import Reporter, ReporterOptions
from device_agent.settings import Policy, Settings
from device_agent.status import AgentStatus
from device_agent.strain import Strain
from device_agent.surroundings import Surroundings
from device_agent.tenant_books import TenantBooks
from device_agent.tenant_desk import TenantDesks
from device_agent.tenant_door import TenantDoor
from device_agent.tls import door_certificate
from device_agent.trace import InForce
from device_agent.trace_writer import TraceWriter
from device_agent.values import CheckedBundles, Completion
from device_agent.window import Gauges

if TYPE_CHECKING:
    from device_agent.grpc_door.server import GrpcServer

log = logging.getLogger("device_agent")


class Agent:
    """``await Agent(settings).run()`` serves until it is told to stop, by a signal or :meth:`shut_down`.

    Raises :class:`ResourceError` for a socket that is taken, :class:`SettingsError` or :class:`ProfileError` for what
    is written wrong, and :class:`PromiseBroken` when not a single bundle may serve. ``config``: the file that SIGHUP
    reads again. The roots are where sensors are.
    """

    def __init__(
        self, settings: Settings, *, config: Path | None = None, sys_root: Path = SYS, proc_root: Path = PROC
    ) -> None:
        self.settings = settings
        self.profile = load_profile(settings.device.profile)
        self.listen: tuple[str, ...] = ()
        self._certificate = door_certificate(settings.http.tls_cert, settings.http.tls_key)
        self._make_grpc = load_grpc() if settings.http.grpc_bind else None
        self._grpc: GrpcServer | None = None
        self.ready = asyncio.Event()  # serving; for whoever runs the agent inside a program
        self._started_at = time.monotonic()
        self._stopping = asyncio.Event()
        self._metrics = Metrics()
        self._rules = rules = PolicyInForce(settings.policy)
        self._strain = Strain(settings.policy, self._emit)
        self._reporter = self._make_reporter(PowerMeter(self.profile.power, sys_root, proc_root))
        self._cloud = CloudPool(settings.cloud, settings.policy, self._emit)
        check = partial(check_policy, profile=self.profile)
        policy = settings.policy
        self._trace = TraceWriter(policy.trace, policy.trace_bytes) if policy.trace else None
        self._define_policy(policy)
        for follower in (self._strain.follow, self._define_policy):
            rules.follow(follower)
        self._around = Surroundings(
            rules=rules,
            cloud=self._cloud,
            emit=self._emit,
            energy=self._energy,
            strain=lambda: self._strain.reason,
            trace=self._trace.write if self._trace else None,
            tenants=settings.tenant,
            device=lambda: (self._strain.state, self._strain.sampled_at),
            room=lambda: read_room(proc_root, sys_root),
        )
        self._deployment = Deployment(settings, self.profile, self._around)
        on_changed = self._deployment.follow
        self._reload = Reload(config, settings, rules, self._cloud, self._emit, check=check, on_changed=on_changed)
        tenants = settings.tenant
        self._books = TenantBooks.of(tenants, settings.device.state_dir, self._emit, self._reporter.unauthorized)
        self._mqtt_door: MqttDoor | None = None
        self._inbound = Inbound(lambda: rules.policy.in_flight_bytes)
        self._desk = FrontDesk(
            self._deployment, rules, self._metrics, self.status, {each.id: each.weight for each in tenants}
        )
        self._tenants = TenantDesks(tenants, self._desk, self._deployment, self._books) if tenants else None

    async def run(self) -> None:
        """Serve until stopped; returns after a clean stop."""
        sockets = open_sockets(self.settings.http)
        self.listen = tuple(address(sock, tls=self._certificate is not None) for sock in sockets)
        why = "stopped"
        held = contextlib.ExitStack()
        try:
            if self._make_grpc is not None:
                desk, tenants, books = self._desk, self._tenants, self._books
                self._grpc = self._make_grpc(
                    self.settings.http, desk, tenants, books, self._record, self._inbound, self._certificate
                )
                self.listen = (*self.listen, self._grpc.address)
            held.enter_context(state_dir.hold(self.settings.device.state_dir))
            if mismatch := profile_mismatch(self.profile):
                log.warning("%s", mismatch)
            self._books.open(self.settings.device.state_dir)
            await self._reporter.start()
            with self._signals() as heard:
                if signal.SIGHUP in heard:
                    self._reload.begin()
                try:
                    await self._serve(sockets)
                finally:
                    await self._reload.stop()  # before it is deaf
        except BaseException as error:
            why = f"failed: {error}"
            raise
        finally:
            for sock in sockets:
                sock.close()
            if self.settings.http.unix_socket is not None:
                remove_socket_file(self.settings.http.unix_socket)
            if self._grpc is not None:
                await self._grpc.stop(0)  # also where it never started, but holds its port
            await self._cloud.stop()
            await self._books.close()
            if self._trace is not None:
                await self._trace.stop()
            await self._reporter.stop(why)
            held.close()
            log.info("stopped")

    async def _serve(self, sockets: tuple[socket.socket, ...]) -> None:
        """Doors open (live, not ready), activate, serve, and close the doors when everyone was answered."""
        app, certificate = self._app(), self._certificate
        tls = None if certificate is None else certificate.context
        receive_s, inbound = self.settings.http.receive_timeout_s, self._inbound
        server = HttpServer(app, receive_timeout_s=receive_s, tls=tls, inbound=inbound)
        self._mqtt_door = self._make_mqtt_door()
        if self._mqtt_door is not None:
            self._mqtt_door.start()
        doors = asyncio.create_task(server.serve(sockets=list(sockets)), name="doors")
        if self._grpc is not None:
            await self._grpc.start()
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
            drain_s = self._rules.policy.drain_s
            server.close(drain_s=drain_s)
            for task in (activation, stopping, *((renewal,) if renewal else ())):
                task.cancel()
            self._deployment.give_up_changes()
            closing = asyncio.create_task(self._close_doors(doors, drain_s), name="closing")
            await asyncio.wait((closing,), timeout=drain_s)
            # Who still waits is told so while the doors are there to say it.
            await self._deployment.stop()
            if self._mqtt_door is not None:
                await self._mqtt_door.stop()
            await asyncio.gather(activation, stopping, closing, return_exceptions=True)
        if not self._stopping.is_set():
            doors.result()  # nobody stopped them: they failed

    async def _close_doors(self, doors: asyncio.Task[None], drain_s: float) -> None:
        """Until everyone was answered; the last two seconds are for telling those who weren't."""
        others = [] if self._grpc is None else [self._grpc.stop(drain_s + 2)]
        if self._mqtt_door is not None:
            others.append(self._mqtt_door.drain())
        await asyncio.gather(asyncio.wait((doors,)), *others)

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
            grpc=self._grpc.status() if self._grpc is not None else None,
            deployment=self._deployment,
            cloud=self._cloud,
            reporter=self._reporter,
            strain=self._strain,
            rules=self._rules,
            reload=self._reload,
            metrics=self._metrics,
            desk=self._desk,
            mqtt_door=self._mqtt_door,
        )

    # Putting it together

    def _app(self) -> App:
        limit = self.settings.http.max_body_bytes
        if self._tenants is None:
            return HttpApp(self._desk, max_body_bytes=limit, record=self._record, direct=self._desk)
        return TenantDoor(self._tenants, self._desk, self._books, max_body_bytes=limit, record=self._record)

    def _make_mqtt_door(self) -> MqttDoor | None:
        mqtt, device = self.settings.mqtt, self.settings.device
        if mqtt is None or not mqtt.infer:
            return None
        asker: Asker = Anybody(self._desk)
        if self._tenants is not None and mqtt.infer_tenant is not None:
            tenant = mqtt.infer_tenant
            asker = TenantAsks(self._tenants.accounts.of[tenant], self._tenants.of[tenant], self._books.audit)
        return MqttDoor(
            mqtt.options(),
            Topics(device.group, device.id),
            asker,
            max_body_bytes=self.settings.http.max_body_bytes,
            keep_bytes=mqtt.outbox_bytes,
            record=self._record,
        )

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
    def _signals(self) -> Iterator[list[signal.Signals]]:
        loop = asyncio.get_running_loop()
        handled: list[signal.Signals] = []
        heard = ((signal.SIGTERM, self.shut_down), (signal.SIGINT, self.shut_down), (signal.SIGHUP, self._reload.ask))
        for number, handler in heard:
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: the caller's business
                loop.add_signal_handler(number, handler)
                handled.append(number)
        try:
            yield handled
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    # What others ask

    def _record(self, completion: Completion) -> None:
        self._metrics.record(completion)
        self._reporter.record(completion)

    def _define_policy(self, policy: Policy) -> None:
        if self._trace is not None:
            rules = self._rules
            self._trace.define(InForce(digest=rules.digest, since=rules.since, values=policy_values(policy)))

    def _emit(self, kind: str, **detail: Scalar) -> None:
        self._reporter.event(kind, **detail)

    def _energy(self, compute_s: float, batch_size: int) -> Energy:
        return energy_share(self._reporter.last_reading, compute_s, batch_size)

    def _status_body(self) -> StatusBody:
        return status_body(self.settings, self.profile, self._deployment)

    def _gauges(self) -> Gauges:
        return gauges(self._deployment, self._cloud, self._strain, self._rules, self._mqtt_door)
