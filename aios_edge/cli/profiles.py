"""``aios-edge profiles``: the device profiles that are there, and the one for this machine."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from aios_edge.errors import ProfileError
from aios_edge.host import describe, inspect_host
from aios_edge.profile import DeviceProfile
from aios_edge.profile_detect import detect as detect_profile
from aios_edge.profile_files import check_profile, load_profile, shipped_profiles

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


@click.group()
def profiles() -> None:
    """Device profiles: what a class of devices can do and what a model on it may cost."""


@profiles.command("list")
@_as_json
def list_profiles(as_json: bool) -> None:
    """The profiles that come with AIOS Edge."""
    loaded = [load_profile(name) for name in shipped_profiles()]
    if as_json:
        _print([{"name": p.name, "title": p.title, "arch": p.arch} for p in loaded])
        return
    width = max(len(p.name) for p in loaded)
    for profile in loaded:
        click.echo(f"{profile.name:<{width}}  {profile.arch:<8} {profile.title}")


@profiles.command()
@click.argument("name")
@_as_json
def show(name: str, as_json: bool) -> None:
    """One profile, shipped (NAME) or in a file (a path)."""
    profile = load_profile(name)
    if as_json:
        _print(profile)
        return
    click.echo(f"{profile.name}: {profile.title}")
    for key, value in _rows(profile):
        click.echo(f"  {key:<16} {value}")


@profiles.command()
@click.argument("file", type=click.Path(path_type=Path))
@_as_json
def check(file: Path, as_json: bool) -> None:
    """Say what is wrong with a profile's file; exit 2 if anything is."""
    try:
        profile = check_profile(file)
    except ProfileError as error:
        if as_json:
            _print({"file": str(file), "ok": False, "name": None, "error": str(error)})
        raise
    if as_json:
        _print({"file": str(file), "ok": True, "name": profile.name, "error": None})
    else:
        click.echo(f"{file}: profile '{profile.name}' is valid")


@profiles.command()
@click.option("--proc-root", type=click.Path(path_type=Path), default=Path("/proc"), help="Read another /proc.")
@click.option("--sys-root", type=click.Path(path_type=Path), default=Path("/sys"), help="Read another /sys.")
@_as_json
def detect(proc_root: Path, sys_root: Path, as_json: bool) -> None:
    """The best profile for this machine, and why."""
    host = inspect_host(proc_root, sys_root)
    found = detect_profile(host, [load_profile(name) for name in shipped_profiles()])
    if as_json:
        _print(
            {
                "name": found.name,
                "why": found.why,
                "others": [{"name": other.name, "lacking": other.lacking} for other in found.others],
                "host": {**msgspec.to_builtins(host), "cpu_flags": sorted(host.cpu_flags)},
            }
        )
        return
    click.echo(f"This machine: {describe(host)}")
    click.echo(f"Profile:      {found.name or 'none'} ({'; '.join(found.why)})")
    click.echo("Others:")
    for other in found.others:
        click.echo(f"  {other.name:<18} {'; '.join(other.lacking)}")


def _rows(profile: DeviceProfile) -> list[tuple[str, str]]:
    budgets, threads = profile.budgets, profile.threads
    narrow = profile.quantization == "dynamic-s8" and profile.weights_in_7_bits  # others have no u8 x s8 products
    rows = [
        ("architecture", profile.arch + (f" with {', '.join(profile.cpu_flags)}" if profile.cpu_flags else "")),
        ("providers", " > ".join(provider.name for provider in profile.providers)),
        ("precision", " > ".join(profile.precision_preference)),
        ("quantization", profile.quantization + (", weights in 7 bits" if narrow else "")),
        ("isolation", profile.isolation),
        ("threads", f"{threads.intra_op} intra-op, {threads.inter_op} inter-op, {threads.workers} worker(s)"),
        ("power sources", ", ".join(profile.power.sources) or "every one that is there"),
    ]
    if profile.power.estimate is not None:
        estimate = profile.power.estimate
        rows.append(("power estimate", f"{estimate.idle_w:g} to {estimate.busy_w:g} W ({estimate.source})"))
    if budgets.latency_p95_s is not None:
        shape = f"batch {budgets.latency_batch}, length {budgets.latency_length}"
        rows.append(("latency p95", f"{budgets.latency_p95_s * 1e3:g} ms at {shape}"))
    if budgets.memory_bytes is not None:
        rows.append(("memory", f"{budgets.memory_bytes / 1e6:g} MB"))
    if budgets.bundle_size_bytes is not None:
        rows.append(("bundle size", f"{budgets.bundle_size_bytes / 1e6:g} MB"))
    if budgets.power_w is not None:
        rows.append(("power", f"{budgets.power_w:g} W"))
    rows.append(("accuracy drop", f"at most {budgets.max_drop:g}"))
    return rows


def _print(document: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
