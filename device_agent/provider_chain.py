"""The execution providers a model is opened with: the profile's chain, the bundle's options over it, caches in place.

TensorRT's engine is good for one model, one TensorRT, one driver and one onnxruntime, so its caches lie in a folder
named after all four:

    <state_dir>/tensorrt/trt-10.3.0_driver-540.4.0_ort-1.23.0/<first 16 digits of the bundle's id>/

Nothing of this was run on a board: it follows the provider's documentation.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from aios_edge.manifest import Scalar
from aios_edge.profile import Provider
from aios_edge.provider_options import CACHES, TENSORRT

FOLDER = "tensorrt"
_ID_DIGITS = 16
_LIBRARIES = (
    "usr/lib/aarch64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/local/lib",
    "usr/local/tensorrt/lib",
)


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


def cache_folder(
    providers: tuple[Provider, ...], bundle_id: str, state_dir: Path | None, *, runtime: str, root: Path = Path("/")
) -> Path | None:
    """Where this bundle's engine and timings are kept, made if need be; None for a chain without TensorRT or an agent
    without a folder. ``runtime`` is onnxruntime's version, ``root`` where TensorRT and the driver are looked for."""
    if state_dir is None or all(provider.name != TENSORRT for provider in providers):
        return None
    versions = f"trt-{tensorrt_version(root)}_driver-{driver_version(root)}_ort-{runtime}"
    folder = state_dir / FOLDER / versions / bundle_id[:_ID_DIGITS]
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def forget_engines(state_dir: Path, bundle_ids: Collection[str]) -> None:
    """Remove the caches of bundles that are no longer configured; each may have some ten MB."""
    kept = {bundle_id[:_ID_DIGITS] for bundle_id in bundle_ids}
    for folder in (state_dir / FOLDER).glob("*/*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def tensorrt_version(root: Path = Path("/")) -> str:
    """The version in the name of the installed library (libnvinfer.so.10.3.0), or ``unknown``."""
    names = (path.name for place in _LIBRARIES for path in (root / place).glob("libnvinfer.so.*"))
    versions = [name.removeprefix("libnvinfer.so.") for name in names]
    return _plain(max(versions, key=lambda version: (version.count("."), version), default="unknown"))


def driver_version(root: Path = Path("/")) -> str:
    """The NVIDIA driver's: of a discrete GPU from /proc, of a Jetson its Linux for Tegra release; or ``unknown``."""
    for place, pattern in (
        ("proc/driver/nvidia/version", r"Kernel Module(?: for \S+)?\s+([\d.]+)"),
        ("etc/nv_tegra_release", r"R(\d+) \(release\), REVISION: ([\d.]+)"),
    ):
        try:
            text = (root / place).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if found := re.search(pattern, text):
            return _plain(".".join(found.groups()))
    return "unknown"


def _plain(version: str) -> str:
    """Fit for a folder's name."""
    return re.sub(r"[^0-9A-Za-z.]", "-", version)
