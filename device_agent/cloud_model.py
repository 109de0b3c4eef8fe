"""What is known of one of our models at one endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import quote

from device_agent.cloud_fit import ModelShape
from device_agent.round_trip import RoundTrip
from device_agent.status import CloudModelStatus


@dataclass
class CloudModel:
    """``remote`` is its name[:version] there, ``path`` where it lies below the endpoint's URL."""

    remote: str
    path: str
    shape: ModelShape
    usable: bool = False
    natural: bool = False  # whether it takes the task's natural input
    reason: str | None = "not checked yet"
    versions: tuple[str, ...] = ()  # of which its metadata spoke when it was checked
    answered: str | None = None  # the version that has answered since
    round_trip: RoundTrip = field(default_factory=RoundTrip)

    @staticmethod
    def at(remote: str, shape: ModelShape) -> CloudModel:
        """A model of ours under the name it has there; nothing is known of it yet."""
        name, _, version = remote.partition(":")
        path = f"/v2/models/{quote(name, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
        return CloudModel(remote=remote, path=path, shape=shape)

    def checked(self, versions: tuple[str, ...]) -> None:
        """Its metadata was compared."""
        self.versions, self.answered = versions, None

    def knows(self, version: str | None) -> bool:
        """Whether an answer of that version is one of the model that was checked. Of several versions that the metadata
        spoke of, the one that answered first is meant; a server that tells none is believed."""
        if version is None:
            return True
        if self.answered is None and (not self.versions or version in self.versions):
            self.answered = version
        return version == self.answered

    def status(self, now: float) -> CloudModelStatus:
        """What ``/status`` shows."""
        expected_s, safe_s = self.round_trip.predict(now) if self.round_trip.measured else (None, None)
        return CloudModelStatus(
            remote=self.remote, usable=self.usable, reason=self.reason, expected_s=expected_s, safe_s=safe_s
        )
