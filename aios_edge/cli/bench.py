"""``aios-edge bench``: latency, throughput, memory and energy of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from aios_edge.cli.refusal import refusal_as_json

if TYPE_CHECKING:
    from device_agent.bench import BenchResult


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--profile", "profile_name", help="Device profile, by name or file; default: the bundle's own.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Another bundle, usually the fp32 candidate, run in turn with this one: gives the speed-up.",
)
@click.option("--duration", "duration_s", type=click.FloatRange(min=0.1), default=10.0, show_default=True, metavar="S")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def bench(bundle: Path, profile_name: str | None, against: Path | None, duration_s: float, as_json: bool) -> None:
    """Measure a BUNDLE on this machine, with method and spread.

    --duration is the time for all input shapes together; energy takes longer where a counter exists. What --json
    prints on a device can be given to 'aios-edge export --measured' on the workstation.
    """
    from device_agent.bench import bench as measure

    with refusal_as_json(as_json):
        result = measure(
            bundle,
            profile_name=profile_name,
            against=against,
            duration_s=duration_s,
            on_progress=lambda text: click.echo(text, err=True),
        )
    if as_json:
        click.echo(msgspec.json.encode(result, order="deterministic").decode())
        return
    for line in _lines(result):
        click.echo(line)


def _lines(result: BenchResult) -> list[str]:
    """The result for a person."""
    latency, where = result.latency_s, result.measured_on
    low, high = result.spread.p50_s
    rss = f"{result.rss_bytes / 1e6:.0f} MB" if result.rss_bytes else f"unknown ({result.rss_reason})"
    joule = result.energy_j_per_inference
    energy = f"{joule:.3g} J ({result.energy.method})" if joule is not None else f"unknown ({result.energy.reason})"
    lines = [
        f"bundle      {result.bundle}",
        f"candidate   {result.candidate} ({result.precision})"
        + (", for measuring only" if result.purpose == "measure" else ""),
        f"profile     {result.profile}, {'this machine' if where.matches_profile else 'NOT this machine'}"
        f" ({'; '.join(where.reasons)})",
        f"ran on      {', '.join(result.providers_active)}, {result.threads} thread(s)"
        + (f"; {result.provider_reason}" if result.provider_reason else ""),
        f"latency     p50 {latency.p50 * 1e3:.2f}  p95 {latency.p95 * 1e3:.2f}  p99 {latency.p99 * 1e3:.2f} ms"
        f"  at {result.batch} x {result.length} (p50 of {result.spread.repeats} repeats:"
        f" {low * 1e3:.2f} to {high * 1e3:.2f})",
        f"speed-up    {_compared(result)}",
        f"throughput  {result.throughput_per_s:.1f} /s at batch {result.throughput_batch}",
        f"memory      {rss}",
        f"energy      {energy} per inference",
        "",
        "batch  length  p50 ms  p95 ms      /s",
    ]
    lines += [
        f"{shape.batch:5}  {shape.length:6}  {shape.latency_s.p50 * 1e3:6.2f}  {shape.latency_s.p95 * 1e3:6.2f}"
        f"  {shape.throughput_per_s:6.1f}"
        for shape in result.shapes
    ]
    return [*lines, "", f"method: {result.method}"]


def _compared(result: BenchResult) -> str:
    """What the bundle was compared with, and where both ran."""
    other = result.compared
    if other is None:
        return "not measured; give the fp32 candidate with --against"
    place = f"both on {other.providers_active[0]}"
    if other.providers_active[0] != result.providers_active[0]:
        place = f"on {result.providers_active[0]} against {other.providers_active[0]}"
    return (
        f"{other.speedup:.2f}x against {other.candidate} ({other.bundle}), p50 {other.latency_s.p50 * 1e3:.2f} ms,"
        f" {other.rounds} rounds in turn, {place}"
    )
