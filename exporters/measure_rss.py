"""``python -m exporters.measure_rss MODEL SESSION_JSON LENGTH``: resident bytes of a process that serves one model.

Prints what it holds after a few requests and the most that it held (loading takes more), both from /proc.

Loads what an agent's worker loads (numpy, onnxruntime, tokenizers) and nothing of the workshop.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import tokenizers  # noqa: F401 - a worker has it in memory

from aios_edge.manifest import SessionSpec
from exporters.measure import tokens
from exporters.ort import Session

_RUNS = 5


def main() -> None:
    """Print VmRSS and VmHWM in bytes after a few requests, or nothing where /proc doesn't say."""
    session = Session(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=SessionSpec))
    for _ in range(_RUNS):
        session.run(tokens(session.input_names, 1, int(sys.argv[3])))
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    held = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("VmRSS:", "VmHWM:")))
    if len(held) == 2:
        print(*(int(held[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")))


if __name__ == "__main__":
    main()
