"""Raspberry Pi's firmware, asked through ``vcgencmd``: the Pi 5's power chip, and throttling on every Pi."""

from __future__ import annotations

import re
import shutil
import subprocess

from device_agent.power.boards import plausible
from device_agent.power.reading import Collected, Rail, Skipped, Total

NAME = "pmic"
MAX_W = 40.0  # the Pi 5's supply gives 27
_LINE = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=(-?[0-9.]+)[AV]\s*$", re.MULTILINE)

#: Bits of ``get_throttled``: now, and 16 bits higher the same since boot.
_BITS = {0: "under_voltage", 1: "frequency_capped", 2: "throttled", 3: "soft_temperature_limit"}


def collect() -> Collected:
    """Rails that have both a current and a voltage, and their sum. Supplies of USB devices are not among them."""
    said = _ask("pmic_read_adc")
    if said is None:
        return Collected()
    if isinstance(said, Skipped):
        return Collected(skipped=(said,), total=Total(source=NAME, reason=said.reason))
    amperes: dict[str, float] = {}
    volts: dict[str, float] = {}
    for name, unit, value in _LINE.findall(said):
        (amperes if unit == "A" else volts)[name] = float(value)
    source = "vcgencmd pmic_read_adc"
    rails = tuple(
        Rail(name=name, power_w=current * volts[name], source=source)
        for name, current in amperes.items()
        if name in volts
    )
    if not rails:
        reason = f"no rails in its answer (only a Pi 5 has the chip): {said[:80]!r}"
        return Collected(skipped=(Skipped(path=source, reason=reason),), total=Total(source=NAME, reason=reason))
    label = f"{NAME}: sum of {len(rails)} rails behind the power chip, without conversion losses and USB devices"
    total, rejected = plausible(
        sum(rail.power_w for rail in rails), method="sum_of_rails", source=label, max_w=MAX_W, path=source
    )
    return Collected(rails=rails, skipped=rejected, total=total)


def throttling() -> tuple[bool, tuple[str, ...]] | Skipped | None:
    """Whether the firmware holds the processor back now, and all flags; None without ``vcgencmd``."""
    said = _ask("get_throttled")
    if said is None or isinstance(said, Skipped):
        return said
    match = re.search(r"throttled=0x([0-9a-fA-F]+)", said)
    if match is None:
        return Skipped(path="vcgencmd get_throttled", reason=f"is not understood: {said[:80]!r}")
    bits = int(match[1], 16)
    now = [name for bit, name in _BITS.items() if bits >> bit & 1]
    since_boot = [f"{name}_since_boot" for bit, name in _BITS.items() if bits >> (bit + 16) & 1]
    return bool(now), (*now, *since_boot)


def _ask(question: str) -> str | Skipped | None:
    command = shutil.which("vcgencmd")
    if command is None:
        return None
    try:
        done = subprocess.run(
            [command, question], capture_output=True, text=True, errors="replace", timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Skipped(path=f"vcgencmd {question}", reason=f"does not answer: {error}")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[:120]
        return Skipped(path=f"vcgencmd {question}", reason=f"failed with {done.returncode}: {said}")
    return done.stdout
