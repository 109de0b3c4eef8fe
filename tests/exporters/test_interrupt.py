"""Ctrl-C in the middle of an export, through the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.export

#: The command as a terminal starts it: a job in the background has SIGINT ignored, and so have its children.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from aios_edge.cli.main import main
main()
"""
AE = (sys.executable, "-m", "aios_edge.cli.main")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def test_ctrl_c_in_the_middle_of_an_export_leaves_no_bundle_and_the_same_command_goes_on(
    workshop: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(workshop, tmp_path / "workshop"))
    command = ("export", folder / "recipe.toml", "--profile", "rpi5", "--out", folder / "out", "--json")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("finetune"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "run the same command to go on" in err and "Traceback" not in err
    assert [path.name for path in (folder / "out").iterdir()] == [".cache"]
    done = subprocess.run(
        [*AE, *map(str, command)], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["profiles"]["rpi5"]["bundle"] == "rpi5"
