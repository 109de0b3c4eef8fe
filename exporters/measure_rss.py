"""``python -m exporters.measure_rss MODEL SESSION_JSON LENGTH``: resident bytes of a process that serves one model.

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
    """Print VmRSS in bytes after a few requests, or nothing where /proc doesn't say."""
    session = Session(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=SessionSpec))
    for _ in range(_RUNS):
        session.run(tokens(session.input_names, 1, int(sys.argv[3])))
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmRSS:"):
            print(int(line.split()[1]) * 1024)


if __name__ == "__main__":
    main()
