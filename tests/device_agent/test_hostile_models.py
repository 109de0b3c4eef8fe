"""Raw models that would do harm: refused with a reason or kept to themselves, and the others serve."""

from __future__ import annotations

import json
import os
import platform
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hostile_models import REFUSED, SERVED, slow_to_load
from identity_model import write_identity
from raw_http import Door
from steady_load import SteadyLoad, soon_s

from aios_edge.errors import BundleRefused
from aios_edge.profile_files import load_profile
from device_agent.activation_raw import activate_raw
from device_agent.raw_model import open_raw
from device_agent.wire import RawModel


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_of_its_own_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    import onnxruntime

    build, check, says = REFUSED[name]
    if (
        check == "load"
        and name.startswith("data")
        and tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24)
    ):
        pytest.skip("this onnxruntime reads external data wherever they are")
    (tmp_path / "secret").write_bytes(b"the device's own")
    (tmp_path / "m" / "1").mkdir(parents=True)
    build(tmp_path / "m" / "1")
    with pytest.raises(BundleRefused) as refused:
        activate_raw(open_raw(tmp_path / "m").path, RawModel("m", "1", None), load_profile("x86-gateway"), alone=False)
    assert refused.value.promise == check and says.lower() in str(refused.value).lower(), refused.value


def test_links_within_a_model_and_to_whole_versions_are_followed(tmp_path: Path) -> None:
    write_identity(tmp_path / "elsewhere")
    (tmp_path / "m" / "2").mkdir(parents=True)
    (tmp_path / "m" / "1").symlink_to(tmp_path / "elsewhere")
    write_identity(tmp_path / "m" / "2" / "..data")
    (tmp_path / "m" / "2" / "model.onnx").symlink_to("..data/model.onnx")  # as Kubernetes mounts a volume
    for version in ("1", "2"):
        root = tmp_path / "m" / version
        activate_raw(root, RawModel("m", version, None), load_profile("x86-gateway"), alone=False)


def ask(agent: Any, model: str, data: list[int], **parameters: Any) -> tuple[int, Any]:
    tensor = {"name": "x", "datatype": "INT64", "shape": [len(data)], "data": data}
    body = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    try:
        with urllib.request.urlopen(f"{agent.url}/v2/models/{model}/infer", body, timeout=20) as response:
            return response.status, json.loads(response.read())["outputs"][0]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere a division ends no process")
def test_a_model_that_does_harm_does_it_to_itself(start_agent: Any, tmp_path: Path) -> None:
    write_identity(tmp_path / "id" / "1")
    for name, content in SERVED.items():
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "model.onnx").write_bytes(content)
    agent = start_agent(f'[repository]\npath = "{tmp_path}"\n[policy]\nbatch_timeout_s = 0.8')
    with SteadyLoad(Door.of(agent.url), clients=2) as load:
        load.goes_on()
        assert ask(agent, "divides", [2])[1]["data"] == [-(2**62)]
        assert ask(agent, "divides", [0])[0] == 400, "which it does tell"
        status, refused = ask(agent, "divides", [-1])  # which ends a process, once more alone, and is given up
        assert status == 503 and refused["parameters"] == {"route": None, "reason": "worker_lost"}
        load.goes_on()
        assert ask(agent, "loops", [7])[1]["data"] == [7]
        status, refused = ask(agent, "loops", [2**60], timeout=200_000)
        assert status == 504 and refused["parameters"]["reason"] == "deadline_passed", "long before its watchdog"
        assert agent.events("worker_crashed")[-1]["model"] == "divides"
        status, refused = ask(agent, "loops", [2**60])
        assert status == 503 and refused["parameters"]["reason"] == "worker_lost"
        load.goes_on()
        status, told = ask(agent, "lies", [1, 2, 3])
        assert status == 500 or (told["shape"], told["data"]) == ([3], [1, 2, 3]), told
        status, refused = ask(agent, "grows", [2**31, 2**31])
        assert status == 400 and "the model refuses these inputs" in refused["error"]
        assert ask(agent, "grows", [1, 2])[1]["data"] == [0, 0]
        began = time.monotonic()
        agent.until(lambda status: status["state"] == "ready", limit_s=10)
        assert ask(agent, "divides", [4])[1]["data"] == [-(2**61)] and ask(agent, "loops", [2])[1]["data"] == [2]
        assert time.monotonic() - began < soon_s()
        load.goes_on()
    assert set(load.ended) == {"local"}, "nobody else felt it"
    crashes = [(crash["model"], crash["how"]) for crash in agent.events("worker_crashed")]
    assert [model for model, _ in crashes] == ["divides"] * 2 + ["loops"] * 3, crashes
    assert "SIGFPE" in crashes[0][1] and "did not end a batch within 0.8 s" in crashes[2][1]
    assert "Traceback" not in agent.log() and agent.stop() == 0


def test_a_model_that_is_never_loaded_is_given_up_and_the_others_serve_meanwhile(
    start_agent: Any, tmp_path: Path
) -> None:
    write_identity(tmp_path / "id" / "1")
    write_identity(tmp_path / "zebra" / "1")
    (tmp_path / "slow" / "1").mkdir(parents=True)
    (tmp_path / "slow" / "1" / "model.onnx").write_bytes(slow_to_load())
    path = Path(f"/tmp/aios-hostile-{os.getpid()}.sock")
    more = f'[repository]\npath = "{tmp_path}"\n[policy]\nload_timeout_s = 3.0'
    agent = start_agent(more, http=f'unix_socket = "{path}"', wait=False)
    end = time.monotonic() + 30
    while "id is live" not in agent.log():
        assert time.monotonic() < end and agent.process.poll() is None, agent.log()
        time.sleep(0.01)
    with SteadyLoad(Door(unix=path), clients=1) as load:
        load.goes_on()
        while "ready on" not in agent.log():
            assert time.monotonic() < end, agent.log()
            load.goes_on()
    assert set(load.ended) == {"local"}
    assert "slow" in agent.log() and "[timeout]" in agent.log() and "zebra is live" in agent.log()
    assert agent.stop() == 0
