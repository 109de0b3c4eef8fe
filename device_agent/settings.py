"""agent.toml -> :class:`Settings`.

Each table of the file is a struct; a field's comment says what it is for. An unknown key is an error that names the
nearest known one, and an option that is promised but not built yet is refused by name: a setting is never ignored.
Paths are relative to the file. Secrets are files.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from aios_edge.errors import SettingsError
from aios_edge.mqtt_options import MqttOptions
from device_agent.cloud_settings import CloudEndpoint, check_endpoints
from device_agent.crew_size import MOST, Workers
from device_agent.tenants import Tenant, check_tenants

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Options of the documented format that this version doesn't have yet: (table, key), key "*" for the whole table.
NOT_AVAILABLE = {
    ("mqtt", "home_assistant"),
    ("commands", "*"),
}
#: Limits that 0 takes away.
_OFF = dict.fromkeys(
    (
        "probation_s",
        "queue_delay_s",
        "quarantine_crashes",
        "shadow_share",
        "canary_share",
        "max_disagreement",
    ),
    (0,),
)
_SHARES = ("min_confidence", "shadow_share", "canary_share", "max_disagreement")  # of everything
_LOOPBACK = ("localhost", "::1")


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """``[device]``: who this is."""

    id: str  # the {device} level of every MQTT topic
    profile: str  # a shipped profile's name, or a file
    group: str = "default"  # the {group} level
    state_dir: Path = Path("state")  # the outbox and everything else that outlives the process
    workers: Workers | None = None  # of each model whose [[bundle]] doesn't say it; none: the profile's threads.workers


class Http(msgspec.Struct, frozen=True, kw_only=True):
    """``[http]``: the doors."""

    bind: str = "127.0.0.1:8080"  # host:port, [v6]:port; port 0 lets the system choose; "" for no TCP
    grpc_bind: str = ""  # the same protocol over gRPC, with the same certificate, limit and keys; "" for none
    unix_socket: Path | None = None  # mode 0660
    tls_cert: Path | None = None  # PEM, with what leads to its authority; of the TCP door
    tls_key: Path | None = None
    max_body_bytes: int = 32 * 1024 * 1024
    receive_timeout_s: float = 60.0  # for a request's head; and its body, as its answer, moves at least 16 KiB in it
    allow_insecure: bool = False  # bind beyond loopback without TLS, or without a tenant that has a key


class Mqtt(msgspec.Struct, frozen=True, kw_only=True):
    """``[mqtt]``: the way home."""

    url: str  # mqtt://host:1883 or mqtts://host:8883
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    protocol: Literal["auto", "5", "3.1.1"] = "auto"  # auto: 5, then 3.1.1 when the broker refuses it
    format: Literal["json"] = "json"
    interval_s: float = 10.0  # length of a telemetry window
    outbox_bytes: int = 16_000_000  # what is kept while the broker is away
    infer: bool = False  # answer inference requests that come through the broker
    infer_tenant: str | None = None  # whose they are, where there are tenants

    def options(self) -> MqttOptions:
        """What the connection needs of it."""
        return MqttOptions(
            url=self.url,
            username=self.username,
            password_file=self.password_file,
            ca=self.ca,
            cert=self.cert,
            key=self.key,
            protocol=self.protocol,
        )


class BundleEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One ``[[bundle]]``: a directory, as ``aios-edge export`` or ``bundle unpack`` wrote it."""

    path: Path
    pinned: bool = False  # never unloaded to make room for others
    weight: float = 1.0  # its share of the cores, beside the other models'; of worker processes
    workers: Workers | None = None  # processes that serve it; auto: as many as have cores for their threads
    max_rss_bytes: int | None = None  # a worker above it is replaced; none: by contract and machine; 0: never
    never_leave_device: bool = False  # no request for this model goes to a cloud, whatever happens here


class Repository(msgspec.Struct, frozen=True, kw_only=True):
    """``[repository]``: raw ONNX models, ``<name>/<version>/model.onnx``, served without a contract."""

    path: Path


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """``[policy]``: limits and habits of admission and routing."""

    queue_limit: int = 256  # requests waiting per model; beyond it: cloud, else 503
    queue_delay_s: float = 10.0  # fewer wait, if those without a deadline would wait longer; 0: as many as that anyway
    max_rows: int = 4096  # of one request; more would keep everyone else waiting
    in_flight_bytes: int = 128 * 1024 * 1024  # request bodies in memory, all models and routes together
    default_deadline_s: float | None = None  # for requests without a timeout; none: they may wait
    breaker_failures: int = 3  # cloud failures in a row until its breaker opens
    breaker_backoff_s: float = 1.0  # first pause before a probe; doubles up to breaker_backoff_max_s
    breaker_backoff_max_s: float = 30.0
    drain_s: float = 20.0  # on SIGTERM queued work has this long
    hedge: bool = False  # ask a second cloud endpoint when the first takes longer than nearly always
    length_bucketing: bool = True  # batches of like lengths, so that padding doesn't cost what batching gains
    batch_timeout_s: float = 60.0  # a batch that takes longer (and 20 times what was predicted) costs its worker
    load_timeout_s: float = 600.0  # a model that isn't loaded and checked by then is refused; TensorRT takes minutes
    quarantine_crashes: int = 8  # in a row until a model is no longer started by itself; 0: never
    quarantine_window_s: float = 300.0  # crashes further apart than this are no row
    quarantine_pause_s: float = 300.0  # until one more try
    probation_s: float = 60.0  # how long a swapped bundle may still have to give its place back; 0: never
    # Before a bundle takes another's place it answers some of that one's requests, copies first; 0: none.
    shadow_share: float = 0.0  # of the requests are answered by it too; its answers are compared and thrown away
    canary_share: float = 0.0  # of the requests are really answered by it
    trial_requests: int = 200  # it answers so many in each of the two, …
    trial_s: float = 60.0  # … or as many as come in that time
    max_disagreement: float | None = None  # of what was compared; none: 0.05, or what both contracts allow
    min_confidence: float | None = None  # a local answer whose top probability is lower is asked of the cloud too
    memory_budget_bytes: int | None = None  # of all models' workers; the least recently used is unloaded for others
    trace: Path | None = None  # a file of what each decision was made by, for aios-edge policy replay
    trace_bytes: int = 16_000_000  # it and the part before it together
    # What may leave goes to a cloud that is in time while one of these is passed; none by default: what this device
    # can answer in time stays, unless somebody wants the device spared.
    max_temperature_c: float | None = None  # of the hottest zone
    avoid_when_throttled: bool = False
    min_battery_percent: float | None = None  # while it discharges
    max_memory_pressure_percent: float | None = None  # some task waited for memory, of the last ten seconds


class Emulate(msgspec.Struct, frozen=True, kw_only=True):
    """``[emulate]``: a weaker device on a strong machine, always named in status."""

    slowdown: float = 1.0  # the worker holds each batch, asleep, for its compute time x slowdown


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the agent is told; see the structs of its tables."""

    device: Device
    http: Http = Http()
    mqtt: Mqtt | None = None
    bundle: tuple[BundleEntry, ...] = ()
    repository: Repository | None = None
    policy: Policy = Policy()
    cloud: tuple[CloudEndpoint, ...] = ()
    tenant: tuple[Tenant, ...] = ()
    emulate: Emulate = Emulate()


_TABLES: dict[str, type[msgspec.Struct]] = {
    "device": Device,
    "http": Http,
    "mqtt": Mqtt,
    "bundle": BundleEntry,
    "repository": Repository,
    "policy": Policy,
    "cloud": CloudEndpoint,
    "tenant": Tenant,
    "emulate": Emulate,
}
_LISTS = ("bundle", "cloud", "tenant")


def load_settings(path: Path | str) -> Settings:
    """Read and check an agent's configuration; raises :class:`SettingsError`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise SettingsError(
            f"can't be read ({reason})", where=str(path), remedy="Check the path given to --config"
        ) from error
    return parse_settings(text, where=str(path), base=path.absolute().parent)


def parse_settings(text: str, *, where: str, base: Path) -> Settings:
    """Settings from TOML text; relative paths start at ``base``. Raises :class:`SettingsError`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"is not valid TOML: {error}", where=where, remedy="Correct the line it names") from error
    for table, content in document.items():
        _check_table(table, content, where)
    try:
        settings = msgspec.convert(document, Settings, dec_hook=lambda kind, value: _path(base, kind, value))
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        key = at.rstrip("`").lstrip(".")
        raise SettingsError(
            message[:1].lower() + message[1:], where=f"{where}: {key}" if key else where, remedy="Correct the value"
        ) from error
    settings = _resolve_profile(settings, base)
    _check_values(settings, where)
    return settings


def split_bind(bind: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` as a pair; raises :class:`ValueError`."""
    host, colon, port = bind.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(bind)
    return host.strip("[]") or "0.0.0.0", int(port)


def _check_table(table: str, content: Any, where: str) -> None:
    if (table, "*") in NOT_AVAILABLE:
        raise _not_available(f"[{table}]", where)
    if table not in _TABLES:
        raise SettingsError(f"unknown table [{table}]", where=where, remedy=_nearest(table, tuple(_TABLES)))
    rows = content if table in _LISTS else [content]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        form = f"[[{table}]]" if table in _LISTS else f"[{table}]"
        raise SettingsError(f"'{table}' must be a table", where=where, remedy=f"Write it as {form}")
    for row in rows:
        for key in row:
            if (table, key) in NOT_AVAILABLE:
                raise _not_available(f"{table}.{key}", where)
            known = _TABLES[table].__struct_fields__
            if key not in known:
                raise SettingsError(f"unknown key '{key}' in [{table}]", where=where, remedy=_nearest(key, known))
    if table == "mqtt" and isinstance(content.get("format"), str) and content["format"] == "sparkplug":
        raise _not_available('mqtt.format = "sparkplug"', where)


def _not_available(what: str, where: str) -> SettingsError:
    return SettingsError(f"{what} is not available in this version", where=where, remedy="Remove it")


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Known here: {', '.join(known)}"


def _path(base: Path, kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return base / value
    raise NotImplementedError(kind)


def _resolve_profile(settings: Settings, base: Path) -> Settings:
    profile = settings.device.profile
    device = settings.device
    if profile.endswith(".toml"):  # a file; a shipped profile is only a name
        device = msgspec.structs.replace(device, profile=str(base / profile))
    if not device.state_dir.is_absolute():  # the default never went through the hook
        device = msgspec.structs.replace(device, state_dir=base / device.state_dir)
    return msgspec.structs.replace(settings, device=device)


def _check_values(settings: Settings, where: str) -> None:
    def fail(key: str, what: str, remedy: str) -> None:
        raise SettingsError(what, where=f"{where}: {key}", remedy=remedy)

    for name in ("id", "group"):
        value = getattr(settings.device, name)
        if not value or any(character in value for character in "+#/\0"):
            fail(
                f"device.{name}",
                f"{value!r} can't be a level of an MQTT topic",
                "Leave out + # / and don't leave it empty",
            )
    for name, bind, example in (("bind", settings.http.bind, 8080), ("grpc_bind", settings.http.grpc_bind, 8081)):
        if not bind:
            continue
        try:
            host, _ = split_bind(bind)
        except ValueError:
            fail(f"http.{name}", f"{bind!r} is not host:port", f"Write for example 127.0.0.1:{example}")
        else:
            missing = _missing_beyond_loopback(settings)
            if missing and not (host in _LOOPBACK or host.startswith("127.")) and not settings.http.allow_insecure:
                fail(
                    f"http.{name}",
                    f"{host} is not loopback, and there is no {' and no '.join(missing)}",
                    "Set tls_cert and tls_key, and a [[tenant]] with a key (aios-edge agent key); or bind 127.0.0.1"
                    " behind a proxy, or set allow_insecure = true if the network is trusted",
                )
    if settings.http.grpc_bind == settings.http.bind != "" and split_bind(settings.http.bind)[1]:
        fail("http.grpc_bind", f"{settings.http.bind} is the HTTP door's address", "Give it a port of its own")
    if not settings.http.bind and settings.http.unix_socket is None:
        fail("http", "neither bind nor unix_socket is set", "Set one of them")
    if (settings.http.tls_cert is None) != (settings.http.tls_key is None):
        fail("http.tls_cert", "a certificate needs its key, and a key its certificate", "Set tls_cert and tls_key")
    if settings.http.tls_cert is not None and not (settings.http.bind or settings.http.grpc_bind):
        fail("http.tls_cert", "there is no TCP door for it; the Unix socket is always plain", "Set http.bind")
    if any((entry.max_rss_bytes or 0) < 0 for entry in settings.bundle):
        fail("bundle.max_rss_bytes", "memory can't be less than nothing", "Give bytes, or 0 for no limit")
    for key, asked in (
        ("device.workers", settings.device.workers),
        *((f"bundle[{index}].workers", entry.workers) for index, entry in enumerate(settings.bundle)),
    ):
        if isinstance(asked, int) and not 1 <= asked <= MOST:
            fail(key, f"{asked} is no number of workers from 1 to {MOST}", 'Correct it, or write "auto"')
    over_mqtt = settings.mqtt.infer_tenant if settings.mqtt and settings.mqtt.infer else None
    unix_socket = settings.http.unix_socket is not None
    check_tenants(settings.tenant, where=where, unix_socket=unix_socket, over_mqtt=over_mqtt)
    if settings.mqtt is not None and (problem := _infer_problem(settings.mqtt, settings.tenant)) is not None:
        fail("mqtt.infer_tenant", *problem)
    positive: tuple[tuple[str, float], ...] = (
        ("http.max_body_bytes", settings.http.max_body_bytes),
        ("http.receive_timeout_s", settings.http.receive_timeout_s),
        ("emulate.slowdown", settings.emulate.slowdown),
        *((f"bundle[{index}].weight", entry.weight) for index, entry in enumerate(settings.bundle)),
        *(
            (f"policy.{name}", value)
            for name in Policy.__struct_fields__
            if isinstance(value := getattr(settings.policy, name), int | float)
            and not isinstance(value, bool)
            and value not in _OFF.get(name, ())
        ),
        *((("mqtt.interval_s", settings.mqtt.interval_s),) if settings.mqtt else ()),
    )
    for key, value in positive:
        if not math.isfinite(value):
            fail(key, f"{value} is not a finite number greater than 0", "Correct the value")
        if not value > 0:
            fail(key, f"{value} must be greater than 0", "Correct the value")
    for name in ("min_battery_percent", "max_memory_pressure_percent"):
        if (getattr(settings.policy, name) or 0.0) > 100.0:
            fail(f"policy.{name}", "a share can't be more than 100 percent", "Give a limit below 100")
    for name in _SHARES:
        if (getattr(settings.policy, name) or 0.0) > 1.0:
            fail(f"policy.{name}", "a probability or share can't be more than 1", "Give a value up to 1")
    if settings.emulate.slowdown < 1:
        fail("emulate.slowdown", "a faster device can't be emulated", "Give a factor of at least 1")
    check_endpoints(settings.cloud, where)
    if settings.mqtt and settings.mqtt.password_file and not settings.mqtt.username:
        fail("mqtt.password_file", "a password needs a username", "Set mqtt.username")


def _infer_problem(mqtt: Mqtt, tenants: tuple[Tenant, ...]) -> tuple[str, str] | None:
    """What is wrong about who asks over MQTT, and the remedy."""
    known = tuple(tenant.id for tenant in tenants)
    if not mqtt.infer:
        return None if mqtt.infer_tenant is None else ("nobody may ask over MQTT", "Set mqtt.infer, or leave it out")
    if mqtt.infer_tenant is None:
        return ("there are tenants, and none of them asks over MQTT", "Name one of them") if tenants else None
    if mqtt.infer_tenant not in known:
        return f"no [[tenant]] has the id '{mqtt.infer_tenant}'", _nearest(mqtt.infer_tenant, known or ("none",))
    return None


def _missing_beyond_loopback(settings: Settings) -> list[str]:
    """What a door that others can reach should have."""
    with_key = any(tenant.key_sha256 is not None for tenant in settings.tenant)
    return [*(["TLS"] if settings.http.tls_cert is None else []), *([] if with_key else ["tenant with a key"])]


def check_model_names(settings: Settings, models: Mapping[str, BundleEntry]) -> None:
    """Every model that a ``[[tenant]]`` names is one of this device, and every local name of a ``[cloud.model_map]`` is
    one that may leave it; raises :class:`SettingsError`."""
    named = [(f"tenant.{tenant.id}.models", name) for tenant in settings.tenant for name in tenant.models or ()]
    named += [(f"cloud.{cloud.name}.model_map", name) for cloud in settings.cloud for name in cloud.model_map]
    for where, name in named:
        if name not in models:
            what = f"no model here is named '{name}'"
            raise SettingsError(what, where=where, remedy=_nearest(name, tuple(models)))
    for cloud in settings.cloud:
        where = f"cloud.{cloud.name}.model_map"
        for name in cloud.model_map:
            if models[name].never_leave_device:
                what = f"'{name}' has never_leave_device, and a name for it there"
                raise SettingsError(what, where=where, remedy="Remove one of the two")


def read_secret(path: Path) -> str:
    """The content of a secret's file, without the newline at its end; raises :class:`SettingsError`."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            "a secret's file can't be read", where=str(path), remedy="Check path and permissions"
        ) from error
