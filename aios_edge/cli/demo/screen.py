"""What the demo shows: plain words, tables, and never a figure that was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from aios_edge.cli.demo.acts import Overload, Unloaded, WorkerKill, Workshop


def megabytes(size_bytes: float | None) -> str:
    """MB = 10^6 bytes."""
    return "not measured" if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"


def milliseconds(seconds: float | None) -> str:
    """One decimal below 100 ms."""
    if seconds is None:
        return "not measured"
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


class Screen:
    """Prints the acts as they happen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._act = 0

    def act(self, title: str) -> None:
        """A new act."""
        self._act += 1
        self._console.print()
        self._console.print(Rule(f"[bold]{self._act}. {title}[/bold]", align="left"))

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def candidates(self, workshop: Workshop) -> None:
        """The table of candidates of every profile, and why each choice was made."""
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
        for column in ("profile", "candidate", "size", "val. acc.", "drop", "agree", "speed", ""):
            table.add_column(
                column, no_wrap=True, justify="left" if column in ("profile", "candidate", "") else "right"
            )
        for profile, result in workshop.report["profiles"].items():
            for candidate in result["candidates"]:
                table.add_row(
                    profile,
                    candidate["name"],
                    megabytes(candidate["size_bytes"]),
                    _share(candidate["metrics"].get("accuracy") if candidate["metrics"] else None),
                    _points(candidate["drop"]),
                    _share(candidate["agreement"]),
                    "not measured" if candidate["speedup"] is None else f"{candidate['speedup']:.2f}x",
                    "[green]◀[/green]" if candidate["chosen"] else "",
                )
        self._console.print(table)
        for profile in workshop.report["profiles"]:
            chosen = workshop.chosen(profile)
            self.say(f"  [bold]{profile}[/bold]: {chosen['name']}, {chosen['reason']}")

    def not_pruned(self, why: str) -> None:
        """That ``--structured`` got no narrower network, so that nobody takes the whole one for it."""
        self.say(
            f"  [bold red]Not pruned:[/bold red] the whole network is served, though --structured asked: {escape(why)}"
        )

    def telemetry(self, message: Mapping[str, Any]) -> None:
        """One telemetry message, as it came over MQTT."""
        power = message["power"]
        energy = message["energy"]
        latency = message["latency"]
        watts = "power unknown" if power["total_w"] is None else f"{power['total_w']:.1f} W ({power['total_method']})"
        joules = energy["j_per_inference_active"]
        self.say(
            f"  telemetry: {watts} · p50 {milliseconds(latency['p50_s'])} · p95 {milliseconds(latency['p95_s'])} · "
            + (
                "J/inference not known yet"
                if joules is None
                else f"{joules:.3f} J/inference ({energy['method']}, above idle)"
            )
        )

    def unloaded(self, what: str, figures: Unloaded) -> None:
        """Latency and capacity of one device."""
        self.say(
            f"  {what}: p50 {milliseconds(figures.p50_s)}, p95 {milliseconds(figures.p95_s)}, "
            f"capacity {figures.capacity_per_s:.1f} requests/s"
        )

    def overload(self, title: str, run: Overload) -> None:
        """The score of one overload run."""
        score = run.score
        self.say(
            f"  [bold]{title}[/bold]: {score.offered} offered at {run.rate_per_s:.1f}/s, deadline "
            f"{milliseconds(run.deadline_s)} → [bold]{score.hit_rate:.1%} in time and right[/bold]"
        )
        self.say(
            f"    cloud answered {score.cloud_share:.1%} · refused {score.shed} · failed {score.failed} · "
            f"late {score.late} · not the model's offline answer {score.wrong}"
        )
        self.say("    " + " · ".join(f"{route} {count}" for route, count in score.routes.items()))

    def worker(self, kill: WorkerKill) -> None:
        """What the killed worker's requests got."""
        back = "did not come back" if kill.recovered_s is None else f"back in {kill.recovered_s:.2f} s"
        self.say(
            f"  worker killed with {kill.in_flight} requests in flight: {kill.sent} sent, {kill.answers} answered, "
            f"{kill.refused} refused with a reason, {kill.sent - kill.answers - kill.refused} lost; service {back}"
        )

    def summary(self, figures: Mapping[str, Any]) -> None:
        """The last screen."""
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for key, value in figures.items():
            shown = "not measured" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(key, shown)
        self._console.print(table)


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2%}"


def _points(drop: Any) -> str:
    value = drop.get("value") if isinstance(drop, dict) else drop
    return "not measured" if value is None else f"{value * 100:+.2f} pt"
