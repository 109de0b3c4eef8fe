"""The daemon: puts doors, models, cloud and reports together, and takes them apart in order.

Start: sockets (so that a busy port costs nothing), bundles, workers with their whole contract checked, cloud, reports,
doors. Stop (SIGTERM, SIGINT): the doors close, queued work is answered, workers end, ``offline`` is published.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from aios_edge.bundle.read import Bundle, open_bundle
from aios_edge.errors import AiosEdgeError, SettingsError, UsageError
from aios_edge.host import inspect_host, matches
from aios_edge.mqtt_options import broker_address
from aios_edge.profile_files import load_profile
from aios_edge.session import differences, session_options
from aios_edge.telemetry import BundleStatus, Scalar, StatusBody
from aios_edge.version import __version__
from device_agent import state_dir
from device_agent import status as st
from device_agent.answer import Energy
from device_agent.cloud import CloudPool
from device_agent.cloud_fit import ModelShape
from device_agent.desk import FrontDesk
from device_agent.http import HttpApp
from device_agent.http_protocol import DoorProtocol
from device_agent.listen import address, open_sockets, remove_socket_file
from device_agent.metrics import Metrics
from device_agent.model_host import ModelHost, Surroundings
from device_agent.model_views import bundle_status, model_status
from device_agent.power.meter import PowerMeter
from device_agent.provider_chain import forget_engines
from device_agent.reporter import Reporter, ReporterOptions
from device_agent.settings import BundleEntry, Settings, check_model_maps
from device_agent.values import ActivationReport, CheckedBundles, Completion, RefusedBundle
from device_agent.window import Gauges
from device_agent.worker_pool import WorkerSpec

log = logging.getLogger("device_agent")


class Agent:
    """``await Agent(settings).run()`` serves until it is told to stop, by a signal or :meth:`shut_down`.

    Raises :class:`ResourceError` for a socket that is taken, :class:`SettingsError` or :class:`ProfileError` for what
    is written wrong, and :class:`PromiseBroken` when not a single bundle may serve.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.profile = load_profile(settings.device.profile)
        self.listen: tuple[str, ...] = ()
        self.ready = asyncio.Event()  # serving; for whoever runs the agent inside a program
        self._started_at = time.monotonic()
        self._stopping = asyncio.Event()
        self._hosts: dict[str, ModelHost] = {}
        self._entries: dict[str, BundleEntry] = {}
        self._refused: list[BundleStatus] = []
        self._metrics = Metrics()
        self._reporter = self._make_reporter()
        self._cloud = CloudPool(settings.cloud, settings.policy, self._emit)
        self._desk = FrontDesk(self._hosts, settings.policy, self._metrics, self.status)

    async def run(self) -> None:
        """Serve until stopped; returns after a clean stop."""
        sockets = open_sockets(self.settings.http)
        self.listen = tuple(address(sock) for sock in sockets)
        why = "stopped"
        held = contextlib.ExitStack()
        try:
            held.enter_context(state_dir.hold(self.settings.device.state_dir))
            if mismatch := self._profile_mismatch():
                log.warning("%s", mismatch)
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
            await self._reporter.stop(why)
            held.close()
            log.info("stopped")

    async def _serve(self, sockets: tuple[socket.socket, ...]) -> None:
        """Doors open (live, not ready), activate, serve, and close the doors when everyone was answered."""
        server = _Server(self._uvicorn_config())
        doors = asyncio.create_task(server.serve(sockets=list(sockets)), name="doors")
        activation = asyncio.create_task(self._activate_all(), name="activation")
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        try:
            await asyncio.wait((activation, stopping, doors), return_when=asyncio.FIRST_COMPLETED)
            if activation.done():
                activation.result()
                self._cloud.start()
                self.ready.set()
                self._reporter.status_changed()
                log.info("ready on %s", ", ".join(self.listen))
                await asyncio.wait((stopping, doors), return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping: %d requests are still answered", self._desk.in_flight)
        finally:
            self._desk.draining = True
            server.should_exit = True
            for task in (activation, stopping):
                task.cancel()
            await asyncio.wait((doors,), timeout=self.settings.policy.drain_s)
            # Who still waits is told so while the doors are there to say it.
            await asyncio.gather(*(host.stop() for host in self._hosts.values()), return_exceptions=True)
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
        if self.settings.mqtt is not None:
            broker_address(self.settings.mqtt.options())
        if not self.settings.bundle:
            raise _no_bundle()
        state_dir.try_out(self.settings.device.state_dir)
        opened: dict[str, tuple[BundleEntry, Bundle]] = {}
        refused: dict[Path, AiosEdgeError] = {}
        for entry in self.settings.bundle:
            try:
                bundle = self._open(entry)
            except AiosEdgeError as error:
                refused[entry.path] = error
                continue
            if bundle.manifest.name in opened:
                raise _same_name(bundle.manifest.name, entry.path)
            opened[bundle.manifest.name] = entry, bundle
        if not refused:  # else nobody knows the name of the one that can't be read
            check_model_maps(self.settings, opened)
        reports: list[ActivationReport] = []
        for entry, bundle in opened.values():
            host = self._host(entry, bundle, state_dir=None)  # nothing is left behind, engines included
            try:
                reports.append(await host.activate())
            except UsageError:  # the profile's or the settings', not the bundle's
                raise
            except AiosEdgeError as error:
                refused[entry.path] = error
            finally:
                await host.stop()
        in_order = (entry.path for entry in self.settings.bundle if entry.path in refused)
        return CheckedBundles(
            activations=tuple(reports),
            refused=tuple(RefusedBundle(path=path, error=refused[path]) for path in in_order),
            profile_mismatch=self._profile_mismatch(),
        )

    def status(self) -> st.AgentStatus:
        """Everything, now."""
        device, reading = self.settings.device, self._reporter.last_reading
        now = time.monotonic()
        if self._desk.draining:
            state = "draining"
        elif not self.ready.is_set():
            state = "starting"
        else:
            degraded = self._refused or any(host.state != "ready" for host in self._hosts.values())
            state = "degraded" if degraded else "ready"
        return st.AgentStatus(
            agent_version=__version__,
            boot_id=self._reporter.boot_id,
            state=state,
            uptime_s=round(now - self._started_at, 3),
            device=st.DeviceStatus(
                id=device.id, group=device.group, profile=self.profile.name, state_dir=str(device.state_dir)
            ),
            host=st.HostStatus(
                hostname=platform.node(),
                machine=platform.machine(),
                kernel=platform.release(),
                python=platform.python_version(),
                cpu_count=os.cpu_count(),
            ),
            listen=self.listen,
            models={name: model_status(host, self._entries[name]) for name, host in self._hosts.items()},
            refused=tuple(self._refused),
            cloud={name: endpoint.status(now) for name, endpoint in self._cloud.endpoints.items()},
            power=reading,
            power_reason="not sampled yet" if reading is None else reading.reason,
            mqtt=self._reporter.counts,
            totals=self._metrics.totals(),
            in_flight=self._desk.in_flight,
            in_flight_bytes=self._desk.in_flight_bytes,
            emulate=st.EmulationStatus(slowdown=self.settings.emulate.slowdown),
            events=tuple(self._reporter.recent_events),
        )

    # Putting it together

    def _make_reporter(self) -> Reporter:
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
            options, meter=PowerMeter(self.profile.power), status_body=self._status_body, gauges=self._gauges
        )

    def _profile_mismatch(self) -> str | None:
        """Why the profile isn't this machine's, which is allowed: its estimates and budgets are then another's."""
        match = matches(self.profile, inspect_host())
        return None if match.ok else f"profile '{self.profile.name}' is not this machine ({'; '.join(match.reasons)})"

    def _open(self, entry: BundleEntry) -> Bundle:
        # Digests are the worker's to check, on the files it is about to load; here only what is needed to start it.
        return open_bundle(entry.path, verify=False)

    def _host(self, entry: BundleEntry, bundle: Bundle, *, state_dir: Path | None) -> ModelHost:
        spec = WorkerSpec(
            model=bundle.manifest.name,
            bundle_path=entry.path,
            profile=self.settings.device.profile,
            isolation=self.profile.isolation,
            intra_op_threads=session_options(bundle.manifest.session, self.profile.threads).intra_op_threads,
            slowdown=self.settings.emulate.slowdown,
            state_dir=state_dir,
        )
        around = Surroundings(policy=self.settings.policy, cloud=self._cloud, emit=self._emit, energy=self._energy)
        return ModelHost(spec, bundle, around)

    async def _activate_all(self) -> None:
        """One bundle after the other: their latency promises are measured, and shouldn't disturb each other."""
        last: AiosEdgeError | None = None
        names: list[str] | None = None
        with contextlib.suppress(AiosEdgeError):  # a bundle that can't be opened is refused below, when its turn comes
            names = [self._open(entry).manifest.name for entry in self.settings.bundle]
        if names is not None:
            check_model_maps(self.settings, names)
        for entry in self.settings.bundle:
            try:
                await self._activate(entry)
            except AiosEdgeError as error:
                last = error
                check = RefusedBundle(path=entry.path, error=error).check
                log.error("%s is refused: %s", entry.path, error)
                self._emit("bundle_refused", path=str(entry.path), check=check, detail=str(error))
                self._refused.append(self._refusal(entry, error))
        forget_engines(self.settings.device.state_dir, [host.bundle.bundle_id for host in self._hosts.values()])
        if not any(host.state == "ready" for host in self._hosts.values()):
            raise last if last is not None else _no_bundle()

    def _refusal(self, entry: BundleEntry, error: AiosEdgeError) -> BundleStatus:
        """What is told of a refused bundle: under its model's name, or where that can't be read its directory's."""
        name, version = entry.path.name, ""
        with contextlib.suppress(AiosEdgeError):
            manifest = self._open(entry).manifest
            name, version = manifest.name, manifest.version
        return BundleStatus(model=name, version=version, bundle_id=None, state="refused", detail=str(error))

    async def _activate(self, entry: BundleEntry) -> None:
        bundle = self._open(entry)
        name = bundle.manifest.name
        if name in self._hosts:
            raise _same_name(name, entry.path)
        host = self._host(entry, bundle, state_dir=self.settings.device.state_dir)
        self._hosts[name], self._entries[name] = host, entry
        log.info("%s %s: checking its contract on this device", name, bundle.manifest.version)
        try:
            report = await host.activate()
        except BaseException:
            del self._hosts[name]
            await host.stop()
            raise
        self._cloud.add(ModelShape.of(bundle.manifest))
        latency = None if report.latency_p95_s is None else round(report.latency_p95_s * 1e3, 3)
        self._emit(
            "activated",
            model=name,
            version=report.version,
            bundle_id=report.bundle_id,
            checks=", ".join(check.name for check in report.checks),
            providers=", ".join(report.providers_active),
            load_s=round(report.load_s, 3),
        )
        log.info("%s is live on %s (p95 %s ms)", name, ", ".join(report.providers_active), latency)
        if note := differences(bundle.manifest.session, self.profile.threads):
            log.info("%s %s", name, note)

    def _uvicorn_config(self) -> uvicorn.Config:
        app = HttpApp(self._desk, max_body_bytes=self.settings.http.max_body_bytes, record=self._record)
        return uvicorn.Config(
            app,
            http=DoorProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=1024,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=round(self.settings.policy.drain_s) + 2,  # to tell those who still wait
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
        """A request's share of what the device used above idle while its batch ran."""
        reading = self._reporter.last_reading
        if reading is None:
            return Energy(energy_j=None, method="unknown: power not sampled yet")
        if reading.active_w is None:
            why = reading.active_reason or reading.reason or "no power source"
            return Energy(energy_j=None, method=f"unknown: {why}")
        # The reading is of the last second, not of this batch: however good the sensor, the share is an estimate.
        return Energy(energy_j=reading.active_w * compute_s / max(batch_size, 1), method="estimated")

    def _status_body(self) -> StatusBody:
        bundles = tuple(bundle_status(host) for host in self._hosts.values())
        reasons = [bundle.providers_reason for bundle in bundles if bundle.providers_reason]
        slowdown = self.settings.emulate.slowdown
        return StatusBody(
            agent_version=__version__,
            profile=self.profile.name,
            providers_requested=tuple(provider.name for provider in self.profile.providers),
            providers_active=tuple(dict.fromkeys(name for bundle in bundles for name in bundle.providers_active)),
            providers_reason="; ".join(reasons) or None,
            bundles=(*bundles, *self._refused),
            emulated_slowdown=None if slowdown == 1.0 else slowdown,
        )

    def _gauges(self) -> Gauges:
        workers = {name: host.worker.rss_bytes for name, host in self._hosts.items()}
        return Gauges(
            queue_depth=sum(host.queued for host in self._hosts.values()),
            breakers={name: endpoint.breaker.state for name, endpoint in self._cloud.endpoints.items()},
            agent_rss_bytes=_own_rss_bytes(),
            workers_rss_bytes={name: rss for name, rss in workers.items() if rss is not None},
        )


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the agent's."""
        yield


def _same_name(name: str, path: Path) -> SettingsError:
    return SettingsError(f"two bundles have the model name {name!r}", where=str(path), remedy="Remove one [[bundle]]")


def _no_bundle() -> SettingsError:
    return SettingsError("no bundle is configured", remedy='Add a [[bundle]] with path = "…"')


def _own_rss_bytes(statm: Path = Path("/proc/self/statm")) -> int | None:
    try:
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
