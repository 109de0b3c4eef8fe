"""``aios-edge bench`` on a real bundle, and energy from a captured counter that moves."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aios_edge.host import matches
from aios_edge.manifest import SessionSpec
from aios_edge.profile import Power, PowerEstimate
from device_agent.bench_energy import measure_energy
from device_agent.power.meter import PowerMeter
from device_agent.power.reading import PowerReading


def aios_edge(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aios_edge.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def sensorless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gateway's profile without power sources that this test would have to wait for."""
    from aios_edge.profile_files import _folder

    text = (_folder() / "x86-gateway.toml").read_text()
    text = text.replace('sources = ["rapl", "estimate"]', 'sources = ["estimate"]')
    path = tmp_path_factory.mktemp("profile") / "sensorless.toml"
    path.write_text(text.replace('name = "x86-gateway"', 'name = "sensorless"'))
    return path


def test_bench_prints_one_document_with_all_promised_keys(tiny_bundle: Any, sensorless: Path) -> None:
    done = aios_edge("bench", str(tiny_bundle.path), "--profile", str(sensorless), "--duration", "1", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    latency = document["latency_s"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert document["throughput_per_s"] > 0
    assert document["rss_bytes"] > 10_000_000
    assert document["host"]["arch"] and document["method"]
    assert (document["energy_j_per_inference"] is None) == (document["energy"]["reason"] is not None)
    assert document["energy"]["method"] == "estimated"
    assert document["spread"]["p50_s"][0] <= latency["p50"] <= document["spread"]["p50_s"][1]
    shapes = [(shape["batch"], shape["length"]) for shape in document["shapes"]]
    assert shapes[0] == (document["batch"], document["length"])
    assert len(shapes) == len(set(shapes)) > 2
    assert document["speedup"] is None and document["compared"] is None


@pytest.mark.long
def test_bench_names_the_candidate_and_what_it_was_compared_with_on_which_provider(
    make_bundle: Any, tiny_bundle: Any, sensorless: Path
) -> None:
    from aios_edge.measurement import Measurement, model_of
    from aios_edge.profile_files import load_profile

    arguments = ("bench", str(tiny_bundle.path), "--profile", str(sensorless), "--duration", "0.2")
    done = aios_edge(*arguments, "--against", str(make_bundle(name="other").path), "--json")
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=Measurement)
    assert (found.bundle_id, found.candidate, found.precision) == (tiny_bundle.bundle_id, "fp32", "fp32")
    assert found.model_sha256 == model_of(tiny_bundle.manifest)
    assert found.compared is not None and found.speedup == found.compared.speedup
    assert 0.2 < found.compared.speedup < 5 and found.compared.model_sha256 == found.model_sha256
    assert found.compared.providers_active == found.providers_active == ("CPUExecutionProvider",)
    assert found.session.intra_op_threads == found.threads == load_profile(sensorless).threads.intra_op
    assert found.measured_on.matches_profile == matches(load_profile(sensorless), found.host).ok
    assert found.measured_on.runtime.startswith("onnxruntime ")
    person = aios_edge(*arguments)
    assert "speed-up    not measured" in person.stdout and "candidate   fp32" in person.stdout


def test_bundles_on_other_threads_are_not_compared(make_bundle: Any, tiny_bundle: Any, sensorless: Path) -> None:
    other = make_bundle(session=SessionSpec(intra_op_threads=2))
    done = aios_edge(
        "bench", str(tiny_bundle.path), "--profile", str(sensorless), "--duration", "0.2", "--against", str(other.path)
    )
    assert done.returncode == 2 and "runs on 2 thread(s), the measured bundle on 1" in done.stderr


def test_bench_without_json_speaks_to_a_person(tiny_bundle: Any, sensorless: Path) -> None:
    done = aios_edge("bench", str(tiny_bundle.path), "--profile", str(sensorless), "--duration", "0.5")
    assert done.returncode == 0, done.stderr
    assert "latency     p50" in done.stdout and "batch  length" in done.stdout


def test_bench_refuses_a_bad_bundle_with_its_check_and_exit_code_3(tiny_copy: Path) -> None:
    (tiny_copy / "stranger").write_text("x")
    done = aios_edge("bench", str(tiny_copy), "--json")
    assert done.returncode == 3 and "[unlisted]" in done.stderr
    document = json.loads(done.stdout)
    assert document["check"] == "unlisted" and "stranger" in document["error"]


class Steady(PowerMeter):
    """A sensor that always says the same, or nothing."""

    def __init__(self, *watts: float | None) -> None:
        super().__init__()
        self._watts = itertools.cycle(watts)

    def sample(self) -> PowerReading:
        watts = next(self._watts)
        method = "unknown" if watts is None else "measured"
        return PowerReading(at_s=0.0, total_w=watts, total_method=method, total_source="test", reason="no sensor")


def test_energy_is_power_times_time_over_inferences() -> None:
    energy = measure_energy(lambda: sum(range(1000)), Steady(10.0), inferences_per_call=4, run_s=0.1)
    assert energy.method == "measured" and energy.repeats == 3
    assert energy.j_per_inference is not None and energy.spread_j is not None
    assert 0 < energy.j_per_inference < 10.0 * 0.1
    assert energy.spread_j[0] <= energy.j_per_inference <= energy.spread_j[1]
    assert energy.active_j_per_inference == pytest.approx(0.0)


def test_without_a_power_source_energy_is_null_with_a_reason() -> None:
    energy = measure_energy(lambda: None, Steady(None), run_s=0.1)
    assert energy.j_per_inference is None
    assert energy.reason == "no sensor"


def test_a_model_of_power_from_cpu_time_is_marked_estimated() -> None:
    power = Power(sources=("estimate",), estimate=PowerEstimate(idle_w=1.0, busy_w=5.0, source="a test"))
    energy = measure_energy(lambda: sum(range(10_000)), PowerMeter(power), run_s=0.3)
    assert energy.method == "estimated"
    assert energy.repeats == 1
    assert energy.idle_w == 1.0
