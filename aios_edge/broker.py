"""A private MQTT broker on loopback, for the demo and for tests: mosquitto where it is installed, else amqtt.

``python -m aios_edge.broker PORT`` is the amqtt one, in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aios_edge.errors import MissingExtra, ResourceError

Kind = Literal["mosquitto", "amqtt"]
_SBIN = "/usr/sbin:/usr/local/sbin"  # where distributions put it, often not on a user's PATH


@dataclass(frozen=True)
class Broker:
    """A running broker; ``stop()`` ends it and waits for that."""

    url: str
    kind: Kind
    port: int
    process: subprocess.Popen[bytes]
    directory: Path

    def stop(self) -> None:
        """End it; safe to call twice."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def mosquitto_path() -> str | None:
    """Where mosquitto is installed, or None."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=_SBIN)


def start_broker(
    kind: Kind | None = None, *, port: int | None = None, extra: str = "", timeout_s: float = 15.0
) -> Broker:
    """Start a broker that listens on 127.0.0.1 only and keeps nothing on disk. ``extra``: more lines for mosquitto's
    configuration, in place of open access.

    Raises :class:`MissingExtra` when there is neither mosquitto nor amqtt, :class:`ResourceError` when it doesn't
    come up.
    """
    if kind is None:
        kind = "mosquitto" if mosquitto_path() else "amqtt"
    if kind == "mosquitto" and mosquitto_path() is None:
        raise ResourceError("mosquitto is not installed", remedy="Install it with: apt install mosquitto")
    if kind == "amqtt" and importlib.util.find_spec("amqtt") is None:
        raise MissingExtra("amqtt", "demo", why="a broker on a machine without mosquitto")
    if port is not None and not _free(port):  # whoever listens there would pass for our broker
        raise ResourceError(f"port {port} is busy", where="127.0.0.1", remedy="Stop who uses it, or choose another")
    said = ""
    for _ in range(3 if port is None else 1):  # a free port may be taken between asking and listening
        broker = _spawn(kind, port or _free_port(), extra)
        if _listening(broker, timeout_s):
            return broker
        with contextlib.suppress(OSError):
            said = (broker.directory / "log").read_text("utf-8", "replace").strip().rpartition("\n")[2]
        broker.stop()
    raise ResourceError(f"the broker {kind} does not come up: {said or 'it says nothing'}", remedy="Is the port free?")


def _spawn(kind: Kind, port: int, extra: str) -> Broker:
    directory = Path(tempfile.mkdtemp(prefix="aios-edge-broker-"))
    directory.chmod(0o755)  # started as root, mosquitto drops to its own user and must still read its configuration
    if kind == "mosquitto":
        config = directory / "mosquitto.conf"
        access = extra or "allow_anonymous true\n"
        habits = "persistence false\nset_tcp_nodelay true\nlog_dest stderr\n"
        config.write_text(f"{habits}listener {port} 127.0.0.1\n{access}")
        config.chmod(0o644)
        command = [mosquitto_path() or "mosquitto", "-c", str(config)]
    else:
        command = [sys.executable, "-m", "aios_edge.broker", str(port)]
    with (directory / "log").open("wb") as log:
        # A session of its own: Ctrl-C at the demo must not take the broker away before the last messages.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    return Broker(f"mqtt://127.0.0.1:{port}", kind, port, process, directory)


def _listening(broker: Broker, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and broker.process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", broker.port), 1.0):
            return broker.process.poll() is None
        with contextlib.suppress(subprocess.TimeoutExpired):
            broker.process.wait(0.02)
    return False


def _free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a broker that just ended left its port waiting
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def _serve_amqtt(port: int) -> None:
    from amqtt.broker import Broker as AmqttBroker

    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}", "max_connections": 64}},
        "sys_interval": 0,
        "auth": {"allow-anonymous": True, "plugins": ["auth_anonymous"]},
        "topic-check": {"enabled": False},
    }
    broker = AmqttBroker(config)
    over = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, over.set)
    await broker.start()
    await over.wait()
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(_serve_amqtt(int(sys.argv[1])))
