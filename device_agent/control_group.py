"""Where the kernel keeps the limits of the agent's own control group, and of those above it (cgroups(7))."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from device_agent.power.reading import Skipped
from device_agent.power.sysfs import read_text


def folders(controller: str, proc_root: Path, sys_root: Path) -> Iterator[tuple[Path, int]]:
    """The folders of one controller from the agent's up, each with the version of its files, as far as it may look."""
    text = read_text(proc_root / "self" / "cgroup")
    lines = [] if isinstance(text, Skipped) else [line.split(":", 2) for line in text.splitlines()]
    paths = {line[1]: line[2] for line in lines if len(line) == 3}
    by_controllers = {name: path for names, path in paths.items() for name in names.split(",")}
    root, version = sys_root / "fs" / "cgroup", 2
    path = by_controllers.get("")
    if controller in by_controllers:  # version 1
        root, version, path = root / controller, 1, by_controllers[controller]
    if path is None:
        return
    folder = root / path.strip("/")
    while folder != root.parent:
        # In a container the path may be the host's. Path.is_dir raises where this agent may not look.
        if os.path.isdir(folder):  # noqa: PTH112
            yield folder, version
        folder = folder.parent
