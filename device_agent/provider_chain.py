"""The execution providers a model is opened with: the profile's chain, the bundle's options over it, caches in place.

Where the caches are: :mod:`device_agent.engine_cache`. Nothing of this was run on a board: it follows the provider's
documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aios_edge.manifest import Scalar
from aios_edge.profile import Provider
from aios_edge.provider_options import CACHES


def provider_chain(
    providers: tuple[Provider, ...], asked: Mapping[str, Mapping[str, Scalar]], cache: Path | None
) -> tuple[Provider, ...]:
    """A profile's providers with the bundle's options over theirs and TensorRT's caches in ``cache``. Pure.

    Without ``cache`` nothing is cached, whoever asked for it: onnxruntime would write into the working directory.
    """
    return tuple(
        Provider(name=provider.name, options=_placed({**provider.options, **asked.get(provider.name, {})}, cache))
        for provider in providers
    )


def _placed(options: dict[str, Scalar], cache: Path | None) -> dict[str, Scalar]:
    for switch, place in CACHES.items():
        if not options.get(switch) or place in options:  # a profile may name a place of its own
            continue
        if cache is None:
            options[switch] = False
        else:
            options[place] = str(cache)
    return options
