"""``aios-edge policy``: what another routing policy would have done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

if TYPE_CHECKING:
    from device_agent.replay import Replay

_file = click.Path(dir_okay=False, path_type=Path)


@click.group()
def policy() -> None:
    """Routing policies: the [policy] table of an agent's configuration."""


@policy.command()
@click.argument("trace", type=_file)
@click.option(
    "--policy",
    "policy_path",
    type=_file,
    required=True,
    help="A TOML file with a [policy] table: an agent.toml, or that table alone.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def replay(trace: Path, policy_path: Path, as_json: bool) -> None:
    """Decide every request of TRACE again under another policy.

    TRACE is what an agent wrote with policy.trace. Queue, forecasts, clouds and the device are those of the recording:
    what the other policy would have changed of them isn't known.
    """
    from device_agent.policy_in_force import policy_digest
    from device_agent.replay import replay as decide_again
    from device_agent.trace_reader import TraceLines, load_policy

    rules, lines = load_policy(policy_path), TraceLines(trace)
    found = decide_again(lines, rules)
    if as_json:
        document = {**msgspec.to_builtins(found), "torn_lines": lines.torn, "policy": policy_digest(rules)}
        click.echo(msgspec.json.encode(document).decode())
        return
    for text in _told(found, lines.torn):
        click.echo(text)


def _told(found: Replay, torn: int) -> Iterator[str]:
    yield f"{found.requests} requests in {found.span_s:.1f} s" + (f", {torn} lines are torn" if torn else "")
    for under in found.policies:
        if under.digest is not None:
            yield f"{under.requests} recorded under policy {under.digest}"
    before = {(each.route, each.reason): each.count for each in found.recorded}
    after = {(each.route, each.reason): each.count for each in found.replayed}
    yield f"{'':<28}{'recorded':>10}{'replayed':>10}"
    for key in sorted(before.keys() | after.keys()):
        yield f"{' '.join(key):<28}{before.get(key, 0):>10}{after.get(key, 0):>10}"
    yield f"{sum(move.count for move in found.moved)} would have been decided otherwise"
    for move in found.moved:
        old, new = move.recorded, move.replayed
        yield f"{move.count:>8}  {old.route} {old.reason} -> {new.route} {new.reason}"
    if found.unsure_unknown:
        yield f"{found.unsure_unknown} would have been answered here, how surely is not known"
