"""``[[cloud]]`` of agent.toml."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from aios_edge.errors import SettingsError


class CloudEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One ``[[cloud]]``: any Open Inference Protocol v2 server."""

    name: str
    url: str
    model_map: dict[str, str] = {}  # local = "remote[:version]"; a model that isn't listed keeps its name
    bearer_file: Path | None = None  # sent as Authorization: Bearer
    ca: Path | None = None
    timeout_s: float = 10.0  # of one request; its deadline may be sooner
    client_cert: Path | None = None  # PEM, for servers that ask who we are; its key may be in it
    client_key: Path | None = None
    compression: Literal["none", "gzip"] = "none"  # of request bodies, where that pays
    weight: float = 1.0  # its share of the requests for which several endpoints are in time; 0: a spare
    requests_per_day: int | None = None  # in any 24 hours
    bytes_per_day: int | None = None  # bodies of requests and answers
    cost_per_request: float = 0.0  # in the user's unit
    cost_per_day: float | None = None


def check_endpoints(endpoints: tuple[CloudEndpoint, ...], where: str) -> None:
    """Raises :class:`SettingsError` for values that can't be meant."""
    names = [endpoint.name for endpoint in endpoints]
    for endpoint in endpoints:
        if names.count(endpoint.name) > 1:
            raise SettingsError(
                f"{endpoint.name!r} appears twice",
                where=f"{where}: cloud.name",
                remedy="Give each [[cloud]] its own name",
            )
        _check(endpoint, f"{where}: cloud.{endpoint.name}")


def _check(endpoint: CloudEndpoint, where: str) -> None:
    if not _is_http_url(endpoint.url):
        raise SettingsError(
            f"{endpoint.url!r} is not an http(s) URL", where=f"{where}.url", remedy="Write http://host:port"
        )
    if endpoint.client_key is not None and endpoint.client_cert is None:
        raise SettingsError("a key needs a certificate", where=f"{where}.client_key", remedy="Set client_cert")
    if endpoint.client_cert is not None and not endpoint.url.startswith("https:"):
        what = f"{endpoint.url} is no https URL, so no certificate is shown there"
        raise SettingsError(what, where=f"{where}.client_cert", remedy="Write https://…, or remove it")
    for key in ("timeout_s", "requests_per_day", "bytes_per_day", "cost_per_day"):
        value = getattr(endpoint, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            what = "must be greater than 0" if math.isfinite(value) else "is not a finite number greater than 0"
            raise SettingsError(f"{value} {what}", where=f"{where}.{key}", remedy="Correct the value")
    for key in ("weight", "cost_per_request"):
        value = getattr(endpoint, key)
        if not (math.isfinite(value) and value >= 0):
            what = f"{value} is not a finite number of at least 0"
            raise SettingsError(what, where=f"{where}.{key}", remedy="Correct the value")
    if endpoint.cost_per_day is not None and not endpoint.cost_per_request:
        raise SettingsError(
            "nothing costs anything", where=f"{where}.cost_per_day", remedy="Set cost_per_request as well"
        )


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        return False
