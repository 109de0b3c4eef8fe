"""What a bundle asks of TensorRT, what the agent adds, and that onnxruntime is handed both."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scripted_onnxruntime import CPU, CUDA, TENSORRT, ScriptedOrt

from aios_edge.bundle.read import open_bundle
from aios_edge.errors import BundleRefused
from aios_edge.profile import Provider
from aios_edge.profile_files import load_profile
from device_agent import runtime as module
from device_agent.engine_cache import model_digest
from device_agent.provider_chain import provider_chain

ASKED = {
    TENSORRT: {
        "trt_profile_min_shapes": "input_ids:1x1",
        "trt_fp16_enable": False,
        "trt_int8_enable": True,
        "trt_engine_cache_enable": True,
        "trt_timing_cache_enable": True,
    }
}


def test_a_bundles_options_lie_over_the_profiles_and_caches_in_the_agents_folder(tmp_path: Path) -> None:
    profile = load_profile("jetson-orin-nano")
    chain = provider_chain(profile.providers, ASKED, tmp_path)
    assert [provider.name for provider in chain] == [provider.name for provider in profile.providers]
    options = chain[0].options
    assert options["trt_layer_norm_fp32_fallback"] is True  # the profile's
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == (False, True)  # the bundle's
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)
    assert chain[1:] == profile.providers[1:]


def test_without_a_folder_nothing_is_cached_in_the_working_directory() -> None:
    options = provider_chain(load_profile("jetson-orin-nano").providers, ASKED, None)[0].options
    assert options["trt_engine_cache_enable"] is options["trt_timing_cache_enable"] is False
    assert not [name for name in options if name.endswith("_path")]


def test_a_profile_may_name_its_own_place_for_the_caches(tmp_path: Path) -> None:
    own = Provider(name=TENSORRT, options={"trt_engine_cache_enable": True, "trt_engine_cache_path": "/engines"})
    (chained,) = provider_chain((own,), {}, tmp_path)
    assert chained.options["trt_engine_cache_path"] == "/engines"


def test_onnxruntime_is_handed_the_merged_options(
    make_bundle: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import onnxruntime

    bundle = make_bundle(profile="jetson-orin-nano", provider_options=ASKED)
    made = ScriptedOrt(onnxruntime)
    monkeypatch.setattr(module, "_onnxruntime", lambda: made)
    module.open_runtime(bundle, load_profile("jetson-orin-nano"), state_dir=tmp_path)
    (options,) = made.options
    assert made.asked == [(TENSORRT, CUDA, CPU)]
    assert options["trt_int8_enable"] == "1" and options["trt_fp16_enable"] == "0"
    assert options["trt_profile_min_shapes"] == "input_ids:1x1"
    assert Path(options["trt_engine_cache_path"]).name.startswith(model_digest(bundle)[:16])
    assert Path(options["trt_engine_cache_path"]).is_relative_to(tmp_path / "tensorrt")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({TENSORRT: {"trt_extra_plugin_lib_paths": "/tmp/evil.so"}}, "trt_extra_plugin_lib_paths"),
        ({TENSORRT: {"trt_engine_cache_path": "/etc"}}, "trt_engine_cache_path"),
        ({"CUDAExecutionProvider": {"device_id": 1}}, "CUDAExecutionProvider"),
    ],
)
def test_what_is_not_a_bundles_to_set_is_refused_by_schema(make_bundle: Any, options: Any, says: str) -> None:
    with pytest.raises(BundleRefused, match=says) as refused:
        make_bundle(provider_options=options)
    assert refused.value.promise == "schema"


def test_bundles_of_schema_1_0_keep_loading_and_cannot_be_given_options(tiny_copy: Path) -> None:
    from dataclasses import replace

    from aios_edge.bundle.checks import manifest_sha256
    from aios_edge.digest import sha256_file
    from aios_edge.golden import encode_golden, read_golden

    path = tiny_copy / "manifest.json"
    old = {**msgspec.json.decode(path.read_bytes()), "schema": "1.0"}
    for name in ("purpose", "provider_options"):
        del old[name]
    for name in ("intra_op_threads", "inter_op_threads", "spinning"):
        del old["session"][name]
    golden = tiny_copy / "golden.npz"
    golden.write_bytes(encode_golden(replace(read_golden(golden), manifest_sha256=manifest_sha256(old))))
    for entry in old["files"]:
        if entry["path"] == "golden.npz":
            entry.update(sha256=sha256_file(golden), size_bytes=golden.stat().st_size)
    path.write_bytes(msgspec.json.encode(old))
    assert open_bundle(tiny_copy).manifest.purpose == "serve"
    path.write_bytes(msgspec.json.encode({**old, "schema": "1.9", "colour": "green"}))  # for newer readers
    assert open_bundle(tiny_copy).manifest.schema == "1.9"
    for change in ({"purpose": "measure"}, {"provider_options": ASKED}):
        path.write_bytes(msgspec.json.encode({**old, **change}))
        with pytest.raises(BundleRefused) as refused:
            open_bundle(tiny_copy)
        assert refused.value.promise == "manifest"


def test_a_running_agent_forgets_engines_of_what_is_not_configured(
    make_bundle: Any, tmp_path: Path, agent_toml: Any
) -> None:
    from aios_edge.profile_files import _folder
    from device_agent import Agent, load_settings

    text = (_folder() / "x86-gateway.toml").read_text()
    chain = f'[[providers]]\nname = "{TENSORRT}"\n[providers.options]\ntrt_engine_cache_enable = true\n\n[[providers]]'
    profile = tmp_path / "with-tensorrt.toml"
    renamed = text.replace('name = "x86-gateway"', 'name = "with-tensorrt"').replace("[[providers]]", chain, 1)
    profile.write_text(renamed, encoding="utf-8")
    bundle = make_bundle(profile="with-tensorrt", provider_options=ASKED)
    (tmp_path / "agent.toml").write_text(agent_toml(bundle=bundle.path, profile=profile), encoding="utf-8")
    settings = load_settings(tmp_path / "agent.toml")
    gone = settings.device.state_dir / "tensorrt/trt-1_driver-1_ort-1" / ("0" * 16)

    assert asyncio.run(Agent(settings).check()).error is None
    assert not settings.device.state_dir.exists()  # a check leaves nothing behind

    async def served() -> None:
        agent = Agent(settings)
        running = asyncio.create_task(agent.run())
        await asyncio.wait_for(agent.ready.wait(), 60)
        agent.shut_down()
        await running

    gone.mkdir(parents=True)
    asyncio.run(served())
    assert not list(settings.device.state_dir.glob("tensorrt/*/*"))
