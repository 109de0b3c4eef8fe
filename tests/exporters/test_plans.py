"""Which candidates a profile gets, and in which types."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from aios_edge.errors import ProfileError, RecipeError
from aios_edge.profile_files import load_profile
from exporters.plans import by_precision, of_pruned, plans_for
from exporters.recipe import SearchSection, parse_recipe

pytestmark = pytest.mark.export


def names(profile: str, *asked: str) -> list[str]:
    return [plan.name for plan in plans_for(load_profile(profile), SearchSection(candidates=asked))]


@pytest.mark.parametrize(
    ("arch", "flags", "wanted"),
    [
        ("x86_64", ("avx2", "avx512_vnni|avx_vnni"), "dynamic-s8"),
        ("x86_64", ("avx2", "amx_int8"), "dynamic-s8"),
        ("x86_64", ("avx2",), "dynamic-s8-r7"),
        ("x86_64", (), "dynamic-s8-r7"),
        ("x86_64", ("avx2|avx_vnni",), "dynamic-s8-r7"),  # one of them has no VNNI
        ("any", (), "dynamic-s8-r7"),
        ("aarch64", (), "dynamic-s8"),
        ("armv7l", (), "dynamic-s8"),
    ],
)
def test_cpu_flags_decide_how_many_bits_a_weight_may_have(arch: str, flags: tuple[str, ...], wanted: str) -> None:
    profile = msgspec.structs.replace(load_profile("x86-vnni"), arch=arch, cpu_flags=flags)
    assert plans_for(profile)[0].name == wanted
    for said, name in {False: "dynamic-s8", True: "dynamic-s8-r7"}.items():
        assert plans_for(msgspec.structs.replace(profile, reduce_range=said))[0].name == name


def test_a_recipe_asks_for_more_than_a_profile_prefers() -> None:
    assert names("x86-vnni", "qdq-u8s8", "dynamic-s8-e2") == ["dynamic-s8", "fp32", "qdq-u8s8", "dynamic-s8-e2"]
    assert names("x86-gateway", "qdq-u8s8")[-1] == "qdq-u8s8-r7"
    assert names("x86-gateway", "qdq-u8s8-mixed")[-1] == "qdq-u8s8-mixed-r7"
    assert names("arm64-gateway", "dynamic-s8-e4") == names("arm64-gateway")  # preferred already
    assert names("jetson-nano", "qdq-s8-sym", "qdq-u8s8") == ["fp16", "fp32", "qdq-s8-sym"]  # zero points for TensorRT


def test_an_unknown_candidate_names_the_nearest() -> None:
    document = {"model": {"source": "m"}, "data": {"train": "t.csv"}, "search": {"candidates": ["qdq-u8"]}}
    with pytest.raises(RecipeError, match=r"unknown candidate 'qdq-u8'.*Did you mean 'qdq-u8s8'"):
        parse_recipe(document, folder=Path())
    wrong = msgspec.structs.replace(load_profile("x86-vnni"), precision_preference=("int8",))
    with pytest.raises(ProfileError, match="unknown precision 'int8'"):
        plans_for(wrong)


def test_a_pruned_network_gets_each_precision_the_largest_of_each_first() -> None:
    def pruned(profile: str, *preferred: str) -> list[list[str]]:
        found = load_profile(profile)
        found = msgspec.structs.replace(found, precision_preference=preferred or found.precision_preference)
        return [[plan.name for plan in alike] for alike in by_precision(of_pruned(plans_for(found)))]

    assert pruned("x86-gateway") == [["dynamic-s8-e4-r7", "dynamic-s8-e2-r7"]]
    assert pruned("x86-vnni", "static-s8", "fp32", "dynamic-s8-e2", "qdq-u8s8-mixed", "qdq-u8s8") == [
        ["dynamic-s8-e2"],
        ["qdq-u8s8"],
    ]
    assert pruned("jetson-orin-nano") == [["fp16"], ["qdq-s8-sym"]]
    assert pruned("cloud-cpu") == [["fp32"]]  # nothing else is there
