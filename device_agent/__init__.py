"""The daemon on the device: it keeps a bundle's contract. Light: no torch, and the supervisor has no numpy either.

>>> import asyncio, device_agent
>>> asyncio.run(device_agent.Agent(device_agent.load_settings("agent.toml")).run())
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from device_agent.agent import Agent
    from device_agent.settings import Settings, load_settings

__all__ = ["Agent", "Settings", "load_settings"]

_HOMES = {
    "Agent": "device_agent.agent",
    "Settings": "device_agent.settings",
    "load_settings": "device_agent.settings",
}


def __getattr__(name: str) -> object:
    # A worker process imports device_agent.worker through this file and has no use for the supervisor's modules.
    if name not in _HOMES:
        raise AttributeError(f"module 'device_agent' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
