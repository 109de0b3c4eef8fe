"""Who may ask for what: ``[[tenant]]``, checked, and the decisions about a caller. Pure.

A tenant is known by the key it sends (``Authorization: Bearer``), of which only the SHA-256 is kept, or on the Unix
socket by the user id of its process, which the kernel tells. The hash is a fast one, so the key must be random:
``aios-edge agent key`` makes one of 256 bits. Nothing here, and no message anywhere, repeats a key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from aios_edge.errors import SettingsError

_SCHEME = b"bearer"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it names a file
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """One ``[[tenant]]``."""

    id: str  # in metrics, and the name of its audit file
    key_sha256: str | None = None  # hex; aios-edge agent key makes key and line
    unix_uids: tuple[int, ...] = ()  # users whose processes on the Unix socket need no key
    models: tuple[str, ...] | None = None  # none: all of them
    requests_per_s: float | None = None  # whatever they ask; none: no limit
    burst: int | None = None  # at once, after a pause; none: a second's worth
    bytes_per_day: int | None = None  # of request bodies, in any 24 hours; none: no limit
    weight: float = 1.0  # its share of a model, beside the other tenants'
    priority_ceiling: int | None = None  # the highest it may claim: 1 is the highest of all, 0 the lowest
    admin: bool = False  # sees every model, all metrics and the whole status
    audit_bytes: int = 10_000_000  # of its audit on disk, the older half of it in a second file
    capture_dir: Path | None = None  # a folder of requests with their answers, to be labelled; none: nothing is kept
    capture_share: float = 1.0  # of those that are answered
    capture_bytes: int = 100_000_000  # of disk, then the oldest go
    capture_local_only: bool = False  # also what must not leave the device

    def sees(self, model: str) -> bool:
        """Whether that model exists for it."""
        return self.models is None or model in self.models

    def priority(self, asked: int) -> int:
        """What of a claimed priority it gets; 1 comes first and 0 last."""
        if self.priority_ceiling is None or asked == 0:
            return asked
        return 0 if self.priority_ceiling == 0 else max(asked, self.priority_ceiling)


def identify(tenants: Iterable[Tenant], authorization: Sequence[bytes], uid: int | None) -> Tenant | None:
    """Whose request this is; None: nobody's here.

    ``authorization``: the values of that header. A key that is sent decides, even where the user id ``uid`` of the
    process at the other end would have done.
    """
    if not authorization:
        return next((tenant for tenant in tenants if uid in tenant.unix_uids), None)
    scheme, _, key = authorization[0].partition(b" ")
    if len(authorization) > 1 or scheme.lower() != _SCHEME:
        return None
    digest = _sha256(key.strip())
    found: Tenant | None = None
    for tenant in tenants:  # all of them, so that the time doesn't tell which was near
        if tenant.key_sha256 is not None and hmac.compare_digest(tenant.key_sha256, digest):
            found = tenant
    return found


def new_key() -> str:
    """A random key; its beginning lets people and scanners know what it is."""
    return f"aios_{secrets.token_urlsafe(32)}"


def key_sha256(key: str) -> str:
    """What agent.toml keeps of a key."""
    return _sha256(key.encode())


def check_tenants(tenants: Sequence[Tenant], *, where: str, unix_socket: bool, over_mqtt: str | None = None) -> None:
    """Raise :class:`SettingsError` for what contradicts itself; ``unix_socket``: whether there is one; ``over_mqtt``:
    who asks over MQTT, which takes no key."""
    for index, tenant in enumerate(tenants):
        problem = _problem(tenant, tenants[:index], unix_socket=unix_socket, over_mqtt=over_mqtt)
        if problem is not None:
            key, what, remedy = problem
            raise SettingsError(what, where=f"{where}: tenant[{index}].{key}", remedy=remedy)


def _problem(
    tenant: Tenant, before: Sequence[Tenant], *, unix_socket: bool, over_mqtt: str | None
) -> tuple[str, str, str] | None:
    """Key, what is wrong with it, and the remedy."""
    others = [other.id.lower() for other in before]  # some file systems take A and a for one
    uids = {uid for other in before for uid in other.unix_uids}
    limits = {"requests_per_s", "burst", "bytes_per_day", "audit_bytes", "weight", "capture_share", "capture_bytes"}
    not_positive = [name for name in sorted(limits) if (value := getattr(tenant, name)) is not None and not value > 0]
    if not _ID.fullmatch(tenant.id):
        return "id", f"{tenant.id!r} can't name a file", "Use up to 64 letters, digits, - _ ."
    if tenant.id.lower() in others:
        return "id", f"{tenant.id!r} appears twice", "Give each [[tenant]] its own id"
    if tenant.key_sha256 is None and not tenant.unix_uids and tenant.id != over_mqtt:
        return "key_sha256", "nobody could ever be this tenant", "Make a key with: aios-edge agent key"
    if tenant.key_sha256 is not None and not _SHA256.fullmatch(tenant.key_sha256):  # it may be the key: don't repeat it
        return "key_sha256", "is not the SHA-256 of a key in 64 hex digits", "Take it from: aios-edge agent key"
    if tenant.key_sha256 is not None and tenant.key_sha256 in [other.key_sha256 for other in before]:
        return "key_sha256", "is another tenant's key", "Make each its own with: aios-edge agent key"
    if tenant.unix_uids and not unix_socket:
        return "unix_uids", "there is no Unix socket", "Set http.unix_socket, or leave unix_uids out"
    if any(uid < 0 for uid in tenant.unix_uids) or uids.intersection(tenant.unix_uids):
        return "unix_uids", "is negative or another tenant's", "Give each user id to one tenant"
    if not_positive:
        return not_positive[0], "must be greater than 0", "Correct the value, or leave it out for no limit"
    if tenant.weight == float("inf"):
        return "weight", "is not a finite number", "Give the other tenants less"
    if tenant.requests_per_s == float("inf"):
        return "requests_per_s", "is not a finite number", "Leave it out for no limit"
    if tenant.capture_share > 1:
        return "capture_share", "a share can't be more than 1", "Give a value up to 1"
    if tenant.capture_dir is None and tenant.capture_local_only:
        return "capture_local_only", "nothing is captured", "Set capture_dir"
    if tenant.capture_dir is not None and tenant.capture_dir in [other.capture_dir for other in before]:
        return "capture_dir", "is another tenant's", "Give each a folder of its own"
    if tenant.burst is not None and tenant.requests_per_s is None:
        return "burst", "there is no rate it could exceed", "Set requests_per_s"
    if tenant.priority_ceiling is not None and tenant.priority_ceiling < 0:
        return "priority_ceiling", "is no priority", "1 is the highest, 0 the lowest"
    if tenant.admin and tenant.models is not None:
        return "models", "an admin sees every model", "Leave out admin or models"
    return None


def _sha256(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
