"""The servers of ``serving.py`` as processes: the agent, the bare echo, and peers in environments of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import load_generator
import msgspec
from load_generator import Load, Result

PEERS = Path(__file__).parent / "peers_serving"
PATIENCE_S = 120.0
PROFILE = Path(__file__).parents[1] / "profiles" / "x86-gateway.toml"


@dataclass
class Server:
    """A running server and what it took to start: seconds from its start to the first answer to ``body``."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    path: str
    log: Path
    ready_s: float = 0.0
    answer: bytes = b""
    pss_bytes: dict[str, int] = field(default_factory=dict)

    def wait_ready(self, body: str, began: float) -> None:
        """Ask until it answers; raises RuntimeError with the end of its log when it never does."""
        while time.perf_counter() - began < PATIENCE_S:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError, urllib.error.HTTPError):
                self.answer = post(self.port, self.path, body)
                self.ready_s = time.perf_counter() - began
                return
            time.sleep(0.005)
        self.stop()
        raise RuntimeError(f"{self.name} is not ready:\n{self.log.read_text(errors='replace')[-1500:]}")

    def measure_memory(self) -> None:
        """PSS of the first process, and of it and all that it started (shared pages counted once, in parts)."""
        pids = tree(self.process.pid)
        self.pss_bytes = {"first": pss(self.process.pid), "all": sum(pss(pid) for pid in pids)}

    def stop(self) -> None:
        """End it and all that it started."""
        pids = tree(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def agent(
    name: str,
    bundles: Sequence[Path],
    model: str,
    work: Path,
    body: str,
    *,
    isolation: Literal["process", "thread"] = "process",
    checkout: Path | None = None,
    more: str = "",
    device: str = "",
    http: str = "",
    policy: str = "",
) -> Server:
    """Our agent with these bundles. ``checkout``: another tree of the project, for a comparison of two; ``more``:
    further tables of its agent.toml; ``device``, ``http`` and ``policy``: lines of these tables."""
    folder = work / "agents" / name.replace(" ", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    text = PROFILE.read_text(encoding="utf-8").replace('arch = "x86_64"', f'arch = "x86_64"\nisolation = "{isolation}"')
    (folder / "profile.toml").write_text(text, encoding="utf-8")
    port = free_port()
    listed = "\n".join(f'[[bundle]]\npath = "{bundle.absolute()}"' for bundle in bundles)
    (folder / "agent.toml").write_text(
        f'[device]\nid = "bench"\nprofile = "profile.toml"\n{device}\n[http]\nbind = "127.0.0.1:{port}"\n'
        f"{http}\n[policy]\nmax_rows = 300000\n{policy}\n{listed}\n{more}",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "aios_edge.cli.main", "agent", "run", "--config", str(folder / "agent.toml")]
    root = checkout or Path(__file__).parents[1]
    # As after an installation: byte code is there, and the time to the first answer is not the compiler's.
    compiled = [str(root / package) for package in ("aios_edge", "device_agent")]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *compiled], check=True, stdout=subprocess.DEVNULL)
    return _start(name, command, port, f"/v2/models/{model}/infer", folder / "log", body, {"PYTHONPATH": str(root)})


def echo(work: Path, body: str, answer_bytes: int) -> Server:
    """The bare ASGI echo, in the environment of the agent."""
    script, port = PEERS / "echo.py", free_port()
    command = [sys.executable, str(script), "-", str(port), "1", str(answer_bytes)]
    return _start("echo", command, port, "/", work / "echo.log", body)


def peer(name: str, model: Path, threads: int, work: Path, body: str) -> Server:
    """A peer in an environment of its own, made of the requirements in its first line. Raises RuntimeError where that
    can't be made, or the peer doesn't start."""
    return _peer(name, PEERS / f"{name}.py", [str(model.absolute())], [str(threads)], work, body)


def text_peer(name: str, script: Path, setting: str, bundle: Path, threads: int, work: Path, body: str) -> Server:
    """A peer that serves a bundle's texts, at one of its settings; otherwise as :func:`peer`."""
    return _peer(name, script, [str(bundle.absolute())], [str(threads), setting], work, body)


def _peer(name: str, script: Path, first: list[str], last: list[str], work: Path, body: str) -> Server:
    port = free_port()
    lines = script.read_text(encoding="utf-8").splitlines()
    requirements, path = lines[0].removeprefix("# requires:").split(), lines[1].removeprefix("# path:").strip()
    python = _environment(name, requirements, work)
    command = [str(python), str(script), *first, str(port), *last]
    # Its scripts before ours: some start themselves again by name.
    more = {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": ""}
    return _start(name, command, port, path, work / f"{name}.log", body, more)


def post(port: int, path: str, body: str) -> bytes:
    """One request; raises URLError for anything but an answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body.encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: bytes = response.read()
    return answer


def tree(pid: int) -> list[int]:
    """A process and all that it started, itself first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for each in found:  # grows while it is walked
        found += children.get(each, [])
    return found


def pss(pid: int) -> int:
    """Proportional set size: private memory and its share of what is shared."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def cpu_s(pids: Iterable[int]) -> float:
    """Processor time that these processes took so far, all their threads; those that have ended are left out."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(task.read_text().split()[0])
    return total / 1e9


def measured(server: Server, load: Load) -> Result:
    """One turn of a server, with the processor time that it took."""
    pids = tree(server.process.pid)
    first, whole = cpu_s(pids[:1]), cpu_s(pids)
    result = load_generator.run(load)
    return msgspec.structs.replace(result, first_cpu_s=cpu_s(pids[:1]) - first, server_cpu_s=cpu_s(pids) - whole)


def free_port() -> int:
    """A port that nobody has, with two free ones behind it."""
    while True:
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            first = opened.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            for more in (1, 2):
                opened.enter_context(socket.socket()).bind(("0.0.0.0", port + more))
            return port


def _start(
    name: str,
    command: list[str],
    port: int,
    path: str,
    log: Path,
    body: str,
    environment: dict[str, str] | None = None,
) -> Server:
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=log.parent, env=os.environ | (environment or {})
        )
    server = Server(name, process, port, path, log)
    server.wait_ready(body, began)
    return server


def _environment(name: str, requirements: list[str], work: Path) -> Path:
    folder = work.absolute() / "envs" / name
    python = folder / "bin" / "python"
    ready = folder / "ready"
    missing = set(requirements) - set(ready.read_text().split() if ready.is_file() else ())
    if missing:
        if not python.is_file():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        made = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *requirements], capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise RuntimeError(f"{name} can't be installed:\n{made.stderr[-800:]}")
        ready.write_text("\n".join(requirements))
    return python
