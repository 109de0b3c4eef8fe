"""Which rails are the whole board's power. Never a blind sum: most rails lie inside another one.

The boards tell themselves apart by the names of their rails. Rail roles: NVIDIA's Jetson Linux developer guide,
power monitor tables per module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from device_agent.power.reading import Method, Rail, Skipped, Total


@dataclass(frozen=True)
class Board:
    """``total_rails`` together are the board; ``max_w`` is well above anything it can draw."""

    name: str
    total_rails: tuple[str, ...]
    max_w: float


BOARDS = (
    Board("Jetson Thor", ("VIN",), 300.0),
    Board("Jetson Nano", ("POM_5V_IN",), 40.0),
    Board("Jetson TX2, Xavier NX, Orin NX or Orin Nano", ("VDD_IN",), 80.0),
    # No rail carries all of it. VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0 and already counted there.
    Board("Jetson AGX Orin", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 150.0),
)


def board_total(rails: Sequence[Rail], source: str) -> tuple[Total, tuple[Skipped, ...]]:
    """The board's total from the rails that were read, and what was rejected on the way."""
    by_name = {rail.name: rail for rail in rails}
    for board in BOARDS:
        present = [name for name in board.total_rails if name in by_name]
        if not present:
            continue
        label = f"{source}: {' + '.join(board.total_rails)} ({board.name})"
        missing = [name for name in board.total_rails if name not in by_name]
        if missing and len(present) == 1 and len(board.total_rails) > 1:
            continue  # one name in common doesn't make it that board
        if missing:
            return Total(source=label, reason=f"{', '.join(missing)} of the total could not be read"), ()
        parts = [by_name[name].power_w for name in board.total_rails]
        method: Method = "measured" if len(parts) == 1 else "sum_of_rails"
        return plausible(sum(parts), method=method, source=label, max_w=board.max_w, path=by_name[present[0]].source)
    names = ", ".join(by_name)
    return Total(source=source, reason=f"no known board has these rails, so their sum means nothing: {names}"), ()


def plausible(
    total_w: float, *, method: Method, source: str, max_w: float, path: str
) -> tuple[Total, tuple[Skipped, ...]]:
    """The total, or none with the reason when no running device can draw that."""
    if 0.0 < total_w <= max_w:
        return Total(total_w=round(total_w, 6), method=method, source=source), ()
    what = "negative" if total_w < 0 else "zero on a running device" if total_w == 0 else f"above {max_w:g} W"
    reason = f"implausible total of {total_w:.3f} W: {what}"
    return Total(source=source, reason=reason), (Skipped(path=path, reason=reason),)
