"""``aios-edge power``: every power, energy and thermal source of this device, and the board's total."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from aios_edge.profile import Power, PowerEstimate

if TYPE_CHECKING:
    from device_agent.power.reading import PowerReading

#: Between the two samples that turn counters and CPU time into watts, on this machine.
_HERE_S = 0.5


@click.command()
@click.option(
    "--sys-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Read a captured /sys instead of this machine's; nothing is then estimated from this machine.",
)
@click.option(
    "--proc-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Read a captured /proc instead of this machine's.",
)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0, max=3600),
    metavar="SECONDS",
    help="Take two samples this far apart: energy counters become watts. Default: 0.5 on this machine, 0 (one "
    "sample) with --sys-root.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def power(sys_root: Path | None, proc_root: Path | None, interval_s: float | None, as_json: bool) -> None:
    """Show every power, energy and thermal source, its rails, the board total and how it was obtained."""
    from device_agent.power.meter import ALL_SOURCES, PROC, SYS, PowerMeter

    here = sys_root is None and proc_root is None
    wait_s = (_HERE_S if here else 0.0) if interval_s is None else interval_s
    model = estimate_of_this_machine() if here else None
    meter = PowerMeter(Power(sources=ALL_SOURCES, estimate=model), sys_root or SYS, proc_root or PROC)
    reading = meter.sample()
    if wait_s > 0:
        time.sleep(wait_s)
        reading = meter.sample()
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(reading), ensure_ascii=False, indent=2))
    else:
        _show(reading)


def estimate_of_this_machine() -> PowerEstimate | None:
    """The coefficients of the profile that matches best; None when none does, which the reading then says."""
    from aios_edge.errors import AiosEdgeError
    from aios_edge.host import inspect_host
    from aios_edge.profile_detect import detect
    from aios_edge.profile_files import load_profile, shipped_profiles

    try:
        profiles = {name: load_profile(name) for name in shipped_profiles()}
        found = detect(inspect_host(), profiles.values()).name
    except (AiosEdgeError, OSError):
        return None
    return profiles[found].power.estimate if found in profiles else None


def _show(reading: PowerReading) -> None:
    total = "unknown" if reading.total_w is None else f"{reading.total_w:.3f} W ({reading.total_method})"
    click.echo(f"Total     {total}")
    if reading.total_source:
        click.echo(f"  source  {reading.total_source}")
    if reading.reason:
        click.echo(f"  reason  {reading.reason}")
    for rail in reading.rails:
        click.echo(f"Rail      {rail.name:<24} {rail.power_w:9.3f} W   {rail.source}")
    for counter in reading.energy:
        click.echo(f"Energy    {counter.name:<24} {counter.energy_j:9.1f} J   {counter.source}")
    for zone in reading.thermal:
        click.echo(f"Thermal   {zone.name:<24} {zone.temperature_c:9.1f} °C")
    if reading.throttled is None:
        click.echo(f"Throttled unknown: {reading.throttled_reason}")
    else:
        flags = f" ({', '.join(reading.throttled_flags)})" if reading.throttled_flags else ""
        click.echo(f"Throttled {'yes' if reading.throttled else 'no'}{flags}")
    if reading.cpu_utilisation is not None:
        click.echo(f"CPU       {reading.cpu_utilisation:.0%} busy")
    if reading.battery is not None:
        spent = {True: "discharging", False: "not discharging", None: "nobody says whether it discharges"}
        click.echo(f"Battery   {reading.battery.percent:.0f} % ({spent[reading.battery.discharging]})")
    if reading.memory_pressure_percent is not None:
        click.echo(f"Memory    {reading.memory_pressure_percent:.1f} % of the last 10 s some task waited for it")
    for gap in reading.skipped:
        click.echo(f"Skipped   {gap.path}: {gap.reason}")
