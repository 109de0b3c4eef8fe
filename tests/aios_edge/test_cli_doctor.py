from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner

from aios_edge.cli import doctor as module


def test_doctor_reports_one_document_and_succeeds_on_a_machine_that_can_run_the_agent() -> None:
    command = [sys.executable, "-m", "aios_edge.cli.main", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["ok"] is True, done.stderr
    names = {check["name"] for check in told["checks"]}
    assert names >= {
        "python",
        "packages",
        "onnxruntime",
        "profile",
        "power",
        "thermal",
        "mosquitto",
        "broker",
        "disk",
        "memory",
        "grpcio",
        "agent",
    }
    assert all(check["remedy"] for check in told["checks"] if check["state"] != "ok")
    assert not any("could not be checked" in check["detail"] for check in told["checks"])


def test_a_missing_runtime_is_required_and_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(module.doctor, ["--json"], standalone_mode=False)
    told = json.loads(result.output)
    assert result.return_value == 1 and told["ok"] is False
    runtime = next(check for check in told["checks"] if check["name"] == "onnxruntime")
    assert runtime["state"] == "missing" and "aios-edge[cpu]" in runtime["remedy"]
    torch = next(check for check in told["checks"] if check["name"] == "torch")
    assert torch["state"] == "gap" and "aios-edge[export]" in torch["remedy"]


@pytest.mark.parametrize(
    ("status", "document", "words"),
    [
        (
            200,
            {"state": "ready", "listen": ["http://x:1", "grpc://x:2"], "grpc": {"serving": True}},
            "ready on http://x:1, grpc://x:2; gRPC serving",
        ),
        (200, {"state": "draining", "listen": ["http://x:1"], "grpc": {"serving": False}}, "gRPC not serving"),
        (200, {"state": "ready", "listen": ["http://x:1"], "grpc": None}, "no gRPC"),
        (200, {"hello": "world"}, "no gRPC"),
        (401, {"error": "a key is needed"}, "runs, and wants a key"),
        (404, {"error": "nothing here"}, "something else answers"),
    ],
)
def test_a_running_agent_is_named_with_its_doors(status: int, document: object, words: str) -> None:
    body = json.dumps(document).encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)

        thread = threading.Thread(target=serve)
        thread.start()
        (check,) = module._agent(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert words in check.detail and check.state == "ok"


def test_where_no_agent_runs_that_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    (check,) = module._agent(url)
    assert check.state == "ok" and check.detail.startswith(f"none on {url}")


def test_a_check_that_breaks_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(module.shutil, "disk_usage", broken)
    result = CliRunner().invoke(module.doctor, [], standalone_mode=False)
    assert result.exception is None and "disk on fire" in result.output
    assert "-> " in result.output
