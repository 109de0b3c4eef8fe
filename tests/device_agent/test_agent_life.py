"""Faults and ends of a real agent: a killed worker, SIGTERM with work waiting, refusals at the start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from quick_constants import UNREHEARSED

SLOW = "[emulate]\nslowdown = 150.0"  # a batch takes a tenth of a second or more


def in_flight(status: Any) -> int:
    model = status["models"]["tiny"]
    count: int = model["queued"] + model["running"]
    return count


def asked(status: Any) -> int:
    """How many came, answered or not. Before an agent is ended all have to: the kernel refuses who connects later."""
    return in_flight(status) + int(sum(status["totals"].values()))


def test_a_killed_worker_costs_no_request_and_comes_back(start_agent: Any, small_batches: Path) -> None:
    agent = start_agent(SLOW, bundle=small_batches, constants=UNREHEARSED)
    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(agent.infer, "a good film") for _ in range(12)]
        status = agent.until(lambda status: status if in_flight(status) >= 8 else None)
        pid = status["models"]["tiny"]["worker_pid"]
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        answers = [future.result() for future in futures]
    assert [code for code, _, _ in answers] == [200] * 12
    reasons = [document["parameters"]["reason"] for _, document, _ in answers]
    assert reasons.count("retried") == 1, "one batch of one was in the worker's hands"
    model = agent.status()["models"]["tiny"]
    assert model["state"] == "ready" and model["worker_pid"] != pid and model["restarts"] == 1
    (crash,), (back,) = agent.events("worker_crashed"), agent.events("worker_recovered")
    assert "SIGKILL" in crash["how"] and crash["in_flight"] == 1
    assert back["away_s"] < 3.0 and time.monotonic() - killed_at < 10
    assert agent.status()["totals"] == {"local": 12}
    assert agent.stop() == 0


def test_a_worker_killed_while_idle_comes_back_by_itself(start_agent: Any) -> None:
    agent = start_agent()
    pid = agent.status()["models"]["tiny"]["worker_pid"]
    os.kill(pid, signal.SIGKILL)
    agent.until(lambda status: status["models"]["tiny"]["restarts"] == 1 and status["state"] == "ready")
    (crash,) = agent.events("worker_crashed")
    assert crash["how"] == "was killed by SIGKILL while idle"
    assert agent.infer()[0] == 200
    assert agent.stop() == 0


def test_sigterm_answers_what_waits_and_exits_0(start_agent: Any, small_batches: Path) -> None:
    agent = start_agent(SLOW, bundle=small_batches, constants=UNREHEARSED)
    with ThreadPoolExecutor(10) as pool:
        futures = [pool.submit(agent.infer, "a bad film") for _ in range(10)]
        agent.until(lambda status: asked(status) == 10 and in_flight(status) >= 8)
        worker = agent.status()["models"]["tiny"]["worker_pid"]
        agent.process.send_signal(signal.SIGTERM)
        assert [future.result()[0] for future in futures] == [200] * 10
    assert agent.process.wait(20) == 0
    assert not Path(f"/proc/{worker}").exists()


def test_late_requests_are_refused_with_retry_after(start_agent: Any, small_batches: Path) -> None:
    agent = start_agent(SLOW, bundle=small_batches)
    code, document, headers = agent.infer(timeout=1_000)
    assert code in (503, 504) and document["error"]
    code, document, headers = agent.infer(timeout=15_000)
    assert code == 503 and int(headers["retry-after"]) >= 1, document
    assert "cloud" in document["error"]
    assert list(document) == ["error", "parameters"]
    assert document["parameters"] == {"route": None, "reason": "cloud_unavailable"}
    code, document, headers = agent.infer(timeout=1)
    assert code == 504 and int(headers["retry-after"]) >= 1 and next(iter(document)) == "error"
    assert document["parameters"] == {"route": None, "reason": "deadline_passed"}
    assert agent.infer()[0] == 200
    assert agent.stop() == 0


def test_a_client_that_goes_away_frees_its_place(start_agent: Any, small_batches: Path) -> None:
    agent = start_agent("[emulate]\nslowdown = 1000.0", bundle=small_batches, constants=UNREHEARSED)
    host, port = agent.url.removeprefix("http://").split(":")
    body = json.dumps({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["x"]}]}).encode()
    head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    clients = []
    for _ in range(6):
        clients.append(socket.create_connection((host, int(port))))
        clients[-1].sendall(head + body)
    agent.until(lambda status: status["models"]["tiny"]["queued"] >= 4)
    for client in clients:
        client.close()
    agent.until(lambda status: in_flight(status) <= 1 and status["in_flight"] == 0, limit_s=1.0)
    agent.process.kill()


def test_a_flood_without_deadlines_is_bounded_by_the_queue(start_agent: Any, small_batches: Path) -> None:
    agent = start_agent(f"[policy]\nqueue_limit = 4\n{SLOW}", bundle=small_batches, constants=UNREHEARSED)
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(agent.infer()[0])) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(codes) == 12 and set(codes) == {200, 503}
    assert agent.stop() == 0


def agent_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aios_edge.cli.main", "agent", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )


def test_a_busy_port_is_named_before_anything_starts(tmp_path: Path, agent_toml: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "agent.toml").write_text(agent_toml(bind=f"127.0.0.1:{port}"))
        result = agent_command("run", "--config", str(tmp_path / "agent.toml"))
    assert result.returncode == 1
    assert f"port {port}" in result.stderr and "another port" in result.stderr
    assert not (tmp_path / "state").exists()


def test_a_refused_bundle_is_exit_3_with_the_name_of_the_check(
    tmp_path: Path, tiny_copy: Path, agent_toml: Callable[..., str]
) -> None:
    data = bytearray((tiny_copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (tiny_copy / "model.onnx.data").write_bytes(bytes(data))
    (tmp_path / "agent.toml").write_text(agent_toml(bundle=tiny_copy))
    for command in ("run", "check"):
        result = agent_command(command, "--config", str(tmp_path / "agent.toml"))
        assert result.returncode == 3, result.stderr
        assert "[digest]" in result.stderr
    document = json.loads(agent_command("check", "--config", str(tmp_path / "agent.toml"), "--json").stdout)
    assert document["activations"] == [] and "[digest]" in document["error"]


def test_check_activates_every_bundle_and_names_all_that_are_refused(
    tmp_path: Path, tiny_copy: Path, make_bundle: Any, agent_toml: Callable[..., str]
) -> None:
    (tiny_copy / "extra.bin").write_bytes(b"x")
    unreadable = make_bundle(name="unreadable").path
    (unreadable / "manifest.json").write_text("{")
    good = make_bundle(name="good").path
    more = "".join(f'[[bundle]]\npath = "{path}"\n' for path in (unreadable, good))
    (tmp_path / "agent.toml").write_text(agent_toml(more, bundle=tiny_copy))
    result = agent_command("check", "--config", str(tmp_path / "agent.toml"), "--json")
    assert result.returncode == 3, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("aios-edge: [unlisted]"), "the first is named"
    document = json.loads(result.stdout)
    assert [report["model"] for report in document["activations"]] == ["good"]
    refused = [(entry["path"], entry["check"]) for entry in document["refused"]]
    assert refused == [(str(tiny_copy), "unlisted"), (str(unreadable), "schema")]
    assert "extra.bin" in document["refused"][0]["error"] and document["error"] == document["refused"][0]["error"]
    result = agent_command("check", "--config", str(tmp_path / "agent.toml"))
    assert result.returncode == 3 and "good 1.0.0" in result.stdout
    assert result.stdout.count("refused ") == 2


def test_check_counts_a_missing_folder_as_refused_and_tries_the_others(
    tmp_path: Path, tiny_copy: Path, make_bundle: Any, agent_toml: Callable[..., str]
) -> None:
    (tiny_copy / "extra.bin").write_bytes(b"x")
    missing = tmp_path / "missing"
    more = "".join(f'[[bundle]]\npath = "{path}"\n' for path in (tiny_copy, make_bundle(name="good").path))
    (tmp_path / "agent.toml").write_text(agent_toml(more, bundle=missing))
    result = agent_command("check", "--config", str(tmp_path / "agent.toml"), "--json")
    assert result.returncode == 2, "as the first refusal says"
    document = json.loads(result.stdout)
    assert [report["model"] for report in document["activations"]] == ["good"]
    assert [entry["path"] for entry in document["refused"]] == [str(missing), str(tiny_copy)]
    assert document["error"] == document["refused"][0]["error"] and str(missing) in document["error"]


@pytest.mark.parametrize("folder", ["/proc/aios-none", "file/state", "dangling"])
def test_check_finds_a_state_folder_that_run_could_not_use(
    tmp_path: Path, agent_toml: Callable[..., str], folder: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "agent.toml").write_text(agent_toml().replace('"state"', f'"{folder}"'))
    said = []
    for command in ("run", "check"):
        result = agent_command(command, "--config", str(tmp_path / "agent.toml"))
        assert result.returncode == 1
        said.append(result.stderr.strip().splitlines()[-1])
    assert said[0] == said[1] and "device.state_dir" in said[0]


def test_check_leaves_no_state_folder_behind_and_minds_no_agent_that_runs_on_it(
    tmp_path: Path, agent_toml: Callable[..., str], start_agent: Any
) -> None:
    (tmp_path / "agent.toml").write_text(agent_toml().replace('"state"', '"new/deep/state"'))
    assert agent_command("check", "--config", str(tmp_path / "agent.toml")).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["agent.toml"]
    agent = start_agent()
    state = agent.config.parent / "state"
    before = sorted(path.name for path in state.iterdir())
    assert agent_command("check", "--config", str(agent.config)).returncode == 0
    assert sorted(path.name for path in state.iterdir()) == before
    assert agent.infer()[0] == 200 and agent.stop() == 0


def test_a_profile_of_another_device_is_said_and_is_no_error(
    tmp_path: Path, agent_toml: Callable[..., str], start_agent: Any
) -> None:
    text = "profile 'other' is not this machine (architecture is "
    profile = (Path(__file__).parents[2] / "profiles" / "x86-gateway.toml").read_text()
    arch = "aarch64" if os.uname().machine == "x86_64" else "x86_64"
    profile = profile.replace('"x86-gateway"', '"other"').replace('"x86_64"', f'"{arch}"')
    (tmp_path / "other.toml").write_text(profile)
    config = tmp_path / "agent.toml"
    config.write_text(agent_toml(profile="other.toml"))
    result = agent_command("check", "--config", str(config))
    assert result.returncode == 0 and f"warning: {text}" in result.stdout, result.stderr
    result = agent_command("check", "--config", str(config), "--json")
    assert json.loads(result.stdout)["profile_mismatch"].startswith(text)
    agent = start_agent(profile=tmp_path / "other.toml")
    assert agent.log().count(text) == 1 and agent.stop() == 0


def test_a_cloud_for_a_model_nobody_has_is_refused_at_the_start(tmp_path: Path, agent_toml: Callable[..., str]) -> None:
    cloud = '[[cloud]]\nname = "c"\nurl = "http://127.0.0.1:1"\nmodel_map = {tinny = "t"}\n'
    (tmp_path / "agent.toml").write_text(agent_toml() + cloud)
    result = agent_command("run", "--config", str(tmp_path / "agent.toml"))
    assert result.returncode == 2 and "'tinny'. Did you mean 'tiny'?" in result.stderr


def test_one_refused_bundle_leaves_the_others_serving(start_agent: Any, make_bundle: Any, tmp_path: Path) -> None:
    other = make_bundle(name="other", version="2.0.0").path
    (other / "extra.bin").write_bytes(b"x")
    agent = start_agent(f'[[bundle]]\npath = "{other}"\n[[bundle]]\npath = "{tmp_path}"\n')
    status = agent.status()
    assert status["state"] == "degraded" and agent.infer()[0] == 200
    assert status["refused"][0]["state"] == "refused"
    with urllib.request.urlopen(urllib.request.Request(f"{agent.url}/v2/repository/index", b"{}")) as response:
        tiny, unlisted, unreadable = json.loads(response.read())
    assert (tiny["name"], tiny["state"], tiny["reason"]) == ("tiny", "READY", "")
    assert (unlisted["name"], unlisted["version"], unlisted["state"]) == ("other", "2.0.0", "UNAVAILABLE")
    assert "extra.bin" in unlisted["reason"]
    assert (unreadable["name"], unreadable["state"]) == (tmp_path.name, "UNAVAILABLE") and unreadable["reason"]
    assert agent.stop() == 0


def test_check_reports_and_serves_nothing(tmp_path: Path, agent_toml: Callable[..., str]) -> None:
    (tmp_path / "agent.toml").write_text(agent_toml())
    result = agent_command("check", "--config", str(tmp_path / "agent.toml"), "--json")
    assert result.returncode == 0, result.stderr
    (report,) = json.loads(result.stdout)["activations"]
    assert report["model"] == "tiny" and all(check["passed"] for check in report["checks"])


def test_an_unreachable_broker_is_no_reason_not_to_serve(start_agent: Any) -> None:
    agent = start_agent('[mqtt]\nurl = "mqtt://127.0.0.1:1"\ninterval_s = 0.2')
    status = agent.status()
    assert status["state"] == "ready" and not status["mqtt"]["link"]["connected"]
    agent.until(lambda status: status["mqtt"]["outbox"]["depth"] >= 2)
    assert agent.infer()[0] == 200
    assert agent.stop() == 0


def test_the_broker_hears_online_what_happened_and_offline(start_agent: Any) -> None:
    from paho.mqtt import client as mqtt

    from aios_edge.broker import start_broker

    with start_broker() as broker:
        heard: list[tuple[str, dict[str, Any]]] = []
        listener = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        listener.on_message = lambda _c, _u, message: heard.append((message.topic, json.loads(message.payload)))
        host, port = broker.url.removeprefix("mqtt://").split(":")
        subscribed = threading.Event()
        listener.on_connect = lambda *_: listener.subscribe("aios/v1/default/dev/#", 1)  # after every connect
        listener.on_subscribe = lambda *_: subscribed.set()
        listener.connect(host, int(port))
        listener.loop_start()
        assert subscribed.wait(10)
        agent = start_agent(f'[mqtt]\nurl = "{broker.url}"\ninterval_s = 0.2')
        assert agent.infer()[0] == 200
        agent.until(lambda status: status["mqtt"]["link"]["connected"] and status["mqtt"]["outbox"]["depth"] == 0)
        assert agent.stop() == 0
        end = time.monotonic() + 5
        while time.monotonic() < end and not any(message.get("status") == "offline" for _, message in heard):
            time.sleep(0.01)
        listener.loop_stop()
        listener.disconnect()
    states = [message for topic, message in heard if topic.endswith("/status")]
    assert states[-1]["status"] == "offline" and states[-1]["why"] == "stopped"
    online = [bundle["state"] for state in states if state["status"] == "online" for bundle in state["bundles"]]
    assert "ready" in online  # an earlier status may say loading, or know of no bundle yet
    assert "activated" in [message["kind"] for topic, message in heard if topic.endswith("/event")]
    counted = [message["requests"]["answered"] for topic, message in heard if topic.endswith("/telemetry")]
    assert sum(counted) == 1


def test_a_misspelt_key_is_exit_2(tmp_path: Path, agent_toml: Callable[..., str]) -> None:
    (tmp_path / "agent.toml").write_text(agent_toml().replace("state_dir", "state_dri"))
    result = agent_command("check", "--config", str(tmp_path / "agent.toml"))
    assert result.returncode == 2 and "Did you mean 'state_dir'?" in result.stderr


def test_who_still_waits_when_the_drain_ends_is_told_so(start_agent: Any, small_batches: Path) -> None:
    more = "[emulate]\nslowdown = 1000.0\n[policy]\ndrain_s = 0.5\nqueue_delay_s = 0"  # however long they would wait
    agent = start_agent(more, bundle=small_batches, constants=UNREHEARSED)
    with ThreadPoolExecutor(10) as pool:
        futures = [pool.submit(agent.infer, "a bad film") for _ in range(10)]
        agent.until(lambda status: asked(status) == 10 and in_flight(status) >= 9)
        agent.process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in futures]
    refused = [(document["error"], headers) for code, document, headers in answers if code == 503]
    assert len(refused) >= 5 and {code for code, _, _ in answers} <= {200, 503}
    assert all("stopping" in error and int(headers["retry-after"]) >= 1 for error, headers in refused)
    assert agent.process.wait(20) == 0


def test_doors_that_fail_end_the_agent_with_their_error(
    tmp_path: Path, agent_toml: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    from device_agent.agent import Agent
    from device_agent.http_server import HttpServer
    from device_agent.settings import parse_settings

    async def broken(self: Any, sockets: Any = None) -> None:
        raise OSError("no doors today")

    monkeypatch.setattr(HttpServer, "serve", broken)
    agent = Agent(parse_settings(agent_toml(), where="test", base=tmp_path))
    with pytest.raises(OSError, match="no doors today"):
        asyncio.run(agent.run())


@pytest.mark.parametrize("method", ["measured", "estimated"])
def test_a_requests_share_of_the_power_is_an_estimate_whatever_the_sensor(
    tmp_path: Path, agent_toml: Callable[..., str], method: Any
) -> None:
    from device_agent.agent import Agent
    from device_agent.power.reading import PowerReading
    from device_agent.settings import parse_settings

    agent = Agent(parse_settings(agent_toml(), where="test", base=tmp_path))
    agent._reporter.last_reading = PowerReading(
        at_s=0.0, total_w=7.0, total_method=method, total_source="x", reason=None, active_w=4.0
    )
    energy = agent._energy(0.5, 2)
    assert energy.energy_j == 1.0 and energy.method == "estimated"
    agent._reporter.last_reading = msgspec.structs.replace(agent._reporter.last_reading, active_w=0.0)
    energy = agent._energy(0.5, 2)
    assert energy.energy_j is None and "idle in the last power sample" in energy.method


def test_a_second_agent_on_the_same_folder_is_refused_and_the_first_goes_on(start_agent: Any) -> None:
    first = start_agent()
    second = subprocess.run(
        [sys.executable, "-m", "aios_edge.cli.main", "agent", "run", "--config", str(first.config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert second.returncode == 1
    assert "state_dir" in second.stderr and "in use by another agent" in second.stderr
    assert first.infer()[0] == 200
    first.process.kill()  # what a killed agent held is free again
    first.process.wait()
    config = first.config.read_text()
    assert 'state_dir = "state"' in config
    again = subprocess.Popen(
        [sys.executable, "-m", "aios_edge.cli.main", "agent", "run", "--config", str(first.config)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert again.stderr is not None
    assert any("ready on" in line for line in again.stderr)
    again.terminate()
    again.stderr.read()
    assert again.wait(30) == 0


def test_a_refused_request_is_no_batch(start_agent: Any) -> None:
    agent = start_agent()
    body = {"inputs": [{"name": "txt", "datatype": "BYTES", "shape": [1], "data": ["good"]}]}
    request = urllib.request.Request(f"{agent.url}/v2/models/tiny/infer", json.dumps(body).encode())
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request, timeout=10):
        pass
    refused.value.close()
    assert refused.value.code == 400
    assert agent.infer()[0] == 200
    with urllib.request.urlopen(f"{agent.url}/metrics", timeout=10) as response:
        assert 'aios_batch_size_count{model="tiny"} 1\n' in response.read().decode()
