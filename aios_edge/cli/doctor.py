"""``aios-edge doctor``: what this machine has, and what to do about each gap."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import msgspec

from aios_edge.cli.agent import DEFAULT_URL

if TYPE_CHECKING:
    from aios_edge.profile_detect import Detection
    from aios_edge.telemetry import ProviderStep

State = Literal["ok", "gap", "missing"]
_MARK = {"ok": "ok     ", "gap": "gap    ", "missing": "MISSING"}
_BROKER_PORT = 1883
_LEAST_DISK_BYTES = 1_000_000_000
_LEAST_MEMORY_BYTES = 400_000_000

#: Distribution, module, the extra that brings it, what it is for. Looked up, never imported: torch takes seconds.
_OPTIONAL = (
    ("onnxruntime", "onnxruntime", "cpu", "running models"),
    ("tokenizers", "tokenizers", "text", "text models"),
    ("grpcio", "grpc", "grpc", "the agent's gRPC door"),
    ("torch", "torch", "export", "aios-edge export"),
    ("transformers", "transformers", "export", "aios-edge export"),
    ("optimum", "optimum", "export", "aios-edge export"),
    ("onnx", "onnx", "export", "aios-edge export"),
    ("amqtt", "amqtt", "demo", "the demo where mosquitto isn't installed"),
)
_PROVIDER = "Check that provider's driver, its libraries and the installed build of onnxruntime"
_REQUIRED = ("numpy", "paho-mqtt", "msgspec", "uvicorn", "httptools", "click")


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. ``missing``: the agent can't work without it; ``gap``: something else can't."""

    name: str
    state: State
    detail: str
    remedy: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def doctor(as_json: bool) -> int:
    """Say what this machine has (Python, providers, power and thermal sources, broker, disk) and how to close gaps."""
    checks: list[Check] = []
    for look in (_python, _packages, _extras, _providers, _profile, _power, _broker, _disk, _memory, _agent):
        checks.extend(_safely(look))
    ok = all(check.state != "missing" for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": ok, "checks": msgspec.to_builtins(checks)}, ensure_ascii=False, indent=2))
    else:
        for check in checks:
            click.echo(f"{_MARK[check.state]}  {check.name:<14} {check.detail}")
            if check.remedy:
                click.echo(f"{'':9}{'':<14} -> {check.remedy}")
    return 0 if ok else 1


def _safely(look: Callable[[], list[Check]]) -> list[Check]:
    """A check that breaks is itself a finding: this command is for machines on which things are broken."""
    try:
        return look()
    except Exception as error:
        name = look.__name__.strip("_")
        return [
            Check(
                name=name,
                state="gap",
                detail=f"could not be checked: {type(error).__name__}: {error}",
                remedy="Report it, with this line",
            )
        ]


def _python() -> list[Check]:
    new_enough = sys.version_info >= (3, 10)
    detail = f"{platform.python_version()} on {platform.machine()}, {platform.system()}"
    remedy = None if new_enough else "Install Python 3.10 or newer"
    return [Check(name="python", state="ok" if new_enough else "missing", detail=detail, remedy=remedy)]


def _packages() -> list[Check]:
    absent = [name for name in _REQUIRED if _version(name) is None]
    if absent:
        detail, remedy = f"not installed: {', '.join(absent)}", "Reinstall with: pip install aios-edge"
        return [Check(name="packages", state="missing", detail=detail, remedy=remedy)]
    return [Check(name="packages", state="ok", detail=", ".join(f"{name} {_version(name)}" for name in _REQUIRED))]


def _extras() -> list[Check]:
    checks = []
    for name, module, extra, purpose in _OPTIONAL:
        if importlib.util.find_spec(module) is not None:
            # NVIDIA's wheels are called otherwise (onnxruntime-gpu), so the module counts, not the distribution.
            detail = _version(name) or _version(f"{name}-gpu") or "installed"
            checks.append(Check(name=name, state="ok", detail=f"{detail} ({purpose})"))
            continue
        if name == "amqtt" and shutil.which("mosquitto", path=_search_path()):
            continue
        remedy = f"pip install 'aios-edge[{extra}]'"
        if name == "onnxruntime":
            remedy += " (on a Jetson: NVIDIA's wheel for its JetPack instead)"
        state: State = "missing" if name == "onnxruntime" else "gap"
        checks.append(Check(name=name, state=state, detail=f"not installed; needed for {purpose}", remedy=remedy))
    return checks


def _providers() -> list[Check]:
    """What really runs: a provider's name in onnxruntime's list proves nothing, so a tiny model runs instead."""
    if importlib.util.find_spec("onnxruntime") is None:
        return []  # said already
    from aios_edge.errors import AiosEdgeError
    from aios_edge.manifest import SessionSpec
    from aios_edge.profile_files import load_profile
    from device_agent.runtime import Runtime, accelerators
    from device_agent.tiny_model import identity

    checks = [_accelerator(step) for step in accelerators()]
    # The chain of this machine's profile, and the CPU's, on which everything falls back.
    for name in dict.fromkeys((_detected().name or "cloud-cpu", "cloud-cpu")):
        profile = load_profile(name)
        try:
            with tempfile.TemporaryDirectory() as directory:
                model = Path(directory) / "identity.onnx"
                model.write_bytes(identity())
                runtime = Runtime(model, SessionSpec(), profile)
        except AiosEdgeError as error:
            checks.append(Check(name="providers", state="gap", detail=f"{name}: {error.what}", remedy=error.remedy))
            continue
        active = ", ".join(_short(each) for each in runtime.providers_active)
        checks.append(Check(name="providers", state="ok", detail=f"a tiny model loads on {active} (profile {name})"))
        checks += [
            Check(name="providers", state="gap", detail=f"{_short(step.name)} {step.reason}", remedy=_PROVIDER)
            for step in runtime.steps
            if not step.active
        ]
    return checks


def _accelerator(step: ProviderStep) -> Check:
    if step.active:
        return Check(name="onnxruntime", state="ok", detail=f"its {_short(step.name)} starts here")
    remedy = f"{_PROVIDER}. Without such hardware there is nothing to do: the CPU serves"
    return Check(name="onnxruntime", state="gap", detail=f"its {_short(step.name)} {step.reason}", remedy=remedy)


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def _profile() -> list[Check]:
    from aios_edge.host import describe, inspect_host

    found = _detected()
    machine = Check(name="machine", state="ok", detail=describe(inspect_host()))
    if found.name is None:
        remedy = "Write a profile of your own: see profiles/README.md"
        return [machine, Check(name="profile", state="gap", detail="no shipped profile matches", remedy=remedy)]
    return [machine, Check(name="profile", state="ok", detail=f"{found.name} ({', '.join(found.why)})")]


def _detected() -> Detection:
    from aios_edge.host import inspect_host
    from aios_edge.profile_detect import detect
    from aios_edge.profile_files import load_profile, shipped_profiles

    return detect(inspect_host(), [load_profile(name) for name in shipped_profiles()])


def _power() -> list[Check]:
    from aios_edge.cli.power import estimate_of_this_machine
    from aios_edge.profile import Power
    from device_agent.power.meter import ALL_SOURCES, PowerMeter

    meter = PowerMeter(Power(sources=ALL_SOURCES, estimate=estimate_of_this_machine()))
    meter.sample()
    time.sleep(0.2)  # counters and CPU time need two samples
    reading = meter.sample()
    if reading.total_w is None:
        remedy = "Without a figure, energy is reported as not measured; see `aios-edge power`"
        power = Check(name="power", state="gap", detail=f"unknown: {reading.reason}", remedy=remedy)
    elif reading.total_method == "estimated":
        remedy = "No sensor can be read here; `aios-edge power` lists what was skipped and why"
        detail = f"{reading.total_w:.1f} W, estimated from {reading.total_source}"
        power = Check(name="power", state="gap", detail=detail, remedy=remedy)
    else:
        detail = f"{reading.total_w:.1f} W, {reading.total_method}, {reading.total_source}"
        power = Check(name="power", state="ok", detail=detail)
    zones = ", ".join(f"{zone.name} {zone.temperature_c:.0f} °C" for zone in reading.thermal)
    if zones:
        return [power, Check(name="thermal", state="ok", detail=zones)]
    remedy = "Normal in a virtual machine; on a device check the kernel's thermal drivers"
    return [power, Check(name="thermal", state="gap", detail="no readable thermal zone", remedy=remedy)]


def _broker() -> list[Check]:
    path = shutil.which("mosquitto", path=_search_path())
    if path:
        installed = Check(name="mosquitto", state="ok", detail=path)
    else:
        remedy = "apt install mosquitto (the demo can use the package amqtt instead)"
        installed = Check(name="mosquitto", state="gap", detail="not installed", remedy=remedy)
    try:
        socket.create_connection(("localhost", _BROKER_PORT), timeout=1.0).close()
    except OSError as error:
        detail = f"none on localhost:{_BROKER_PORT} ({error.strerror or error})"
        remedy = "Only needed to report over MQTT: start one, or name yours as mqtt.url in the agent's configuration"
        return [installed, Check(name="broker", state="gap", detail=detail, remedy=remedy)]
    return [installed, Check(name="broker", state="ok", detail=f"something listens on localhost:{_BROKER_PORT}")]


def _disk() -> list[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 1e9:.1f} GB free in {Path.cwd()}"
    if free >= _LEAST_DISK_BYTES:
        return [Check(name="disk", state="ok", detail=detail)]
    remedy = f"Free some space: exports and the demo want {_LEAST_DISK_BYTES / 1e9:.0f} GB"
    return [Check(name="disk", state="gap", detail=detail, remedy=remedy)]


def _memory() -> list[Check]:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("utf-8").splitlines() if ":" in line)
    total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    detail = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB available"
    if free >= _LEAST_MEMORY_BYTES:
        return [Check(name="memory", state="ok", detail=detail)]
    return [Check(name="memory", state="gap", detail=detail, remedy="A small text model wants about 0.2 GB")]


def _agent(url: str = DEFAULT_URL) -> list[Check]:
    from aios_edge.client import Client, HttpError
    from aios_edge.errors import AiosEdgeError

    try:
        status = Client(url, timeout_s=2.0).status()
    except HttpError as error:
        detail = "runs, and wants a key" if error.status == 401 else f"something else answers: {error.what}"
        return [Check(name="agent", state="ok", detail=f"{url}: {detail}")]
    except AiosEdgeError as error:
        return [Check(name="agent", state="ok", detail=f"none on {url} ({error.what})")]
    door = status.get("grpc")
    grpc = "no gRPC" if door is None else f"gRPC {'serving' if door['serving'] else 'not serving'}"
    doors = ", ".join(status.get("listen", (url,)))
    return [Check(name="agent", state="ok", detail=f"{status.get('state')} on {doors}; {grpc}")]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _search_path() -> str:
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
