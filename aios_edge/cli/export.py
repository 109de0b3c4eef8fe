"""``aios-edge export``: make one bundle per profile from a recipe."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aios_edge.cli.refusal import print_refusal
from aios_edge.errors import PromiseBroken, UsageError

if TYPE_CHECKING:
    from exporters.report import ExportReport


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--profile", "profiles", required=True, metavar="NAME[,NAME…]", help="Device profiles, or their files.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="out", show_default=True, help="Where bundles and report go."
)
@click.option("--cache", type=click.Path(path_type=Path), help="Where finished stages are kept.  [default: OUT/.cache]")
@click.option(
    "--measured",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="What 'aios-edge bench --json' printed on a device of the profile; for several candidates, several times.",
)
@click.option("--candidates", is_flag=True, help="Write every candidate as a bundle to be measured on the device, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
def export(
    recipe: Path,
    profiles: str,
    out: Path,
    cache: Path | None,
    measured: tuple[Path, ...],
    candidates: bool,
    as_json: bool,
) -> None:
    """Fine-tune, convert, quantize, verify and bundle the model of RECIPE (TOML).

    Writes OUT/<profile>/ for each profile, OUT/report.json and OUT/report.html. Interrupted, it resumes: run the
    same command again.

    Where this machine isn't of a profile's class, --candidates gives all its candidates out to be measured by
    'aios-edge bench' on the device; with --measured its figures decide.
    """
    import exporters
    from aios_edge.profile_files import load_profile
    from exporters.progress import LineProgress, TerminalProgress
    from exporters.report import NothingShipped

    names = [name.strip() for name in profiles.split(",") if name.strip()]
    if not names:
        raise UsageError("names no profile", where="--profile", remedy="See: aios-edge profiles list")
    loaded = [load_profile(name) for name in names]
    try:
        with TerminalProgress() if _live() else nullcontext(LineProgress()) as progress:
            report = exporters.export(
                recipe, loaded, out, progress=progress, cache=cache, measured=measured, candidates=candidates
            )
    except NothingShipped as refused:
        if as_json:
            click.echo(refused.report.to_json(), nl=False)
        raise
    except PromiseBroken as error:  # before there was anything to report
        if as_json:
            print_refusal(error)
        raise
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    _print(report, out)


def _live() -> bool:
    """A live bar where a person watches and rich is there."""
    import importlib.util

    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


def _print(report: ExportReport, out: Path) -> None:
    wide = max((len(c.name) for profile in report.profiles.values() for c in profile.candidates), default=0)
    for name, profile in report.profiles.items():
        for candidate in profile.candidates:
            mark = "*" if candidate.chosen else " "
            size = f"{candidate.size_bytes / 1e6:.1f} MB" if candidate.size_bytes is not None else "n/a"
            speedup = f"{candidate.speedup:.2f}x" if candidate.speedup is not None else "n/a"
            if candidate.target is not None and candidate.target.speedup is not None:
                speedup = f"{candidate.target.speedup:.2f}x on target"
            agreement = f"{candidate.agreement:.4f}" if candidate.agreement is not None else "n/a"
            what = f"{name:<18} {mark} {candidate.name:<{wide}} {size:>9}"
            click.echo(f"{what}  agreement {agreement}  speed {speedup}  {candidate.reason}")
    for warning in report.warnings:
        click.echo(f"warning: {warning}")
    used = f", {report.peak_rss_bytes / 1e6:.0f} MB of memory at most" if report.peak_rss_bytes else ""
    click.echo(f"Took {report.wall_s:.0f} s{used}")
    click.echo(f"Report: {out / 'report.html'}")
