"""Topic names under ``aios/v1/{group}/{device}/``."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from aios_edge.errors import SettingsError

ROOT = "aios/v1"


@dataclass(frozen=True)
class Topics:
    """The topics of one device. Raises :class:`SettingsError` for a group or device that can't be a topic level."""

    group: str
    device: str

    def __post_init__(self) -> None:
        _level("device.group", self.group)
        _level("device.id", self.device)

    @property
    def base(self) -> str:
        """What every topic of this device starts with, without a slash at the end."""
        return f"{ROOT}/{self.group}/{self.device}"

    @property
    def status(self) -> str:
        """Retained, and the will's."""
        return f"{self.base}/status"

    @property
    def telemetry(self) -> str:
        """One message per window."""
        return f"{self.base}/telemetry"

    @property
    def event(self) -> str:
        """What happened, as it happens."""
        return f"{self.base}/event"

    @property
    def infer_filter(self) -> str:
        """Where inference is asked for, of any model. The answers' own topics are a level further down."""
        return f"{self.base}/infer/+"

    def infer(self, model: str) -> str:
        """Where inference of that model is asked for. What a level can't hold is percent-encoded, as in an URL."""
        return f"{self.base}/infer/{quote(model, safe='')}"

    def model(self, topic: str) -> str:
        """The model that is asked for at a topic of :attr:`infer_filter`."""
        return unquote(topic.rpartition("/")[2])


def _level(where: str, name: str) -> None:
    bad = sorted({char for char in name if char in "+/#" or not char.isprintable()})
    if not name.strip():
        raise SettingsError("is empty", where=where, remedy="Give it a name: it becomes a level of the MQTT topics")
    if bad or len(name.encode()) > 128:
        why = f"has {', '.join(map(repr, bad))}" if bad else "is longer than 128 bytes"
        raise SettingsError(
            f"'{name[:40]}' {why} and can't be a level of an MQTT topic",
            where=where,
            remedy="Use letters, digits, '-', '_' and '.'",
        )
