"""``aios-edge bundle``: look into a bundle, verify it, move it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click
import msgspec

from aios_edge.bundle.archive import pack as pack_bundle
from aios_edge.bundle.archive import unpack as unpack_bundle
from aios_edge.bundle.archive import unpacked
from aios_edge.bundle.checks import CHECKS
from aios_edge.bundle.read import Bundle, open_bundle
from aios_edge.cli.refusal import refusal_as_json

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_path = click.argument("path", type=click.Path(path_type=Path))


@click.group()
def bundle() -> None:
    """A bundle is a directory: a model with a contract. A .zip is its transport form."""


@bundle.command()
@_path
@_as_json
def show(path: Path, as_json: bool) -> None:
    """What is in a bundle and what it promises. Doesn't verify it, unless it has to come out of a .zip."""
    with refusal_as_json(as_json), _opened(path, verify=False) as opened:
        _show(opened, as_json)


def _show(opened: Bundle, as_json: bool) -> None:
    if as_json:
        _print(
            {
                "bundle_id": opened.bundle_id,
                "total_bytes": opened.total_bytes,
                "manifest": opened.manifest,
                "contract": opened.contract,
            }
        )
        return
    manifest = opened.manifest
    click.echo(f"{manifest.name} {manifest.version}: {manifest.task}, {manifest.precision} for {manifest.profile}")
    if manifest.purpose == "measure":
        click.echo("  FOR MEASURING ONLY: its accuracy was seen on validation rows; an agent doesn't serve it")
    click.echo(f"  id        {opened.bundle_id}")
    click.echo(f"  labels    {', '.join(manifest.labels)}")
    for word, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        for tensor in tensors:
            click.echo(f"  {word:<9} {tensor.name} {tensor.datatype} {list(tensor.shape)}")
    click.echo(f"  source    {manifest.provenance.source}, licence {manifest.licence}")
    click.echo(f"  files     {len(manifest.files) + 1}, {opened.total_bytes / 1e6:.2f} MB")
    for entry in manifest.files:
        click.echo(f"    {entry.size_bytes:>12}  {entry.path}")
    click.echo("  promises")
    for promise in opened.contract.promises:
        basis = f"{promise.basis}, checked: {promise.check}"
        click.echo(f"    {promise.name} {promise.op} {promise.value:.15g} {promise.unit} ({basis})")
    golden = opened.contract.golden
    click.echo(f"    {golden.count} golden samples, at least {golden.min_agreement:.1%} of them answered alike")
    for name, seen in opened.contract.measured.items():
        click.echo(f"    {name}: {seen.value:.4g} {seen.unit} measured on target, {seen.conditions.host}")
    for name, why in opened.contract.unmeasured.items():
        click.echo(f"    {name}: not measured, {why}")


@bundle.command()
@_path
@_as_json
def verify(path: Path, as_json: bool) -> None:
    """Run every named check; exit 3 and the check's name if one fails. A .zip is unpacked for it and removed again."""
    with refusal_as_json(as_json, bundle_id=None), _opened(path, verify=True) as opened:
        checks = ("archive", *CHECKS) if _is_zip(path) else CHECKS
        if as_json:
            _print({"ok": True, "checks": checks, "error": None, "bundle_id": opened.bundle_id})
        else:
            click.echo(f"{path}: valid ({', '.join(checks)})")
            click.echo(f"  id {opened.bundle_id}")


@bundle.command()
@_path
@click.option("--out", type=click.Path(path_type=Path), help="The .zip to write; default: PATH.zip.")
@_as_json
def pack(path: Path, out: Path | None, as_json: bool) -> None:
    """Make a .zip of a bundle: the same bundle gives the same bytes."""
    with refusal_as_json(as_json):
        opened = open_bundle(path, verify=False)  # pack verifies
        written = pack_bundle(opened, out or opened.path.with_name(opened.path.name + ".zip"))
    _moved(opened, written, as_json)


@bundle.command()
@_path
@click.option("--out", type=click.Path(path_type=Path), help="The directory to write; default: PATH without .zip.")
@_as_json
def unpack(path: Path, out: Path | None, as_json: bool) -> None:
    """Take a bundle out of a .zip and verify it; nothing is left behind if it fails."""
    with refusal_as_json(as_json):
        opened = unpack_bundle(path, out or path.with_suffix(""))
    _moved(opened, opened.path, as_json)


def _is_zip(path: Path) -> bool:
    return path.suffix == ".zip" and path.is_file()


def _opened(path: Path, *, verify: bool) -> AbstractContextManager[Bundle]:
    """The bundle in a directory, or one that comes out of a .zip for as long as the block lasts."""
    return unpacked(path) if _is_zip(path) else nullcontext(open_bundle(path, verify=verify))


def _moved(opened: Bundle, written: Path, as_json: bool) -> None:
    if as_json:
        _print({"path": str(written), "bundle_id": opened.bundle_id})
    else:
        click.echo(f"{written}: {opened.manifest.name} {opened.manifest.version}, id {opened.bundle_id}")


def _print(document: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
