"""How many workers a model has, and on which cores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.errors import SettingsError
from aios_edge.profile import DeviceProfile, Provider, Threads
from aios_edge.profile_files import load_profile
from device_agent.cores import cores_allowed
from device_agent.crew_size import crew_size, own_cpus
from device_agent.hosting import check_policy, open_entry, worker_spec
from device_agent.settings import BundleEntry, Settings, parse_settings

CPU = ("CPUExecutionProvider",)


@given(threads=st.integers(1, 16), cores=st.integers(1, 64))
def test_auto_leaves_each_worker_the_cores_of_its_threads(threads: int, cores: int) -> None:
    workers = crew_size("auto", threads=threads, cores=cores, providers=CPU)
    assert workers == 1 or workers * threads <= cores < (workers + 1) * threads
    assert crew_size("auto", threads=threads, cores=cores, providers=("CUDAExecutionProvider", *CPU)) == 1
    assert crew_size(3, threads=threads, cores=cores, providers=("CUDAExecutionProvider", *CPU)) == 3


@given(cpus=st.sets(st.integers(0, 63), max_size=16).map(sorted), workers=st.integers(1, 8), threads=st.integers(1, 4))
def test_cpus_are_shared_out_where_there_are_enough(cpus: list[int], workers: int, threads: int) -> None:
    shares = [own_cpus(cpus, number, workers, threads) for number in range(workers)]
    if workers * threads > len(cpus) or workers == 1:
        assert shares == [tuple(cpus)] * workers
    else:
        assert all(threads <= len(share) <= len(shares[0]) + 1 for share in shares)
        assert [cpu for share in shares for cpu in share] == cpus


def tree(root: Path, group: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Roots of /proc and /sys."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(group)
    for name, content in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root / "proc", root / "sys"


MASK = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "20000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "max 100000\n", "cpu.max": "nonsense"}, MASK),
        ("0::/a\n", {"a/cpu.max": f"{10 * MASK}00000 100000\n"}, MASK),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "100000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 1),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, MASK),
        ("", {}, MASK),
    ],
)
def test_a_control_group_that_grants_less_time_leaves_fewer_cores(
    tmp_path: Path, group: str, files: dict[str, str], cores: int
) -> None:
    assert cores_allowed((), *tree(tmp_path, group, files)) == cores


def test_the_profiles_cpus_and_the_agents_own_mask_count(tmp_path: Path) -> None:
    roots = tree(tmp_path, "", {})
    mine = sorted(os.sched_getaffinity(0))
    assert cores_allowed(mine[:1], *roots) == 1
    assert cores_allowed([*mine, 4095], *roots) == MASK


def settings(device: str = "", bundle: str = "") -> Settings:
    text = f'[device]\nid = "d"\nprofile = "x86-gateway"\n{device}\n[[bundle]]\npath = "b"\n{bundle}\n'
    return parse_settings(text, where="agent.toml", base=Path("/base"))


@pytest.mark.parametrize(
    ("device", "bundle", "profile", "workers"),
    [
        ("", "", 1, 1),
        ("", "", 3, 3),
        ("workers = 2", "", 3, 2),
        ("workers = 2", "workers = 4", 3, 4),
        ("workers = 2", "workers = 1", 3, 1),
        ("", 'workers = "auto"', 1, MASK),
        ('workers = "auto"', "", 3, MASK),
    ],
)
def test_the_model_says_it_else_the_device_else_its_class(
    tiny_bundle: Any, device: str, bundle: str, profile: int, workers: int
) -> None:
    told = settings(device, bundle)
    kind = msgspec.structs.replace(load_profile("x86-gateway"), threads=Threads(workers=profile))
    assert spec(told, kind, tiny_bundle).workers == workers
    gpu = msgspec.structs.replace(kind, providers=(Provider(name="CUDAExecutionProvider"), *kind.providers))
    assert spec(told, gpu, tiny_bundle).workers == (1 if "auto" in device + bundle else workers)


def spec(told: Settings, kind: DeviceProfile, bundle: Any) -> Any:
    entry = msgspec.structs.replace(told.bundle[0], path=bundle.path)
    return worker_spec(told, kind, entry, open_entry(BundleEntry(path=bundle.path)), state_dir=None)


@pytest.mark.parametrize("wrong", ["0", "-1", "65", '"many"', "1.5", "true"])
@pytest.mark.parametrize("table", ["device", "bundle"])
def test_what_is_no_number_of_workers_is_refused(table: str, wrong: str) -> None:
    with pytest.raises(SettingsError, match="workers"):
        settings(**{table: f"workers = {wrong}"})


def test_a_model_inside_the_agent_has_one(tiny_bundle: Any) -> None:
    thread = msgspec.structs.replace(load_profile("x86-gateway"), isolation="thread")
    assert spec(settings('workers = "auto"'), thread, tiny_bundle).workers == 1
    with pytest.raises(SettingsError, match="needs worker processes"):
        spec(settings("", "workers = 2"), thread, tiny_bundle)
    with pytest.raises(SettingsError, match=r"needs worker processes.*\n?.*isolation = process"):
        check_policy(settings("workers = 2"), thread)
