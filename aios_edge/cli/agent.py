"""``aios-edge agent``: run the daemon, check its configuration, ask how it is."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

if TYPE_CHECKING:
    from device_agent.prebuild import Prebuilt
    from device_agent.values import CheckedBundles

DEFAULT_URL = "http://127.0.0.1:8080"

_config = click.option(
    "--config",
    type=click.Path(path_type=Path),
    required=True,
    help="The agent's configuration, a TOML file.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


@click.group()
def agent() -> None:
    """The daemon on the device: it activates bundles, serves them and keeps their contracts."""


@agent.command()
@_config
def run(config: Path) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what waits and stop. SIGHUP reads the policy again.

    Exit 3 when no bundle may serve, with the name of the check that refused it.
    """
    from device_agent import Agent, load_settings

    _log_to_stderr()
    asyncio.run(_run(Agent, load_settings(config), config))


@agent.command()
@_config
@_as_json
def check(config: Path, as_json: bool) -> None:
    """Check configuration and profile, and activate every bundle without serving it.

    When some are refused, after all were tried, message and exit code are those of the first: 3 for a broken promise.
    """
    from device_agent import Agent, load_settings

    _log_to_stderr()
    settings = load_settings(config)
    found = asyncio.run(_check(Agent, settings))
    if as_json:
        refused = [
            {"path": str(bundle.path), "check": bundle.check, "error": str(bundle.error)} for bundle in found.refused
        ]
        document = {
            "config": str(config),
            "profile": settings.device.profile,
            "profile_mismatch": found.profile_mismatch,
            "activations": found.activations,
            "refused": refused,
            "error": None if found.error is None else str(found.error),
        }
        click.echo(msgspec.json.encode(document).decode())
    else:
        for line in _checked(found):
            click.echo(line)
    if found.error is not None:
        raise found.error


def _checked(found: CheckedBundles) -> Iterator[str]:
    if found.profile_mismatch is not None:
        yield f"warning: {found.profile_mismatch}"
    for report in found.activations:
        yield f"{report.model} {report.version}  {report.bundle_id[:12]}  {', '.join(report.providers_active)}"
        for done in report.checks:
            yield f"  {'ok ' if done.passed else 'NOT'}  {done.name:<16} {done.detail}"
        yield from (f"  {line}" for line in chain_lines(msgspec.to_builtins(report.provider_steps)))
    for bundle in found.refused:
        yield f"refused {bundle.path}  {bundle.error}"


@agent.command()
@_config
@click.option("--model", help="Only the model of this name.")
@_as_json
def prebuild(config: Path, model: str | None, as_json: bool) -> None:
    """Build TensorRT's engines ahead of time, so that the agent starts with them.

    Where nothing can be built, it says why. Run it on the device, while no agent uses its state_dir.
    """
    from aios_edge.profile_files import load_profile
    from device_agent import load_settings
    from device_agent.prebuild import prebuild as build_all

    _log_to_stderr()
    settings = load_settings(config)
    found = asyncio.run(build_all(settings, load_profile(settings.device.profile), model))
    if as_json:
        error = None if found.error is None else str(found.error)
        document = {"config": str(config), "profile": settings.device.profile, "models": found.models, "error": error}
        click.echo(msgspec.json.encode(document).decode())
    else:
        for made in found.models:
            click.echo(_engine_line(made))
    if found.error is not None:
        raise found.error


def _engine_line(made: Prebuilt) -> str:
    engine, name = made.engine, f"{made.model} {made.version}" if made.model else made.path
    if engine.state in ("built", "cached"):
        size = "" if engine.size_bytes is None else f", {engine.size_bytes / 1e6:.1f} MB"
        took = f" in {engine.took_s:.0f} s" if engine.state == "built" and engine.took_s is not None else ""
        return f"{name}: {'built' if engine.state == 'built' else 'is built already'}{took}{size}, in {engine.folder}"
    return f"{name}: {'nothing to build here' if engine.state == 'nothing' else 'FAILED'}: {engine.reason}"


@agent.command()
@click.option("--url", default=DEFAULT_URL, show_default=True, help="Where the agent listens; unix:PATH for a socket.")
@click.option("--bearer-file", type=click.Path(path_type=Path), help="A file with the key of a tenant.")
@click.option("--ca", type=click.Path(path_type=Path), help="Certificates to trust instead of the system's.")
@_as_json
def status(url: str, bearer_file: Path | None, ca: Path | None, as_json: bool) -> None:
    """What a running agent is doing; with the key of a tenant that is no admin, what it does for that tenant."""
    from aios_edge.client import Client
    from device_agent.settings import read_secret

    bearer = None if bearer_file is None else read_secret(bearer_file)
    document: dict[str, Any] = Client(url, bearer=bearer, ca=ca).status()
    if as_json:
        click.echo(msgspec.json.encode(document).decode())
        return
    for line in describe(document):
        click.echo(line)


@agent.command(name="reload")
@_config
@click.option("--wait", "wait_s", default=15.0, show_default=True, help="Seconds to wait for the agent's answer.")
@_as_json
def reload_policy(config: Path, wait_s: float, as_json: bool) -> None:
    """Put the [policy] of the file in force in the agent that runs from it, between two of its decisions.

    Everything else must be as it was, but for numbers of workers, and weights, timeouts and the size of budgets of a
    [[cloud]]; else nothing is taken over, and the exit code is 2.
    """
    from aios_edge.errors import SettingsError
    from device_agent.reload_request import ask_to_reload

    done = ask_to_reload(config, wait_s=wait_s)
    if as_json:
        click.echo(msgspec.json.encode(done).decode())
    elif done.error is None:
        click.echo(f"policy {done.digest} is in force: {'; '.join(done.changed) or 'nothing changed'}")
    if done.error is not None:
        raise SettingsError(done.error)


@agent.command()
@_as_json
def key(as_json: bool) -> None:
    """Make a random key for a tenant. It is shown this once and kept nowhere; agent.toml takes its SHA-256."""
    from device_agent.tenants import key_sha256, new_key

    made = new_key()
    if as_json:
        click.echo(msgspec.json.encode({"key": made, "key_sha256": key_sha256(made)}).decode())
        return
    click.echo(f"the client's key, sent as Authorization: Bearer\n  {made}")
    click.echo(f'for its [[tenant]] in agent.toml\n  key_sha256 = "{key_sha256(made)}"')


def describe(document: dict[str, Any]) -> list[str]:
    """The status document as lines for a person."""
    if "tenant" in document:
        return _describe_tenant(document)
    device = document["device"]
    lines = [
        f"{device['group']}/{device['id']}  {document['state']}  profile {device['profile']}"
        f"  version {document['agent_version']}  up {document['uptime_s']:.0f} s  {' '.join(document['listen'])}"
    ]
    if door := document.get("grpc"):
        serving = "serving" if door["serving"] else "not serving"
        lines.append(f"{door['address']}  {serving}  {door['in_flight']} calls")
    if document["emulate"]["slowdown"] != 1.0:
        lines.append(f"EMULATED: every batch is held for its compute time x {document['emulate']['slowdown']:g}")
    for name, model in document["models"].items():
        pids = [worker["pid"] for worker in model.get("workers", ()) if worker["pid"]] or [model["worker_pid"] or "-"]
        active = ", ".join((model["activation"] or {}).get("providers_active", ())) or "-"
        lines.append(
            f"model {name} {model['version']}  {model['state']}  worker {' '.join(map(str, pids))}  {active}"
            f"  queue {model['queued']} + {model['running']} running  restarts {model['restarts']}"
        )
        if model.get("contract") == "none":
            lines.append("  no contract: nothing was promised, nothing is checked")
        if model["detail"]:
            lines.append(f"  {model['detail']}")
        if 0 < model.get("workers_serving", 0) < len(model.get("workers", ())):
            missing = {worker["detail"] or "starts" for worker in model["workers"] if not worker["serves"]}
            lines.append(f"  {model['workers_serving']} of {len(model['workers'])} workers: {'; '.join(missing)}")
        lines += [f"  {line}" for line in chain_lines((model["activation"] or {}).get("provider_steps", ()))]
        if build := model.get("engine_build"):
            lines.append(f"  its TensorRT engine is built beside: {build['stage']}, {build['elapsed_s']:.0f} s so far")
        if probation := model.get("probation"):
            lines.append(f"  on probation for {probation['ends_in_s']:.0f} s; before: {probation['previous'][:16]}")
    lines += [f"refused {bundle['model']}  {bundle['detail']}" for bundle in document["refused"]]
    lines += [f"{bundle['state']} {bundle['model']} {bundle['version']}" for bundle in document.get("unloaded", ())]
    for name, cloud in document["cloud"].items():
        lines.append(f"cloud {name} {cloud['url']}  breaker {cloud['breaker']}")
        lines += [
            f"  budget of {budget}: {sums['left']:g} of {sums['per_day']:g} left"
            for budget, sums in cloud.get("budgets", {}).items()
        ]
        lines += [
            f"  {local} -> {model['remote']}  {'usable' if model['usable'] else model['reason']}"
            for local, model in cloud["models"].items()
        ]
    power = document["power"] or {}
    if power.get("total_w") is not None:
        lines.append(f"power {power['total_w']:.2f} W ({power['total_method']}, {power['total_source']})")
    else:
        lines.append(f"power unknown: {document['power_reason']}")
    if strained := document.get("device_state", {}).get("strained"):
        lines.append(f"spared: requests leave that may, for {', '.join(strained)}")
    if policy := document.get("policy"):
        lines.append(f"policy {policy['digest']} since {policy['since']}")
        if (last := policy["last_reload"]) and last["error"]:
            lines.append(f"  another one was refused: {last['error']}")
    link, outbox = document["mqtt"]["link"], document["mqtt"]["outbox"]
    connection = "connected" if link["connected"] else f"not connected: {link['reason']}"
    lines.append(f"mqtt {connection}  sent {document['mqtt']['published']}  waiting {outbox['depth']}")
    if infer := document.get("mqtt_infer"):
        lines.append(f"  inference there: asked {infer['asked']}  answered {infer['answered']}  lost {infer['lost']}")
    if outbox.get("error"):
        lines.append(f"  the disk refuses what waits for the broker: {outbox['error']}")
    lines.append(_requests(document))
    return lines


def chain_lines(steps: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What became of each provider of a chain, for a person."""
    for number, step in enumerate(steps):
        name = step["name"].removesuffix("ExecutionProvider")
        if not step["active"]:
            yield f"provider {name}: not active, it {step['reason']}"
        elif step["nodes"] is None:
            yield f"provider {name}: active; {step['nodes_reason']}"
        else:  # what fell down the chain is told by operator: it is what somebody may want to change
            fell = ", ".join(f"{count} {operator}" for operator, count in step["operators"].items()) if number else ""
            yield f"provider {name}: active, runs {step['nodes']} nodes{f' ({fell})' if fell else ''}"


def _describe_tenant(document: dict[str, Any]) -> list[str]:
    lines = [f"tenant {document['tenant']}  {document['state']}  version {document['agent_version']}"]
    lines += [f"model {name} {model['version']}  {model['state']}" for name, model in document["models"].items()]
    if document["requests_per_s"] is not None:
        lines.append(f"at most {document['requests_per_s']:g} requests a second")
    if document["bytes_per_day"] is not None:
        lines.append(f"{document['bytes_left']} of {document['bytes_per_day']} bytes of 24 hours left")
    return [*lines, _requests(document)]


def _requests(document: dict[str, Any]) -> str:
    totals = "  ".join(f"{route} {count}" for route, count in sorted(document["totals"].items())) or "none yet"
    return f"requests {totals}"


async def _run(agent_class: Any, settings: Any, config: Path) -> None:
    await agent_class(settings, config=config).run()


async def _check(agent_class: Any, settings: Any) -> CheckedBundles:
    found: CheckedBundles = await agent_class(settings).check()
    return found


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        force=True,
    )
