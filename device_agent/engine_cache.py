"""Where TensorRT's engines and timings are kept, and whether one is there.

An engine is good for one model, one set of shapes and precisions, one kind of GPU, one TensorRT, one driver and one
onnxruntime, so the folder is named after all of them:

    <state_dir>/tensorrt/trt-10.3.0_ort-1.23.0_driver-36.4.3_Orin-sm8.7/<model's digest, 16 digits>-<options, 8 digits>/

``engine.json`` in it is written when the engine was built, and says what belongs to it. Nothing of this was run on a
board: it follows the provider's documentation.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from aios_edge.bundle.layout import model_files
from aios_edge.bundle.read import Bundle
from aios_edge.digest import canonical_json, sha256_bytes
from aios_edge.provider_options import CACHES
from device_agent.gpu import Gpu, NoGpu
from device_agent.raw_model import is_raw
from device_agent.values import EngineReport

FOLDER, RECORD = "tensorrt", "engine.json"
_MODEL_DIGITS, _OPTION_DIGITS = 16, 8
_LIBRARIES = (
    "usr/lib/aarch64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/local/lib",
    "usr/local/tensorrt/lib",
)
_UNKNOWN = "unknown"
_PLACES = frozenset((*CACHES, *CACHES.values()))  # no engine depends on them


class EngineKey(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine depends on. ``options``: what TensorRT is told of shapes, precisions and the rest."""

    model: str
    options: dict[str, str]
    onnxruntime: str
    tensorrt: str
    driver: str
    gpu: str
    compute_capability: str

    @property
    def folder(self) -> str:
        """Relative to the agent's ``state_dir``."""
        machine = f"trt-{self.tensorrt}_ort-{self.onnxruntime}_driver-{self.driver}_{self.gpu}"
        options = sha256_bytes(canonical_json(self.options))[:_OPTION_DIGITS]
        return f"{FOLDER}/{_plain(f'{machine}-sm{self.compute_capability}')}/{self.model[:_MODEL_DIGITS]}-{options}"


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``engine.json``. ``files``: name -> bytes of what was built. ``unfit``: why it must not serve."""

    key: EngineKey
    took_s: float
    files: dict[str, int]
    unfit: str | None = None


def engine_key(
    bundle: Bundle,
    options: Mapping[str, str],
    gpu: Gpu | NoGpu,
    *,
    onnxruntime: str,
    root: Path = Path("/"),
) -> EngineKey:
    """The key for a model and TensorRT's options; ``root`` is where TensorRT and the driver are looked for."""
    if isinstance(gpu, NoGpu):
        gpu = Gpu(name=_UNKNOWN, compute_capability=_UNKNOWN)
    return EngineKey(
        model=model_digest(bundle),
        options={key: value for key, value in options.items() if key not in _PLACES},
        onnxruntime=onnxruntime,
        tensorrt=tensorrt_version(root),
        driver=driver_version(root),
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
    )


def model_digest(bundle: Bundle) -> str:
    """Over the digests of the model and its external data: another tokenizer doesn't need another engine. A raw model
    has its own, over all its files."""
    if is_raw(bundle.manifest):
        return bundle.bundle_id
    digests = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    return sha256_bytes(canonical_json([digests[path] for path in model_files(bundle.manifest)]))


def look(folder: Path) -> EngineReport:
    """Whether a whole engine lies in a folder and may serve: ``cached``, ``unfit`` or ``missing``."""
    record = _read(folder)
    if record is None:
        return EngineReport(state="missing", folder=str(folder))
    size_bytes = sum(record.files.values())
    if record.unfit is not None:
        return EngineReport(state="unfit", reason=record.unfit, folder=str(folder), size_bytes=size_bytes)
    for name, size in record.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return EngineReport(state="missing", folder=str(folder))
    return EngineReport(state="cached", folder=str(folder), size_bytes=size_bytes, took_s=record.took_s)


def built(folder: Path, took_s: float) -> EngineReport:
    """What opening the model left in the folder; ``nothing`` where no engine was written."""
    files = _engines(folder)
    if not files:
        return EngineReport(state="nothing", reason="TensorRT wrote no engine for this model", folder=str(folder))
    return EngineReport(state="built", folder=str(folder), size_bytes=sum(files.values()), took_s=round(took_s, 3))


def keep(folder: Path, key: EngineKey, took_s: float) -> None:
    """From now on the engine may be used; timings are a help, not a part of it."""
    _write(folder, EngineRecord(key=key, took_s=took_s, files=_engines(folder)))


def note_unfit(folder: Path, reason: str) -> None:
    """An engine that was built must not serve; ``aios-edge agent prebuild`` builds it again."""
    if (record := _read(folder)) is not None:
        _write(folder, msgspec.structs.replace(record, unfit=reason))


def clear(folder: Path) -> None:
    """Make the folder, empty but for the timings: what is there is not a whole engine, or one that must not serve."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix != ".timing":
            path.unlink(missing_ok=True)


def bytes_in(folder: Path) -> int:
    """What lies there by now."""
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.iterdir() if path.name != RECORD)
    return 0


def forget_engines(state_dir: Path, models: Collection[str]) -> None:
    """Remove the engines of all models but those with these digests; each may have some ten MB."""
    kept = {digest[:_MODEL_DIGITS] for digest in models}
    for folder in (state_dir / FOLDER).glob("*/*"):
        if folder.name.split("-")[0] not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def tensorrt_version(root: Path = Path("/")) -> str:
    """The version in the name of the installed library (libnvinfer.so.10.3.0), or ``unknown``."""
    names = (path.name for place in _LIBRARIES for path in (root / place).glob("libnvinfer.so.*"))
    versions = [name.removeprefix("libnvinfer.so.") for name in names]
    return max(versions, key=lambda version: (version.count("."), version), default=_UNKNOWN)


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
            return ".".join(found.groups())
    return _UNKNOWN


def _plain(name: str) -> str:
    """Fit for a folder's name."""
    return re.sub(r"[^0-9A-Za-z._-]", "-", name)


def _engines(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.engine"))}


def _read(folder: Path) -> EngineRecord | None:
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=EngineRecord)
    except (OSError, msgspec.MsgspecError):
        return None


def _write(folder: Path, record: EngineRecord) -> None:
    staged = folder / f".{RECORD}"
    staged.write_bytes(msgspec.json.encode(record))
    staged.replace(folder / RECORD)
