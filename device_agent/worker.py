"""The worker: one model, one loop. ``python -m device_agent.worker --fd N`` as a process, :func:`serve` in a thread.

Everything that may crash, leak or hang because of a model happens here and not in the supervisor. The loop is
blocking and has no state beyond the loaded model: Load -> Ready or Refused, then Run -> Done (and Ping -> Pong) until
the socket closes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from aios_edge.errors import AiosEdgeError, MissingExtra, PromiseBroken, UsageError
from aios_edge.profile_files import load_profile
from device_agent import core_share, wire
from device_agent.activation import Activated, ActivationRefused, activate
from device_agent.activation_engine import build_engine
from device_agent.activation_raw import activate_raw
from device_agent.affinity import pin
from device_agent.worker_rounds import serve_runs

_PR_SET_PDEATHSIG = 1  # prctl(2)
#: So long the thread that runs the model waits for one that prepares: Python's 5 ms are three runs of a small model.
SWITCH_S = 0.0001


def serve(sock: socket.socket, *, alone: bool = False) -> None:
    """Serve one supervisor until it says stop or closes the socket.

    ``alone``: this process is nothing but the worker, so its memory can be measured. Returns quietly when the peer
    is gone; a peer that speaks nonsense is as good as gone.
    """
    try:
        received = wire.receive(sock)
        if received is None or not isinstance(received[0], wire.Load):
            return
        load = received[0]
        activated = _load(sock, load, alone)
        if activated is None:
            return
        serve_runs(sock, activated, load)
    except OSError as error:  # ConnectionError included
        print(f"the supervisor is gone: {error}", file=sys.stderr, flush=True)


def _load(sock: socket.socket, load: wire.Load, alone: bool) -> Activated | None:
    """Activate and say Ready; or say why not."""

    def refuse(check: str, error: Exception, text: str) -> None:
        report = error.report if isinstance(error, ActivationRefused) else None
        wire.send(sock, wire.Refused(generation=load.generation, check=check, detail=text, report=report))

    if load.version != wire.PROTOCOL_VERSION:
        text = f"the supervisor speaks protocol {load.version}, this worker {wire.PROTOCOL_VERSION}"
        refuse("runtime", ConnectionError(text), f"{text}. Restart the agent: its files were replaced under it")
        return None

    def staged(stage: str) -> None:
        wire.send(sock, wire.Loading(generation=load.generation, stage=stage))

    path, state_dir = Path(load.bundle_path), Path(load.state_dir) if load.state_dir else None
    try:
        profile = load_profile(load.profile)
        pin(profile, load.cpus)
        if load.check == "engine":
            activated = build_engine(
                path, load.raw, profile, state_dir=state_dir, bundle_id=load.bundle_id, on_stage=staged
            )
        elif load.raw is not None:
            activated = activate_raw(
                path, load.raw, profile, alone=alone, state_dir=state_dir, engines=load.engines, on_stage=staged
            )
        else:
            activated = activate(
                path,
                profile,
                load.check,
                alone=alone,
                state_dir=state_dir,
                bundle_id=load.bundle_id,
                engines=load.engines,
                on_stage=staged,
            )
    except PromiseBroken as error:
        refuse(error.promise, error, _told(error))
    except (UsageError, MissingExtra, AiosEdgeError) as error:
        refuse("settings" if isinstance(error, UsageError) else "runtime", error, str(error))
    except ConnectionError:  # the supervisor is gone; any other OSError is the bundle's or the disk's
        raise
    except Exception as error:  # whatever a hostile model makes the runtime raise is a refusal, not a crash loop
        refuse("load", error, f"{type(error).__name__}: {error}"[:500])
    else:
        wire.send(sock, wire.Ready(generation=load.generation, report=activated.report))
        return activated
    return None


def _told(error: PromiseBroken) -> str:
    """What and remedy; name and place travel beside it."""
    return f"{error.what}. {error.remedy}" if error.remedy else error.what


def _become_worker() -> None:
    """What a worker process, and only a process, does to itself before anything else."""
    # The service manager sends SIGTERM to the whole control group and a terminal SIGINT to the foreground group.
    # Neither is for the worker: the supervisor drains its queue first and then says Stop, or closes the socket.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A supervisor that dies takes its workers along, even one that is inside an endless model run and reads no
    # socket. (If it died before this line, the first receive finds the socket closed.)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Writing a core of a whole model keeps the socket open for seconds: the supervisor is to hear of a crash at once.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def main(arguments: list[str] | None = None) -> int:
    """The worker process: ``--fd`` is its inherited end of the socketpair."""
    parser = argparse.ArgumentParser(prog="device_agent.worker", description=main.__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args(arguments)
    fd: int = options.fd
    _become_worker()
    sys.setswitchinterval(SWITCH_S)
    core_share.take(options.nice)
    os.set_inheritable(fd, False)
    with socket.socket(fileno=fd) as sock:
        serve(sock, alone=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
