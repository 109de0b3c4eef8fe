"""What differs between two configurations of one agent, and which of that may change while it runs: pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from device_agent.cloud_settings import CloudEndpoint
from device_agent.policy_in_force import AT_START
from device_agent.settings import Policy, Settings

#: Of a [[cloud]], where it was set before and still is: a budget comes and goes with a restart.
LIVE_OF_CLOUD = ("weight", "timeout_s", "requests_per_day", "bytes_per_day", "cost_per_day")

#: Of [device], and of a [[bundle]] that stays where it is.
LIVE_OF_MODELS = ("workers",)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One key. ``live``: it can change without a restart."""

    key: str
    before: str
    after: str
    live: bool = False

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.after}"


def differences(before: Settings, after: Settings) -> tuple[Difference, ...]:
    """In the order of the tables. Tables that can only be taken as a whole (``tenant``, and a ``bundle`` more, less or
    elsewhere) are one key."""
    return tuple(_differences(before, after))


def _differences(before: Settings, after: Settings) -> Iterator[Difference]:
    for table in Settings.__struct_fields__:
        old, new = getattr(before, table), getattr(after, table)
        if old == new:
            continue
        if table == "policy":
            live = tuple(name for name in Policy.__struct_fields__ if name not in AT_START)
            yield from _of_struct(table, old, new, live)
        elif table == "cloud" and [one.name for one in old] == [one.name for one in new]:
            yield from _of_clouds({one.name: one for one in old}, {one.name: one for one in new})
        elif table == "bundle" and [one.path for one in old] == [one.path for one in new]:
            for index, (mine, other) in enumerate(zip(old, new, strict=True)):
                yield from _of_struct(f"bundle[{index}]", mine, other, LIVE_OF_MODELS)
        elif table == "device":
            yield from _of_struct(table, old, new, LIVE_OF_MODELS)
        elif isinstance(old, msgspec.Struct) and isinstance(new, msgspec.Struct):
            yield from _of_struct(table, old, new, ())
        else:
            yield Difference(key=table, before=_amount(old), after=_amount(new))


def _of_clouds(before: Mapping[str, CloudEndpoint], after: Mapping[str, CloudEndpoint]) -> Iterator[Difference]:
    for name, old in before.items():
        new = after[name]
        live = tuple(key for key in LIVE_OF_CLOUD if None not in (getattr(old, key), getattr(new, key)))
        yield from _of_struct(f"cloud.{name}", old, new, live)


def _of_struct(
    table: str, before: msgspec.Struct, after: msgspec.Struct, live: tuple[str, ...]
) -> Iterator[Difference]:
    for name in before.__struct_fields__:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield Difference(key=f"{table}.{name}", before=_shown(old), after=_shown(new), live=name in live)


def _amount(table: object) -> str:
    return f"{len(table)} entries" if isinstance(table, tuple) else "none" if table is None else "a table"


def _shown(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
