"""Where an engine lies, what it depends on, and whether it may be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from device_agent.engine_cache import (
    built,
    clear,
    driver_version,
    engine_key,
    forget_engines,
    keep,
    look,
    model_digest,
    note_unfit,
    tensorrt_version,
)
from device_agent.gpu import Gpu, NoGpu

ORIN = Gpu(name="Orin (nvgpu)", compute_capability="8.7")
OPTIONS = {"trt_profile_min_shapes": "input_ids:1x1", "trt_fp16_enable": "1", "trt_engine_cache_path": "/anywhere"}


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """A root with what tells the versions on a Jetson."""
    library = tmp_path / "root/usr/lib/aarch64-linux-gnu"
    library.mkdir(parents=True)
    for name in ("libnvinfer.so.10", "libnvinfer.so.10.3.0", "libnvinfer_plugin.so.10.3.0"):
        (library / name).touch()
    (tmp_path / "root/etc").mkdir()
    (tmp_path / "root/etc/nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"
    )
    return tmp_path / "root"


def test_the_versions_of_a_jetson(jetson: Path, tmp_path: Path) -> None:
    assert (tensorrt_version(jetson), driver_version(jetson)) == ("10.3.0", "36.4.3")
    assert (tensorrt_version(tmp_path), driver_version(tmp_path)) == ("unknown", "unknown")


def test_a_discrete_gpus_driver_is_told(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    )
    assert driver_version(tmp_path) == "550.54.15"


def test_an_engine_lies_under_all_that_it_depends_on(tiny_bundle: Any, make_bundle: Any, jetson: Path) -> None:
    def folder(bundle: Any = tiny_bundle, gpu: Any = ORIN, runtime: str = "1.23.0", **options: str) -> str:
        return engine_key(bundle, {**OPTIONS, **options}, gpu, onnxruntime=runtime, root=jetson).folder

    machine, _, place = folder().removeprefix("tensorrt/").partition("/")
    assert machine == "trt-10.3.0_ort-1.23.0_driver-36.4.3_Orin--nvgpu--sm8.7"
    assert place.startswith(model_digest(tiny_bundle)[:16] + "-")
    others = {
        folder(runtime="1.23.1"),
        folder(gpu=msgspec.structs.replace(ORIN, compute_capability="8.6")),
        folder(gpu=NoGpu(reason="none")),
        folder(trt_profile_max_shapes="input_ids:8x64"),
        folder(trt_fp16_enable="0"),
    }
    assert len({folder(), *others}) == 6
    assert folder(trt_engine_cache_path="/elsewhere", trt_timing_cache_path="/x") == folder()
    other_version = make_bundle(version="2.0.0")
    assert other_version.bundle_id != tiny_bundle.bundle_id and folder(other_version) == folder()


def test_another_model_has_another_digest(tiny_bundle: Any) -> None:
    manifest = tiny_bundle.manifest
    for name, same in (("model.onnx", False), ("model.onnx.data", False), ("tokenizer.json", True)):
        files = tuple(
            msgspec.structs.replace(entry, sha256="0" * 64) if entry.path == name else entry for entry in manifest.files
        )
        other = replace(tiny_bundle, manifest=msgspec.structs.replace(manifest, files=files))
        assert (model_digest(other) == model_digest(tiny_bundle)) is same, name


def test_an_engine_is_there_once_it_was_kept_whole_and_until_it_proves_unfit(tmp_path: Path, tiny_bundle: Any) -> None:
    key = engine_key(tiny_bundle, OPTIONS, ORIN, onnxruntime="1.23.0")
    folder = tmp_path / key.folder
    assert look(folder).state == "missing"
    clear(folder)
    assert built(folder, 3.0).state == "nothing"
    (folder / "a_sm87.engine").write_bytes(b"engine")
    (folder / "a_sm87.timing").write_bytes(b"timings")
    assert look(folder).state == "missing", "nobody said that it is whole"
    made = built(folder, 3.0)
    assert (made.state, made.size_bytes, made.took_s) == ("built", 6, 3.0)
    keep(folder, key, 3.0)
    assert (look(folder).state, look(folder).size_bytes) == ("cached", 6)

    note_unfit(folder, "golden: wrong")
    assert (look(folder).state, look(folder).reason) == ("unfit", "golden: wrong")
    keep(folder, key, 3.0)
    (folder / "a_sm87.engine").write_bytes(b"half")
    assert look(folder).state == "missing"
    (folder / "engine.json").write_text("{")
    assert look(folder).state == "missing"
    clear(folder)
    assert [path.name for path in folder.iterdir()] == ["a_sm87.timing"]


def test_engines_of_models_that_are_gone_are_removed(tmp_path: Path) -> None:
    for versions in ("trt-1", "trt-2"):
        for name in ("a" * 16, "b" * 16):
            (tmp_path / "tensorrt" / versions / f"{name}-01234567").mkdir(parents=True)
    forget_engines(tmp_path, ["a" * 64])
    assert sorted({folder.name for folder in tmp_path.glob("tensorrt/*/*")}) == [f"{'a' * 16}-01234567"]
    forget_engines(tmp_path / "none", [])
