"""The processes the demo starts: the same commands a user types."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios_edge.client import Client
from aios_edge.errors import AiosEdgeError, PromiseBroken, RemoteError

CLI = (sys.executable, "-m", "aios_edge.cli.main")
READY_TIMEOUT_S = 60.0


def run_json(*arguments: str, show_progress: bool = False, may_refuse: bool = False) -> Any:
    """Run ``aios-edge ARGUMENTS --json`` and return the document it printed.

    With ``show_progress`` its stderr goes to this terminal. Raises :class:`AiosEdgeError` with the command's own
    words and its exit code if it failed; where it ``may_refuse``, a broken promise is an answer like any other: the
    document's ``error`` names it.
    """
    process = subprocess.run(
        [*CLI, *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=None if show_progress else subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode not in ((0, PromiseBroken.exit_code) if may_refuse else (0,)):
        said = (process.stderr or "").strip()
        error = AiosEdgeError(said or "it failed; its message is above", where=f"aios-edge {arguments[0]}")
        error.exit_code = process.returncode if process.returncode > 0 else 1
        raise error
    return json.loads(process.stdout)


def free_port() -> int:
    """A TCP port that was free on the loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _toml(table: Mapping[str, object]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())  # JSON scalars are TOML scalars


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What the demo writes into an agent.toml."""

    device: str
    profile: str
    bundle: Path
    port: int
    broker_url: str
    interval_s: float
    cloud_url: str | None = None
    model: str = ""
    slowdown: float = 1.0

    @property
    def url(self) -> str:
        """Where the agent will listen."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, folder: Path) -> AgentProcess:
        """Start it with everything it writes in ``folder``."""
        return AgentProcess(self.url, self.toml(folder / "state"), folder)

    def toml(self, state_dir: Path) -> str:
        """The file's text."""
        text = "[device]\n" + _toml(
            {"id": self.device, "group": "demo", "profile": self.profile, "state_dir": str(state_dir)}
        )
        text += "\n[http]\n" + _toml({"bind": f"127.0.0.1:{self.port}"})
        text += "\n[mqtt]\n" + _toml({"url": self.broker_url, "interval_s": self.interval_s})
        text += "\n[[bundle]]\n" + _toml({"path": str(self.bundle)})
        if self.cloud_url:
            text += "\n[[cloud]]\n" + _toml({"name": "cloud", "url": self.cloud_url})
            text += "[cloud.model_map]\n" + _toml({self.model: self.model})
        if self.slowdown != 1.0:
            text += "\n[emulate]\n" + _toml({"slowdown": round(self.slowdown, 2)})
        return text


class AgentProcess:
    """A running ``aios-edge agent run``; a context manager that ends it."""

    def __init__(self, url: str, config_toml: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.url = url
        self.log_path = folder / "agent.log"
        config_path = folder / "agent.toml"
        config_path.write_text(config_toml, encoding="utf-8")
        with self.log_path.open("ab") as log:
            # Its own session: Ctrl-C at the terminal reaches the demo, which then stops it in order.
            self._process = subprocess.Popen(
                [*CLI, "agent", "run", "--config", str(config_path)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = Client(self.url, timeout_s=10.0)

    def wait_ready(self) -> None:
        """Return when the agent is ready; raise with the end of its log if it ends or takes too long."""
        end = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if self.client.ready():
                    return
            except RemoteError:
                pass  # not listening yet
            time.sleep(0.05)
        tail = self.log_path.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise AiosEdgeError(f"the agent did not become ready:\n{tail}", where=str(self.log_path))

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._process.pid

    def wait(self, timeout_s: float) -> int:
        """Wait for its end; its exit code."""
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> AgentProcess:
        try:
            self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


def kill_process(pid: int) -> None:
    """SIGKILL another process by number."""
    os.kill(pid, signal.SIGKILL)


def write_recipe(
    path: Path,
    source: str,
    finetune: Mapping[str, object],
    name: str,
    *,
    max_drop: float,
    search: Mapping[str, object],
    more: Mapping[str, Mapping[str, object]] | None = None,
) -> Path:
    """The export recipe of the demo, as a user would write it; ``more`` are further tables."""
    sections: Sequence[tuple[str, Mapping[str, object]]] = (
        ("model", {"source": source, "task": "text-classification"}),
        (
            "data",
            {
                "train": "train.csv",
                "validation": "validation.csv",
                "test": "test.csv",
                "input": "text",
                "label": "label",
            },
        ),
        ("finetune", finetune),
        ("accuracy", {"metric": "accuracy", "max_drop": max_drop}),
        ("search", search),
        ("export", {"name": name, "version": "1.0.0", "licence": "Apache-2.0"}),
        *(more or {}).items(),
    )
    path.write_text("\n".join(f"[{title}]\n{_toml(table)}" for title, table in sections), encoding="utf-8")
    return path
