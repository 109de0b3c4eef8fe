from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aios_edge
from aios_edge.errors import AiosEdgeError, ProfileError
from aios_edge.profile import DeviceProfile
from aios_edge.profile_files import check_profile, load_profile, shipped_profiles

REPOSITORY = Path(__file__).parents[2]

GOOD = """\
schema = "1.0"
name = "mine"
title = "A test device"
arch = "aarch64"
precision_preference = ["dynamic-s8", "fp32"]
quantization = "dynamic-s8"
[[providers]]
name = "CPUExecutionProvider"
[threads]
intra_op = 1
[budgets]
latency_p95_s = 0.1
"""

ISSUE_2 = {
    "x86-gateway",
    "x86-vnni",
    "rpi4",
    "rpi5",
    "arm64-gateway",
    "low-power-linux",
    "jetson-nano",
    "jetson-xavier-nx",
    "jetson-orin-nano",
    "jetson-agx-orin",
    "jetson-thor",
    "cloud-cpu",
    "cloud-gpu",
}


def fault(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ProfileError) as caught:
        check_profile(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_promised_profiles_are_shipped() -> None:
    assert set(shipped_profiles()) >= ISSUE_2


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_shipped_profile_is_valid_and_named_like_its_file(name: str) -> None:
    profile = aios_edge.load_profile(name)
    assert profile.name == name
    assert profile.providers[-1].name == "CPUExecutionProvider"
    assert profile.budgets.latency_p95_s and profile.budgets.memory_bytes and profile.budgets.bundle_size_bytes


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_shipped_figure_says_where_it_comes_from(name: str) -> None:
    lines = (REPOSITORY / "profiles" / f"{name}.toml").read_text().splitlines()
    for previous, line in pairwise(lines):
        if re.match(r"(latency_p95_s|memory_bytes|bundle_size_bytes|power_w) =", line):
            assert "#" in line or previous.startswith("#"), line


@pytest.mark.parametrize("name", [n for n in shipped_profiles() if n.startswith("jetson")])
def test_jetsons_run_symmetric_fp16_first_down_the_chain(name: str) -> None:
    profile = load_profile(name)
    assert [p.name[:4] for p in profile.providers] == ["Tens", "CUDA", "CPUE"]
    assert profile.precision_preference[0] == "fp16"
    assert profile.quantization in ("symmetric-s8", "none")


def test_a_cloud_profile_admits_an_fp32_model() -> None:
    profile = load_profile("cloud-cpu")
    assert profile.precision_preference == ("fp32",)
    assert (profile.budgets.bundle_size_bytes or 0) >= 120_000_000
    assert profile.match.rank < 0


def test_x86_without_vnni_keeps_weights_to_seven_bits() -> None:
    assert load_profile("x86-gateway").weights_in_7_bits
    assert not load_profile("x86-vnni").weights_in_7_bits


def test_an_unknown_profile_names_the_nearest_and_all(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"did you mean 'jetson-orin-nano'.*rpi5"):
        load_profile("jetson-orin-nan")


def test_a_path_is_read_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert load_profile(path).name == load_profile(str(path)).name == "mine"
    with pytest.raises(ProfileError, match="can't be read"):
        load_profile(tmp_path / "none.toml")
    with pytest.raises(ProfileError, match="can't be read"):
        load_profile(tmp_path)


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        ("title =", "titel =", r"'titel' \(did you mean 'title'"),
        ("intra_op", "intraop", r"'threads.intraop' \(did you mean 'intra_op'"),
        ("latency_p95_s", "latency_p95", r"'budgets.latency_p95' \(did you mean 'latency_p95_s'"),
        ('name = "CPU', 'nane = "CPU', r"'providers\[0\].nane' \(did you mean 'name'"),
        ("intra_op = 1", 'intra_op = "one"', r"Expected `int`, got `str` at 'threads.intra_op'"),
        ('"1.0"', "1.0", r"at 'schema'"),
        ('"1.0"', '"2.0"', "schema: is '2.0'"),
        ('"dynamic-s8"\n', '"int4"\n', "Invalid enum value 'int4' at 'quantization'"),
        ('["dynamic-s8", "fp32"]', '["dynamic-s9"]', "did you mean 'dynamic-s8'"),
        ('["dynamic-s8", "fp32"]', "[]", "precision_preference: is empty"),
        ('["dynamic-s8", "fp32"]', '["fp32", "fp32"]', "precision_preference: an entry is there twice"),
        ("intra_op = 1", "intra_op = 0", "threads.intra_op: is less than 1"),
        (
            '[[providers]]\nname = "CPUExecutionProvider"\n[threads]\n',
            'isolation = "thread"\n[[providers]]\nname = "CPUExecutionProvider"\n[threads]\nworkers = 2\n',
            "threads.workers: more than one needs isolation",
        ),
        ("intra_op = 1", "workers = 0", "threads.workers: is less than 1"),
        ("intra_op = 1", 'workers = "many"', "at 'threads.workers'"),
        ("intra_op = 1", "cpu_affinity = [1, 1]", "threads.cpu_affinity: an entry is there twice"),
        ("intra_op = 1", "cpu_affinity = [-1]", "threads.cpu_affinity: CPUs are numbered from 0"),
        ("intra_op = 1", "intra_op = 2\ncpu_affinity = [3]", "threads.cpu_affinity: 1 CPUs for 2 threads.intra_op"),
        ("= 0.1", "= -0.1", "budgets.latency_p95_s: -0.1 is not a positive number"),
        ("= 0.1", "= nan", "budgets.latency_p95_s"),
        ("= 0.1", "= 0.1\nmax_drop = 1.5", "budgets.max_drop"),
        ("CPUExecutionProvider", "cuda", "'cuda' doesn't end in 'ExecutionProvider'"),
        (
            "[[providers]]",
            '[[providers]]\nname = "CPUExecutionProvider"\n[[providers]]',
            "providers: an entry is there",
        ),
        ('"aarch64"', '"arm"', "arch: 'arm' is not one of"),
        ('"mine"', '"Mine/../x"', "name: takes"),
        ("[threads]", '[power]\nsources = ["raple"]\n[threads]', "did you mean 'rapl'"),
        ("[threads]", '[power]\nsources = ["estimate"]\n[threads]', "power.estimate: is missing"),
        (
            "[[providers]]",
            'cpu_flags = ["i8mm|sve"]\nmatch.without_cpu_flags = ["sve"]\n[[providers]]',
            "match.without_cpu_flags: sve is in cpu_flags as well",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, written: str, instead: str, said: str) -> None:
    assert re.search(said, fault(tmp_path, GOOD.replace(written, instead, 1)))


def test_all_wrong_values_are_reported_together(tmp_path: Path) -> None:
    text = fault(tmp_path, GOOD.replace("intra_op = 1", "intra_op = 0\nworkers = 0").replace("0.1", "-1"))
    assert all(key in text for key in ("threads.intra_op", "threads.workers", "budgets.latency_p95_s"))


def test_an_unknown_key_hides_no_wrong_value(tmp_path: Path) -> None:
    text = fault(tmp_path, GOOD.replace("intra_op = 1", "intra_op = 0\nspining = true").replace("0.1", "-1"))
    assert "unknown key 'threads.spining' (did you mean 'spinning'?)" in text
    assert "threads.intra_op: is less than 1" in text and "budgets.latency_p95_s: -1" in text
    text = fault(
        tmp_path, GOOD.replace("[[providers]]", "colour = 1\n[[providers]]\nnane = 1").replace("CPUE", "CPU E")
    )
    assert all(said in text for said in ("'colour'", "'providers[0].nane'", "providers[0].name: 'CPU Exec"))
    text = fault(tmp_path, GOOD.replace("intra_op = 1", 'intra_op = "one"\nspining = true'))
    assert "'threads.spining'" in text and "got `str` at 'threads.intra_op'" in text


def test_a_key_that_is_missing_because_it_is_mistyped_is_one_fault(tmp_path: Path) -> None:
    assert "missing required" not in fault(tmp_path, GOOD.replace("title =", "titel ="))


def test_a_file_that_is_not_utf_8_or_not_toml_names_the_line(tmp_path: Path) -> None:
    assert "line 3 is not UTF-8" in fault(tmp_path, GOOD.encode().replace(b"A test", b"\xe9 test"))
    assert re.search(r"line 4, column", fault(tmp_path, GOOD.replace('arch = "aarch64"', "arch = aarch64")))
    assert "line 2" in fault(tmp_path, 'a = 1\nb = "')
    assert "larger than" in fault(tmp_path, b"#" * (1 << 19))


def test_providers_may_not_be_empty(tmp_path: Path) -> None:
    text = GOOD.replace('[[providers]]\nname = "CPUExecutionProvider"\n', "").replace(
        "schema", "providers = []\nschema"
    )
    assert "providers: is empty" in fault(tmp_path, text)


def keys(struct: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(struct).items():
        inner = next(
            (
                c
                for c in (hint, *getattr(hint, "__args__", ()))
                if isinstance(c, type) and issubclass(c, msgspec.Struct)
            ),
            None,
        )
        if inner is None:
            yield prefix + name
        else:
            yield from keys(inner, f"{prefix}{name}[]." if "tuple" in str(hint) else f"{prefix}{name}.")


def test_every_field_is_explained_in_the_readme() -> None:
    table = (REPOSITORY / "profiles" / "README.md").read_text()
    missing = [key for key in keys(DeviceProfile) if f"| `{key}` |" not in table]
    assert missing == []


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_end_in_a_profile_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    with pytest.raises(AiosEdgeError):
        check_profile(path)
