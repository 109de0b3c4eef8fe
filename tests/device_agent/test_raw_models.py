"""A repository of raw ONNX models behind a real agent: Triton's layout, every datatype, the protocol's clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_models import NUMBERS, echo, scale, some, write

from aios_edge.cli.agent import describe
from aios_edge.errors import SettingsError
from aios_edge.oip.datatypes import DTYPES, Tensor
from aios_edge.oip.tensors import decode_response, encode_request
from device_agent.hosting import entries_of
from device_agent.raw_model import RawEntry
from device_agent.settings import Repository, parse_settings


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from onnx import helper

    root = tmp_path_factory.mktemp("repository")
    echo(root / "echo" / "1", NUMBERS, ["a", "b"])
    echo(root / "scalars" / "1", NUMBERS, [])
    echo(root / "texts" / "1", ["BYTES"], ["a", "b"])
    echo(root / "mixed" / "1", ["BYTES", "BF16"], ["a", "b"])
    echo(root / "text" / "1", ["BYTES"], [])
    for version in (2, 9, 10):
        scale(root / "scale" / str(version), version)
    (root / "scale" / "config.pbtxt").write_text('name: "other"\nmax_batch_size: 8\n')
    (root / "scale" / "11").mkdir()
    value = helper.make_tensor("value", 1, [2], [1.0, 2.0])
    write(root / "constant" / "1", [helper.make_node("Constant", [], ["y"], value=value)], {}, {"y": ("FP32", [2])})
    write(
        root / "sum" / "1",
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        {"x": ("FP32", ["n"])},
        {"y": ("FP32", [])},
    )
    node = helper.make_node("SequenceConstruct", ["x"], ["y"])
    write(root / "sequence" / "1", [node], {"x": ("FP32", [1])}, {"y": ("FP32",)})
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "1" / "model.onnx").write_bytes(b"no model" * 9)
    (root / "empty").mkdir()
    (root / ".git").mkdir()
    (root / "README").write_text("a file is no model")
    return root


@pytest.fixture(scope="module")
def agent(start_agent: Any, repository: Path) -> Any:
    return start_agent(f'[repository]\npath = "{repository}"')


def ask(agent: Any, model: str, inputs: dict[str, Tensor], *, binary: bool, **parameters: Any) -> Any:
    """Status and decoded answer, or status and error."""
    body, length = encode_request(inputs, binary=binary, parameters=parameters)
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    request = urllib.request.Request(f"{agent.url}/v2/models/{model}/infer", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            found = response.headers.get("Inference-Header-Content-Length")
            return response.status, decode_response(response.read(), int(found) if found else None)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["error"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("shape", [(3, 1), (0, 2), (2, 0), ()])
@pytest.mark.parametrize("datatypes", [NUMBERS, ["BYTES"]], ids=["numbers", "text"])
def test_every_datatype_goes_through_and_comes_back(
    agent: Any, datatypes: list[str], shape: tuple[int, ...], binary: bool
) -> None:
    model = {"BYTES": ("text", "texts")}.get(datatypes[0], ("scalars", "echo"))[len(shape) // 2]
    sent = {f"in_{datatype}": some(datatype, shape) for datatype in datatypes}
    status, answer = ask(agent, model, sent, binary=binary)
    assert status == 200, answer
    assert len(answer.outputs) == len(datatypes)
    for name, tensor in answer.outputs.items():
        mine = sent[name.replace("out_", "in_")]
        assert (tensor.datatype, tensor.array.shape, tensor.array.dtype) == (mine.datatype, shape, mine.array.dtype)
        assert tensor.array.ravel().tolist() == mine.array.ravel().tolist()
        assert mine.datatype == "BYTES" or tensor.array.tobytes() == mine.array.tobytes()


@pytest.mark.parametrize("binary", [True, False])
def test_text_goes_in_where_bf16_comes_out(agent: Any, binary: bool) -> None:
    sent = {f"in_{datatype}": some(datatype, (3, 1)) for datatype in ("BYTES", "BF16")}
    status, answer = ask(agent, "mixed", sent, binary=binary)
    assert status == 200, answer
    for name, tensor in answer.outputs.items():
        mine = sent[name.replace("out_", "in_")]
        assert (tensor.datatype, tensor.array.tolist()) == (mine.datatype, mine.array.tolist())


def test_what_json_cannot_carry_is_a_422_and_goes_in_binary(agent: Any) -> None:
    sent = {f"in_{datatype}": some(datatype, (1, 1)) for datatype in NUMBERS}
    for datatype, bits in (("BF16", 0x7FC1), ("FP16", 0x7E01)):
        odd = {**sent, f"in_{datatype}": Tensor(datatype, np.array([[bits]], "<u2").view(DTYPES[datatype]))}
        status, answer = ask(agent, "echo", odd, binary=True)
        assert status == 200 and answer.outputs[f"out_{datatype}"].array.tobytes() == bits.to_bytes(2, "little")
    inputs = {"x": Tensor("FP32", np.array([3e38, 3e38], dtype=np.float32))}
    status, error = ask(agent, "sum", inputs, binary=False)
    assert status == 422 and "binary" in error
    status, answer = ask(agent, "sum", inputs, binary=True)
    assert status == 200 and np.isinf(answer.outputs["y"].array)


def test_the_highest_version_serves_and_no_bundle_is_needed(agent: Any, repository: Path) -> None:
    x = {"x": Tensor("FP32", np.ones((2, 400), dtype=np.float32))}
    status, answer = ask(agent, "scale", x, binary=True)
    assert status == 200 and answer.outputs["y"].array[0, 0] == 10.0, "as a number, not as a word"
    assert answer.model_version == "10" and answer.parameters["batch_size"] == 1
    assert ask(agent, "scale/versions/10", x, binary=True)[0] == 200
    status, error = ask(agent, "scale/versions/9", x, binary=True)
    assert status == 404 and "10" in error
    metadata = agent.get("/v2/models/scale")
    assert metadata == {
        "name": "scale",
        "versions": ["10"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 400]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 400]}],
    }


def test_the_status_says_that_nothing_was_promised(agent: Any, repository: Path) -> None:
    status = agent.status()
    model = status["models"]["scale"]
    assert (model["contract"], model["bundle_id"], model["state"]) == ("none", None, "ready")
    assert model["path"] == str(repository / "scale") and model["worker_pid"]
    check = model["activation"]["checks"][0]
    assert (
        check["name"] == "contract"
        and check["skipped"]
        and "nothing was promised, nothing is checked" in check["detail"]
    )
    assert "config.pbtxt is ignored" in check["detail"]
    assert "config.pbtxt" not in status["models"]["echo"]["activation"]["checks"][0]["detail"]
    assert status["models"]["tiny"]["contract"] == "checked" and status["models"]["tiny"]["bundle_id"]
    assert "  no contract: nothing was promised, nothing is checked" in describe(status)
    refused = {bundle["model"]: bundle for bundle in status["refused"]}
    assert set(refused) == {"sequence", "broken", "empty"}
    assert all(bundle["contract"] == "none" for bundle in refused.values())
    assert "seq(tensor(float))" in refused["sequence"]["detail"]
    assert "can't load" in refused["broken"]["detail"] and "aios-edge bundle" not in refused["broken"]["detail"]
    assert "<name>/<version>/model.onnx" in refused["empty"]["detail"]


def test_a_model_without_inputs_answers_too(agent: Any) -> None:
    for binary in (True, False):
        status, answer = ask(agent, "constant", {}, binary=binary)
        assert status == 200 and answer.outputs["y"].array.tolist() == [1.0, 2.0]
    assert agent.infer([])[1]["outputs"][0]["data"] == [], "no rows, no answers"
    status, error = ask(agent, "tiny", {}, binary=False)
    assert status == 400 and "missing input input_ids" in error


def test_rows_are_not_counted_where_nobody_knows_what_a_row_is(agent: Any) -> None:
    status, answer = ask(agent, "sum", {"x": Tensor("FP32", np.ones(100_000, dtype=np.float32))}, binary=True)
    assert status == 200 and answer.outputs["y"].array == 100_000.0


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"x": Tensor("FP64", np.ones((1, 400)))}, "is FP64, the model takes FP32"),
        ({"x": Tensor("FP32", np.ones((1, 3), dtype=np.float32))}, "has shape"),
        ({"z": Tensor("FP32", np.ones((1, 3), dtype=np.float32))}, "Send the model's own tensors: x"),
        ({"text": Tensor("BYTES", np.array([b"a"], dtype=np.object_))}, "no input 'text'"),
    ],
)
def test_what_does_not_fit_is_a_400(agent: Any, inputs: Any, says: str) -> None:
    status, error = ask(agent, "scale", inputs, binary=False)
    assert status == 400 and says in error


def test_bf16_and_uint16_are_not_taken_for_each_other(agent: Any) -> None:
    sent = {f"in_{datatype}": some(datatype, (1, 1)) for datatype in NUMBERS}
    status, error = ask(agent, "echo", {**sent, "in_BF16": sent["in_UINT16"]}, binary=True)
    assert status == 400 and "is UINT16, the model takes BF16" in error


def test_a_killed_worker_comes_back_with_its_raw_model(agent: Any) -> None:
    os.kill(agent.status()["models"]["sum"]["worker_pid"], signal.SIGKILL)
    agent.until(lambda status: status["models"]["sum"]["restarts"] == 1 and status["models"]["sum"]["state"] == "ready")
    assert ask(agent, "sum", {"x": Tensor("FP32", np.ones(3, dtype=np.float32))}, binary=True)[0] == 200


def test_a_model_that_is_written_over_does_not_come_back_under_the_old_ones_tensors(
    start_agent: Any, tmp_path: Path
) -> None:
    echo(tmp_path / "m" / "1", ["FP32"], ["n"])
    agent = start_agent(f'[repository]\npath = "{tmp_path}"')
    (tmp_path / "m" / "1" / "model.onnx").unlink()
    echo(tmp_path / "other", ["INT64"], ["n"])
    (tmp_path / "other" / "model.onnx").rename(tmp_path / "m" / "1" / "model.onnx")
    os.kill(agent.status()["models"]["m"]["worker_pid"], signal.SIGKILL)
    agent.until(lambda status: sum(event["kind"] == "contract_broken" for event in status["events"]) >= 3)
    model = agent.status()["models"]["m"]
    assert model["state"] == "restarting" and "[digest]" in model["detail"] and "written over" in model["detail"]
    assert agent.infer()[0] == 200, "the others serve"


def test_raw_models_are_loaded_unloaded_and_replaced_while_the_agent_serves(start_agent: Any, tmp_path: Path) -> None:
    from tritonclient import http as triton

    scale(tmp_path / "m" / "1", 2.0)
    agent = start_agent(f'[repository]\npath = "{tmp_path}"')
    client, x = triton.InferenceServerClient(agent.url.removeprefix("http://")), np.ones((1, 400), dtype=np.float32)

    def factor() -> float:
        status, answer = ask(agent, "m", {"x": Tensor("FP32", x)}, binary=True)
        assert status == 200, answer
        found: float = answer.outputs["y"].array[0, 0]
        return found

    first = agent.status()["models"]["m"]["worker_pid"]
    client.load_model("m")
    assert (factor(), agent.status()["models"]["m"]["worker_pid"]) == (2.0, first), "nothing changed, nothing happens"
    scale(tmp_path / "m" / "2", 3.0)
    client.load_model("m")
    assert factor() == 3.0 and agent.get("/v2/models/m")["versions"] == ["2"]
    assert agent.status()["models"]["m"]["probation"] is None, "there is no way back to files that may be gone"
    client.unload_model("m")
    (unloaded,) = agent.status()["unloaded"]
    assert (unloaded["model"], unloaded["contract"], unloaded["bundle_id"]) == ("m", "none", None)
    assert ask(agent, "m", {"x": Tensor("FP32", x)}, binary=True)[0] == 404
    client.load_model("m")
    assert factor() == 3.0
    client.close()


def test_tritonclient_and_kserve_take_raw_models_as_they_are(agent: Any) -> None:
    import ml_dtypes
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from tritonclient import http as triton

    x = np.arange(800, dtype=np.float32).reshape(2, 400)
    client = triton.InferenceServerClient(agent.url.removeprefix("http://"))
    assert client.is_model_ready("scale") and client.is_model_ready("scale", "10")
    assert client.get_model_metadata("scale")["versions"] == ["10"]
    index = {model["name"]: model["state"] for model in client.get_model_repository_index()}
    assert index["scale"] == "READY" and index["broken"] == "UNAVAILABLE"
    given = triton.InferInput("x", [2, 400], "FP32")
    given.set_data_from_numpy(x)
    np.testing.assert_array_equal(client.infer("scale", [given], "10").as_numpy("y"), x * 10)
    for model, datatypes in (("echo", NUMBERS), ("texts", ["BYTES"])):
        arrays = {datatype: some(datatype, (3, 1)).array for datatype in datatypes}
        if "BF16" in arrays:  # this client has BF16 from ml_dtypes, which came with it
            arrays["BF16"] = np.array([[1.5], [-2.0], [0.0]], dtype=ml_dtypes.bfloat16)
        inputs = [triton.InferInput(f"in_{datatype}", [3, 1], datatype) for datatype in datatypes]
        for given, array in zip(inputs, arrays.values(), strict=True):
            given.set_data_from_numpy(array)
        answer = client.infer(model, inputs)
        for datatype, array in arrays.items():
            assert answer.as_numpy(f"out_{datatype}").tolist() == array.tolist()
    client.close()

    async def ask_kserve() -> Any:
        rest = InferenceRESTClient(RESTConfig(protocol="v2"))
        request = InferRequest(model_name="scale", infer_inputs=[InferInput("x", [2, 400], "FP32", x.tolist())])
        answer = await rest.infer(agent.url, request, model_name="scale")
        await rest.close()
        return answer

    np.testing.assert_array_equal(asyncio.run(ask_kserve()).outputs[0].as_numpy(), x * 10)


@pytest.fixture
def small(repository: Path, tmp_path: Path) -> Path:
    """A few of the models: each takes a process's start."""
    for name in ("scale", "sum", "sequence", "empty"):
        (tmp_path / "few" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "few" / name).symlink_to(repository / name)
    return tmp_path / "few"


def test_overflow_leaves_the_device_only_where_the_model_map_says_so(start_agent: Any, small: Path, agent: Any) -> None:
    cloud = f'[[cloud]]\nname = "c"\nurl = "{agent.url}"\nmodel_map = {{scale = "scale:10"}}'
    device = start_agent(f'[repository]\npath = "{small}"\n{cloud}')
    device.until(lambda status: status["cloud"]["c"]["models"]["scale"]["usable"])
    assert set(device.status()["cloud"]["c"]["models"]) == {"tiny", "scale"}


def test_agent_check_opens_every_raw_model(small: Path, tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    only = f'[device]\nid = "d"\nprofile = "x86-gateway"\n[repository]\npath = "{small}"\n'
    config.write_text(only)
    command = [sys.executable, "-m", "aios_edge.cli.main", "agent", "check", "--config", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert {report["model"] for report in found["activations"]} == {"scale", "sum"}
    assert done.returncode == 3 and {Path(bundle["path"]).name for bundle in found["refused"]} == {"sequence", "empty"}


def test_which_folders_are_models(repository: Path, tmp_path: Path) -> None:
    text = f'[device]\nid = "d"\nprofile = "rpi5"\n[repository]\npath = "{repository}"\n'
    settings = parse_settings(text, where="agent.toml", base=tmp_path)
    assert settings.repository == Repository(path=repository)
    names = [entry.path.name for entry in entries_of(settings)]
    others = ["broken", "constant", "echo", "empty", "mixed"]
    assert names == [*others, "scalars", "scale", "sequence", "sum", "text", "texts"]
    assert all(isinstance(entry, RawEntry) for entry in entries_of(settings))
    missing = parse_settings(text.replace(str(repository), "nowhere"), where="agent.toml", base=tmp_path)
    with pytest.raises(SettingsError, match="can't be read"):
        entries_of(missing)
