"""Exit code 3 with ``--json``: the broken promise as one document on stdout, beside the message on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
import msgspec

from aios_edge.errors import PromiseBroken


@contextmanager
def refusal_as_json(as_json: bool, **more: object) -> Iterator[None]:
    """What the block raises goes on to the one place that makes an exit code of it; ``more`` joins the document."""
    try:
        yield
    except PromiseBroken as error:
        if as_json:
            print_refusal(error, **more)
        raise


def print_refusal(error: PromiseBroken, **more: object) -> None:
    """The document that every command prints."""
    document = {"ok": False, "check": error.promise, "error": str(error), **more}
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
