"""AIOS Edge: a bundle is a model with a contract, and the agent keeps the contract.

>>> import aios_edge
>>> profile = aios_edge.load_profile("rpi5")
>>> bundle = aios_edge.open_bundle("out/rpi5")
>>> client = aios_edge.Client("http://127.0.0.1:8080")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_edge.version import __version__

if TYPE_CHECKING:
    from aios_edge.bundle.read import open_bundle
    from aios_edge.client import Client
    from aios_edge.profile_files import load_profile

__all__ = ["Client", "__version__", "load_profile", "open_bundle"]

_HOMES = {
    "Client": "aios_edge.client",
    "load_profile": "aios_edge.profile_files",
    "open_bundle": "aios_edge.bundle.read",
}


def __getattr__(name: str) -> object:
    # The supervisor imports aios_edge.errors and must not pay for (or load) numpy by way of this file.
    if name not in _HOMES:
        raise AttributeError(f"module 'aios_edge' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
