"""Hosts under fixtures/hosts were composed from published cpuinfo listings and device tree sources, not captured
on our own boards; replace one by a real capture whenever a board is at hand.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_edge.host import Host, describe, inspect_host, matches
from aios_edge.profile_detect import detect
from aios_edge.profile_files import load_profile, shipped_profiles

HOSTS = Path(__file__).parents[1] / "fixtures" / "hosts"
PROFILES = [load_profile(name) for name in shipped_profiles()]

CAPTURED = {
    "rpi4": "rpi4",
    "rpi5": "rpi5",
    "jetson-nano": "jetson-nano",
    "jetson-xavier-nx": "jetson-xavier-nx",
    "jetson-orin-nano": "jetson-orin-nano",
    "jetson-agx-orin": "jetson-agx-orin",
    "jetson-thor": "jetson-thor",
    "arm64-board": "arm64-gateway",
    "arm64-512mb": "low-power-linux",
    "x86-avx2": "x86-gateway",
    "x86-avx512vnni": "x86-vnni",
    "x86-avxvnni": "x86-vnni",
    "x86-no-avx": None,
    "x86-512mb": "low-power-linux",
}


def captured(name: str) -> Host:
    return inspect_host(HOSTS / name / "proc", HOSTS / name / "sys")


def test_every_captured_host_has_an_expectation() -> None:
    assert {path.name for path in HOSTS.iterdir()} == set(CAPTURED)


@pytest.mark.parametrize(("name", "expected"), CAPTURED.items())
def test_the_captured_host_is_recognised(name: str, expected: str | None) -> None:
    found = detect(captured(name), PROFILES)
    assert found.name == expected
    assert found.why
    assert len(found.others) == len(PROFILES) - (expected is not None)
    assert all(other.lacking for other in found.others)


def test_a_cloud_profile_is_never_proposed() -> None:
    clouds = [profile for profile in PROFILES if profile.name.startswith("cloud")]
    for name in CAPTURED:
        assert detect(captured(name), clouds).name is None


def test_a_host_without_avx2_is_told_what_it_lacks() -> None:
    found = detect(captured("x86-no-avx"), PROFILES)
    lacking = {other.name: other.lacking for other in found.others}
    assert lacking["x86-gateway"] == ("the CPU lacks avx2",)
    assert "avx512_vnni or avx_vnni" in lacking["x86-vnni"][0]


def test_a_faster_class_of_cpu_does_not_speak_for_a_slower_one() -> None:
    for name, flag in (("x86-avx512vnni", "avx512_vnni"), ("x86-avxvnni", "avx_vnni")):
        found = matches(load_profile("x86-gateway"), captured(name))
        assert found == (False, (f"the CPU has {flag}, which this class doesn't",))
    assert matches(load_profile("x86-gateway"), captured("x86-avx2")).ok


def test_a_gpu_is_asked_for_only_where_the_profile_does() -> None:
    profile = load_profile("cloud-gpu")
    host = captured("x86-avx2")
    assert matches(profile, host) == (False, ("no NVIDIA GPU was found",))
    ok, reasons = matches(profile, dataclasses.replace(host, gpu=True))
    assert ok and "an NVIDIA GPU" in reasons


def test_unknown_memory_is_not_little_memory() -> None:
    host = dataclasses.replace(captured("x86-512mb"), memory_bytes=None)
    assert matches(load_profile("low-power-linux"), host).reasons == ("the amount of memory is unknown",)


@given(st.permutations(PROFILES), st.sampled_from(sorted(CAPTURED)))
@settings(max_examples=50, deadline=None)
def test_the_order_of_profiles_does_not_matter(profiles: list[msgspec.Struct], name: str) -> None:
    assert detect(captured(name), profiles) == detect(captured(name), PROFILES)  # type: ignore[arg-type]


def test_the_facts_of_a_captured_host() -> None:
    nano = captured("jetson-orin-nano")
    assert nano.arch == "aarch64" and nano.cores == 6 and nano.gpu
    assert nano.cpu_model == "Cortex-A78AE"
    assert nano.memory_bytes == 7802740 * 1024
    assert nano.device_tree[-1] == "nvidia,tegra234"
    assert describe(nano) == ("Cortex-A78AE, aarch64, 6 cores, 8.0 GB, nvidia,p3768-0000+p3767-0005-super, NVIDIA GPU")
    xeon = captured("x86-avx512vnni")
    assert xeon.arch == "x86_64" and "avx512_vnni" in xeon.cpu_flags and not xeon.gpu


def test_nothing_readable_is_a_host_with_unknowns(tmp_path: Path) -> None:
    host = inspect_host(tmp_path, tmp_path)
    assert host.cpu_model is None and host.memory_bytes is None and host.device_tree == ()
    assert "unknown CPU" in describe(host) and "memory unknown" in describe(host)
    assert detect(host, PROFILES).name in (None, "arm64-gateway")


def test_this_machine_is_inspected() -> None:
    host = inspect_host()
    assert host.arch == platform.machine()
    assert host.cores >= 1 and host.memory_bytes and host.python == platform.python_version()
