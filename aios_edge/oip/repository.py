"""Bodies of the model repository extension: ``load`` and ``unload``."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from aios_edge.errors import RequestError

Action = Literal["load", "unload"]


class _Change(msgspec.Struct, frozen=True):
    parameters: dict[str, Any] = {}


def check_change(action: Action, body: bytes) -> None:
    """Whether a request's body, empty or JSON with ``parameters``, asks for nothing but the action itself.

    ``unload_dependents`` changes nothing, since no model here depends on another. A load that brings a model along
    (Triton's ``config`` and ``file:…``) is refused, :class:`RequestError`: it would not be what gets loaded.
    """
    if not body.strip():
        return
    try:
        change = msgspec.json.decode(body, type=_Change)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body of {action} is not JSON with parameters ({error})", remedy="Send {}") from error
    brought = [name for name in change.parameters if name == "config" or name.startswith("file:")]
    if action == "load" and brought:
        raise RequestError(
            f"load with {brought[0]!r} is not available: a bundle is read from its path in agent.toml",
            remedy="Put the bundle there, and load without parameters",
        )


def change_body(action: Action, model: str) -> bytes:
    """The answer to a load or unload that worked, in KServe's words; Triton's clients look at the status alone."""
    return msgspec.json.encode({"name": model, action: True})
