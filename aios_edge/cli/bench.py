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
@click.option("--duration", "duration_s", type=click.FloatRange(min=0.1), default=10.0, show_default=True, metavar="S")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def bench(bundle: Path, profile_name: str | None, duration_s: float, as_json: bool) -> None:
    """Measure a BUNDLE on this machine, with method and spread.

    --duration is the time for all input shapes together; energy takes longer where a counter exists.
    """
    from device_agent.bench import bench as measure

    with refusal_as_json(as_json):
        result = measure(
            bundle,
            profile_name=profile_name,
            duration_s=duration_s,
            on_progress=lambda text: click.echo(text, err=True),
        )
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
        return
    for line in _lines(result):
        click.echo(line)


def _lines(result: BenchResult) -> list[str]:
    """The result for a person."""
    latency = result.latency_s
    low, high = result.spread.p50_s
    rss = f"{result.rss_bytes / 1e6:.0f} MB" if result.rss_bytes else f"unknown ({result.rss_reason})"
    joule = result.energy_j_per_inference
    energy = f"{joule:.3g} J ({result.energy.method})" if joule is not None else f"unknown ({result.energy.reason})"
    lines = [
        f"bundle      {result.bundle}",
        f"profile     {result.profile}, {result.threads} thread(s), {', '.join(result.providers_active)}",
        f"latency     p50 {latency.p50 * 1e3:.2f}  p95 {latency.p95 * 1e3:.2f}  p99 {latency.p99 * 1e3:.2f} ms"
        f"  at {result.batch} x {result.length} (p50 of {result.spread.repeats} repeats:"
        f" {low * 1e3:.2f} to {high * 1e3:.2f})",
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
