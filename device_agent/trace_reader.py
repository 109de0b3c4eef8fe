"""Reads a trace, and the policy it is to be replayed under."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from aios_edge.errors import SettingsError
from device_agent.settings import Policy, load_settings, parse_settings
from device_agent.trace import TRACE_VERSION, Began, Line

_decoder = msgspec.json.Decoder(Line)
#: What a file with nothing but a policy lacks to be an agent.toml.
_NOBODY = '\n[device]\nid = "nobody"\nprofile = "none"\n'


class TraceLines:
    """The lines of a file, one after the other; ``torn``: those that were cut off when their agent was killed."""

    def __init__(self, path: Path) -> None:
        self.torn = 0
        self._path = path

    def __iter__(self) -> Iterator[Line]:
        """Raises :class:`SettingsError` for a file that is no trace, or of a newer version."""
        try:
            with self._path.open("rb") as file:
                for number, text in enumerate(file, start=1):
                    line = self._decoded(text, number)
                    if line is not None:
                        yield line
        except OSError as error:
            raise SettingsError(
                f"can't be read ({error.strerror})", where=str(self._path), remedy="Check the path"
            ) from error

    def _decoded(self, text: bytes, number: int) -> Line | None:
        where = f"{self._path}:{number}"
        try:
            line: Line = _decoder.decode(text)
        except msgspec.ValidationError as error:
            raise SettingsError(
                f"is no line of a trace: {error}", where=where, remedy="Give a file that policy.trace named"
            ) from error
        except (msgspec.DecodeError, UnicodeDecodeError):
            if number == 1:
                raise SettingsError(
                    "is no trace", where=str(self._path), remedy="Give a file that policy.trace named"
                ) from None
            self.torn += 1
            return None
        if isinstance(line, Began) and line.version != TRACE_VERSION:
            raise SettingsError(
                f"is of version {line.version}, this is for {TRACE_VERSION}",
                where=where,
                remedy=f"Replay it with aios-edge {line.agent_version}",
            )
        return line


def load_policy(path: Path) -> Policy:
    """The ``[policy]`` of an agent.toml, or of a file that has nothing else; raises :class:`SettingsError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return load_settings(path).policy  # which says what is wrong
    if any(line.strip().startswith("[device]") for line in text.splitlines()):
        return load_settings(path).policy
    return parse_settings(text + _NOBODY, where=str(path), base=path.absolute().parent).policy
