from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.profile import Power, PowerEstimate
from device_agent.power import ina3221, meter, rapl
from device_agent.power.boards import board_total
from device_agent.power.estimate import CpuTimes, utilisation
from device_agent.power.meter import PowerMeter
from device_agent.power.reading import EnergyCounter, PowerReading, Rail

TREES = Path(__file__).parents[1] / "fixtures" / "power"
VCGENCMD = """#!/bin/sh
case "$1" in
pmic_read_adc) cat "{answer}" ;;
get_throttled) echo "throttled={bits}" ;;
esac
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _no_firmware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine this runs on, its own vcgencmd is out of reach."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def read(board: str) -> PowerReading:
    return PowerMeter(sys_root=TREES / board).sample()


def copied(board: str, to: Path) -> Path:
    return shutil.copytree(TREES / board, to / board)


@pytest.mark.parametrize(
    ("board", "total_w", "method", "rail"),
    [
        ("jetson-nano", 3.214, "measured", "POM_5V_IN"),
        ("jetson-xavier-nx", 5.080 * 1.144, "measured", "VDD_IN"),
        ("jetson-orin-nano", 4.968 * 1.216, "measured", "VDD_IN"),
        ("jetson-agx-orin", 19.160 * 0.208 + 4.992 * 0.728, "sum_of_rails", "VIN_SYS_5V0"),
        ("jetson-thor", 30.256, "measured", "VIN"),
    ],
)
def test_each_jetson_has_its_total_from_the_right_rails(board: str, total_w: float, method: str, rail: str) -> None:
    reading = read(board)
    assert reading.total_w == pytest.approx(total_w, abs=1e-4)
    assert reading.total_method == method
    assert rail in str(reading.total_source)


@pytest.mark.parametrize("how", ["class only", "linked", "copied"])
@pytest.mark.parametrize("board", ["jetson-orin-nano", "jetson-agx-orin", "jetson-xavier-nx"])
def test_a_monitor_is_found_in_its_class_and_counted_once(tmp_path: Path, board: str, how: str) -> None:
    tree, expected = copied(board, tmp_path), read(board)
    monitors = sorted(tree.glob("bus/i2c/devices/*/hwmon/hwmon*"))
    (tree / "class/hwmon").mkdir()
    for monitor in monitors:
        listed = tree / "class/hwmon" / monitor.name
        if how == "linked":  # as the kernel has it
            listed.symlink_to(monitor)
        else:  # as a tree that was captured with its links followed
            shutil.copytree(monitor, listed)
    if how == "class only":
        shutil.rmtree(tree / "bus")
    reading = PowerMeter(sys_root=tree).sample()
    rails = [(rail.name, rail.power_w) for rail in reading.rails]
    assert rails == [(rail.name, rail.power_w) for rail in expected.rails]
    assert (reading.total_w, reading.total_method) == (expected.total_w, expected.total_method)


def test_a_monitor_at_another_address_is_found(tmp_path: Path) -> None:
    tree = copied("jetson-orin-nano", tmp_path)
    (tree / "bus/i2c/devices/1-0040").rename(tree / "bus/i2c/devices/1-0043")
    assert PowerMeter(sys_root=tree).sample().total_w == read("jetson-orin-nano").total_w


def test_a_monitor_captured_without_its_name_is_known_by_its_address(tmp_path: Path) -> None:
    tree = copied("jetson-orin-nano", tmp_path)
    (name,) = tree.glob("bus/i2c/devices/1-0040/hwmon/hwmon*/name")
    name.unlink()
    assert PowerMeter(sys_root=tree).sample().total_w == read("jetson-orin-nano").total_w


def test_shunt_channels_and_negotiated_supplies_are_no_rails() -> None:
    assert [rail.name for rail in read("jetson-xavier-nx").rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert [rail.name for rail in read("jetson-orin-nano").rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]


def test_unconnected_channels_are_skipped_and_counted_nowhere() -> None:
    reading = read("jetson-agx-orin")
    assert "NC" not in {rail.name for rail in reading.rails}
    assert sum("not connected" in gap.reason for gap in reading.skipped) == 2


def test_unbelievable_zones_constants_and_gated_zones_are_skipped_with_a_reason() -> None:
    assert [zone.name for zone in read("jetson-xavier-nx").thermal] == ["CPU-therm", "AUX-therm"]
    reasons = " ".join(gap.reason for gap in read("jetson-xavier-nx").skipped)
    assert "-44 °C is not believable" in reasons and "PMIC-Die is a constant" in reasons
    gated = read("jetson-orin-nano")
    assert [zone.name for zone in gated.thermal] == ["cpu-thermal", "gpu-thermal", "tj-thermal"]
    assert any("cv0-thermal" in gap.reason for gap in gated.skipped)
    assert all(zone.temperature_c > 0 for zone in read("jetson-agx-orin").thermal)


@pytest.mark.parametrize(("milliamperes", "word"), [("-120", "negative"), ("0", "zero"), ("32760", "above")])
def test_an_implausible_total_is_null_and_stays_in_the_rails(tmp_path: Path, milliamperes: str, word: str) -> None:
    tree = copied("jetson-orin-nano", tmp_path)
    current = next(tree.glob("bus/i2c/devices/1-0040/hwmon/hwmon*/curr1_input"))
    current.write_text(milliamperes)
    reading = PowerMeter(sys_root=tree).sample()
    assert reading.total_w is None and reading.total_method == "unknown"
    assert word in str(reading.reason)
    assert reading.rails[0].power_w == pytest.approx(4.968 * int(milliamperes) / 1e3)
    assert any(word in gap.reason for gap in reading.skipped)


def test_a_missing_part_of_the_total_makes_it_unknown_never_smaller(tmp_path: Path) -> None:
    tree = copied("jetson-agx-orin", tmp_path)
    next(tree.glob("bus/i2c/devices/1-0040/hwmon/hwmon*/curr2_input")).write_text("broken")
    reading = PowerMeter(sys_root=tree).sample()
    assert reading.total_w is None and "VDD_CPU_CV" in str(reading.reason)
    assert any("is not a number" in gap.reason for gap in reading.skipped)


def test_rails_of_an_unknown_board_are_listed_and_not_summed() -> None:
    total, _ = board_total([Rail(name="A", power_w=1, source="x"), Rail(name="B", power_w=2, source="y")], "ina3221")
    assert total.total_w is None and "no known board" in str(total.reason)


def test_energy_counters_become_watts_between_two_samples(tmp_path: Path) -> None:
    tree, clock = copied("x86-rapl", tmp_path), Clock()
    power = PowerMeter(sys_root=tree, clock=clock)
    first = power.sample()
    assert first.total_w is None and rapl.NEEDS_TWO in str(first.reason)
    assert {counter.name: counter.energy_j for counter in first.energy}["package-0"] == 10_000
    clock.now += 2.0
    for zone, microjoules in (("0", 10_030_000_000), ("0:0", 4_012_000_000)):
        (tree / f"class/powercap/intel-rapl:{zone}/energy_uj").write_text(str(microjoules))
    second = power.sample()
    assert second.total_w == pytest.approx(15.0)  # the package alone: cores are inside it, psys is another view
    assert second.total_method == "measured"
    assert {rail.name: rail.power_w for rail in second.rails}["core"] == pytest.approx(6.0)
    assert second.throttled is False


def test_a_wrapped_counter_goes_on(tmp_path: Path) -> None:
    tree, clock = copied("x86-rapl", tmp_path), Clock()
    counter = tree / "class/powercap/intel-rapl:0/energy_uj"
    counter.write_text("262143000000")
    power = PowerMeter(sys_root=tree, clock=clock)
    power.sample()
    clock.now += 1.0
    counter.write_text("7000000")
    assert power.sample().total_w == pytest.approx(7.328850)


@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(1000, 2000))
def test_joules_are_never_negative_across_any_wrap(before: float, after: float, wraps_at: float) -> None:
    one = EnergyCounter(name="p", energy_j=before, source="s", wraps_at_j=wraps_at)
    used = rapl.used_j(one, EnergyCounter(name="p", energy_j=after, source="s", wraps_at_j=wraps_at))
    assert used is not None and 0 <= used <= wraps_at


def test_a_counter_that_stands_still_is_not_zero_watts(tmp_path: Path) -> None:
    clock = Clock()
    power = PowerMeter(sys_root=copied("x86-rapl", tmp_path), clock=clock)
    power.sample()
    clock.now += 1.0
    assert power.sample().total_w is None


def test_counters_that_may_not_be_read_are_skipped_with_the_reason() -> None:
    reading = read("x86-rapl-unreadable")
    assert reading.total_w is None and reading.energy == ()
    assert any("energy_uj" in gap.path for gap in reading.skipped)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_missing_permission_names_the_remedy(tmp_path: Path) -> None:
    tree = copied("x86-rapl", tmp_path)
    (tree / "class/powercap/intel-rapl:0/energy_uj").chmod(0)
    assert any("run as root" in gap.reason for gap in PowerMeter(sys_root=tree).sample().skipped)


def test_a_device_without_a_sensor_is_unknown_not_zero() -> None:
    reading = read("rpi4")
    assert (reading.total_w, reading.total_method) == (None, "unknown")
    assert reading.reason and reading.throttled is None and reading.throttled_reason


def test_no_temperature_has_a_reason(tmp_path: Path) -> None:
    assert "no thermal zone" in (PowerMeter(sys_root=tmp_path, proc_root=tmp_path).sample().thermal_reason or "")
    zone = tmp_path / "class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal")
    (zone / "temp").write_text("-999000")
    assert "not believable" in (PowerMeter(sys_root=tmp_path, proc_root=tmp_path).sample().thermal_reason or "")
    assert read("jetson-agx-orin").thermal_reason is None


def firmware(folder: Path, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = folder / "vcgencmd"
    command.write_text(VCGENCMD.format(answer=TREES / "rpi5-pmic_read_adc.txt", bits=bits))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_pi_5_sums_current_times_voltage_over_its_rails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    firmware(tmp_path, "0x50005", monkeypatch)
    reading = read("rpi5")
    assert reading.total_method == "sum_of_rails"
    assert len(reading.rails) == 12  # EXT5V and BATT have no current
    assert reading.total_w == pytest.approx(sum(rail.power_w for rail in reading.rails), abs=1e-5)
    assert reading.total_w == pytest.approx(2.246975, abs=1e-5)
    assert reading.throttled is True
    assert reading.throttled_flags == ("under_voltage", "throttled", "under_voltage_since_boot", "throttled_since_boot")


def test_what_happened_since_boot_is_not_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    firmware(tmp_path, "0x50000", monkeypatch)
    reading = read("rpi5")
    assert reading.throttled is False and len(reading.throttled_flags) == 2


def test_this_machines_firmware_says_nothing_about_another_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firmware(tmp_path, "0x1", monkeypatch)
    assert all("vcgencmd" not in rail.source for rail in read("jetson-orin-nano").rails)


@pytest.mark.parametrize(
    "body", ["exit 3", "echo 'error=1 error_msg=\"Command not registered\"'", "printf '\\377\\376'"]
)
def test_a_firmware_that_does_not_know_the_question_is_skipped(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firmware(tmp_path, "0x0", monkeypatch)
    (tmp_path / "vcgencmd").write_text(f"#!/bin/sh\n{body}\n")
    reading = read("rpi5")
    assert reading.total_w is None and any("vcgencmd" in gap.path for gap in reading.skipped)


MODEL = Power(sources=("estimate",), estimate=PowerEstimate(idle_w=2.0, busy_w=6.0, source="a data sheet"))


def stat(root: Path, busy: int, idle: int) -> None:
    root.mkdir(exist_ok=True)
    (root / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")


def test_an_estimate_is_linear_in_utilisation_and_says_so(tmp_path: Path) -> None:
    stat(tmp_path / "proc", 100, 900)
    power = PowerMeter(MODEL, sys_root=TREES / "rpi4", proc_root=tmp_path / "proc")
    assert power.sample().total_w is None
    stat(tmp_path / "proc", 150, 950)
    reading = power.sample()
    assert reading.cpu_utilisation == pytest.approx(0.5)
    assert reading.total_w == pytest.approx(4.0)
    assert reading.total_method == "estimated" and "a data sheet" in str(reading.total_source)
    assert (reading.idle_w, reading.idle_method, reading.active_w) == (2.0, "profile", pytest.approx(2.0))


def test_nothing_is_estimated_from_this_host_for_a_captured_tree() -> None:
    power = PowerMeter(MODEL, sys_root=TREES / "rpi4")
    power.sample()
    reading = power.sample()
    assert (reading.total_w, reading.cpu_utilisation) == (None, None)
    assert "nothing is estimated" in str(reading.reason)


@given(*[st.integers(0, 10**9)] * 4)
def test_utilisation_is_a_share_or_has_a_reason(busy: int, total: int, more_busy: int, more: int) -> None:
    share, reason = utilisation(CpuTimes(busy, total), CpuTimes(more_busy, more))
    assert (share is None) == (reason is not None)
    assert share is None or 0 <= share <= 1


def test_active_power_is_above_the_lowest_seen(tmp_path: Path) -> None:
    tree = copied("jetson-nano", tmp_path)
    power = PowerMeter(sys_root=tree)
    assert power.sample().active_w is None
    rail = next(tree.glob("bus/i2c/drivers/ina3221x/*/iio:device0/in_power0_input"))
    rail.write_text("5214")
    reading = power.sample()
    assert (reading.idle_w, reading.idle_method) == (3.214, "lowest_seen")
    assert reading.active_w == pytest.approx(2.0)


def test_a_source_that_breaks_is_reported_and_costs_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> None:
        raise RuntimeError("bus is on fire")

    monkeypatch.setattr(ina3221, "collect", broken)
    reading = read("jetson-thor")
    assert reading.total_w == pytest.approx(30.256)
    assert any("bus is on fire" in gap.reason for gap in reading.skipped)


def test_the_profile_chooses_the_sources() -> None:
    assert PowerMeter(Power(sources=("rapl",)), sys_root=TREES / "jetson-thor").sample().rails == ()
    assert set(meter.ALL_SOURCES) == {"ina238", "ina3221", "pmic", "rapl", "estimate"}
