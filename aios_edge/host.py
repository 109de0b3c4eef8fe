"""What this machine is, read from /proc and /sys, and whether a device profile speaks of it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aios_edge.profile import DeviceProfile


@dataclass(frozen=True, kw_only=True)
class Host:
    """The facts a profile is matched against.

    ``cpu_flags``: x86 ``flags`` or arm ``Features``. ``device_tree``: the compatible strings, most specific first;
    empty where there is no device tree. ``gpu``: an NVIDIA device node or a Tegra GPU is there, which doesn't prove
    that a provider for it works. ``memory_bytes`` is MemTotal: what the kernel has, a little less than is fitted.
    """

    arch: str
    cpu_model: str | None
    cpu_flags: frozenset[str]
    cores: int
    memory_bytes: int | None
    device_tree: tuple[str, ...]
    gpu: bool
    python: str


class Match(NamedTuple):
    """Whether a profile matches; ``reasons`` says what a host lacks, or what made it match."""

    ok: bool
    reasons: tuple[str, ...]


def inspect_host(proc_root: Path = Path("/proc"), sys_root: Path = Path("/sys"), arch: str | None = None) -> Host:
    """Read the machine under the given roots; a missing file leaves its fact empty, never an error.

    The architecture of a captured tree is told by the form of its cpuinfo, this machine's by the kernel.
    """
    text = _text(proc_root / "cpuinfo")
    first: dict[str, str] = {}
    cores = 0
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            first.setdefault(key.strip(), value.strip())
            cores += key.strip() == "processor"
    tree = _strings(proc_root / "device-tree" / "compatible")
    return Host(
        arch=arch or _arch(first, proc_root),
        cpu_model=first.get("model name") or _arm_model(first) or None,
        cpu_flags=frozenset((first.get("flags") or first.get("Features") or "").split()),
        cores=cores or 1,
        memory_bytes=_memory_bytes(proc_root / "meminfo"),
        device_tree=tree,
        gpu=_has_gpu(proc_root, sys_root),
        python=platform.python_version(),
    )


def matches(profile: DeviceProfile, host: Host) -> Match:
    """Whether a host belongs to a profile's class: architecture, CPU flags, board, memory, GPU. Pure."""
    lacking = []
    if profile.arch not in ("any", host.arch):
        lacking.append(f"architecture is {host.arch}, not {profile.arch}")
    # "a|b" asks for either: one feature under the names of two generations of CPUs
    if missing := [flag for flag in profile.cpu_flags if host.cpu_flags.isdisjoint(flag.split("|"))]:
        lacking.append(f"the CPU lacks {', '.join(missing).replace('|', ' or ')}")
    match = profile.match
    if excess := [flag for flag in match.without_cpu_flags if flag in host.cpu_flags]:
        lacking.append(f"the CPU has {', '.join(excess)}, which this class doesn't")
    board = next((name for name in host.device_tree if any(part in name for part in match.device_tree)), None)
    if match.device_tree and board is None:
        lacking.append(f"the device tree names none of {', '.join(match.device_tree)}")
    if match.max_memory_bytes is not None:
        if host.memory_bytes is None:
            lacking.append("the amount of memory is unknown")
        elif host.memory_bytes > match.max_memory_bytes:
            has, limit = host.memory_bytes / 1e6, match.max_memory_bytes / 1e6
            lacking.append(f"has {has:.0f} MB of memory, the class ends at {limit:.0f} MB")
    if match.gpu and not host.gpu:
        lacking.append("no NVIDIA GPU was found")
    if lacking:
        return Match(False, tuple(lacking))
    reasons = [f"architecture {host.arch}"]
    if profile.cpu_flags:
        present = [flag for entry in profile.cpu_flags for flag in entry.split("|") if flag in host.cpu_flags]
        reasons.append(f"CPU has {', '.join(present)}")
    if board is not None:
        reasons.append(f"device tree says {board}")
    if match.max_memory_bytes is not None and host.memory_bytes is not None:
        reasons.append(f"{host.memory_bytes / 1e6:.0f} MB of memory")
    if match.gpu:
        reasons.append("an NVIDIA GPU")
    return Match(True, tuple(reasons))


def describe(host: Host) -> str:
    """One line for people: model, cores, memory, board."""
    parts = [host.cpu_model or "unknown CPU", host.arch, f"{host.cores} cores"]
    parts.append("memory unknown" if host.memory_bytes is None else f"{host.memory_bytes / 1e9:.1f} GB")
    if host.device_tree:
        parts.append(host.device_tree[0])
    parts.append("NVIDIA GPU" if host.gpu else "no NVIDIA GPU")
    return ", ".join(parts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _strings(path: Path) -> tuple[str, ...]:
    """A device tree property of NUL-separated strings."""
    return tuple(part for part in _text(path).split("\0") if part)


def _memory_bytes(path: Path) -> int | None:
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "MemTotal:" and words[1].isdigit():
            return int(words[1]) * 1024
    return None


def _arch(cpuinfo: dict[str, str], proc_root: Path) -> str:
    if proc_root == Path("/proc"):
        machine = platform.machine()
        return {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if "flags" in cpuinfo:
        return "x86_64" if "lm" in cpuinfo["flags"].split() else "i686"  # lm: long mode
    if "Features" in cpuinfo:
        # A 64-bit kernel names the vector unit asimd, a 32-bit one neon.
        return "aarch64" if "asimd" in cpuinfo["Features"].split() else "armv7l"
    return platform.machine()


#: "CPU part" of ARM's own cores (implementer 0x41), from the kernel's arch/arm64/include/asm/cputype.h.
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse N2",
    "0xd83": "Neoverse V3AE",
}


def _arm_model(cpuinfo: dict[str, str]) -> str:
    implementer, part = cpuinfo.get("CPU implementer"), cpuinfo.get("CPU part")
    if implementer == "0x41" and part in _ARM_PARTS:
        return _ARM_PARTS[part]
    if implementer == "0x4e" and part == "0x004":
        return "NVIDIA Carmel"
    return f"ARM implementer {implementer} part {part}" if part else cpuinfo.get("Hardware", "")


def _has_gpu(proc_root: Path, sys_root: Path) -> bool:
    """The proprietary driver's version file, or the GPU of a Tegra (JetPack 4 and later)."""
    signs = (proc_root / "driver/nvidia/version", sys_root / "devices/gpu.0", sys_root / "module/nvgpu")
    return any(path.exists() for path in signs)
