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
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_edge.cli.agent import describe
from aios_edge.errors import BundleRefused, RequestError, SettingsError
from aios_edge.oip.datatypes import DTYPES, Tensor, narrow_bf16
from aios_edge.oip.envelope import encode_response
from aios_edge.oip.tensors import decode_response, encode_request
from aios_edge.profile_files import load_profile
from device_agent.activation import Activated
from device_agent.activation_raw import activate_raw
from device_agent.hosting import entries_of
from device_agent.raw_model import RawEntry, open_raw
from device_agent.settings import Repository, parse_settings
from device_agent.wire import RawModel
from device_agent.worker_batch import Job, answer_batch

NUMBERS = sorted(set(DTYPES) - {"BYTES"})
KINDS = {"FP16": "FLOAT16", "BF16": "BFLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}


def kind(datatype: str) -> int:
    from onnx import TensorProto

    number: int = getattr(TensorProto, KINDS.get(datatype, datatype))
    return number


def write(folder: Path, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], **options: Any) -> None:
    """``folder/model.onnx``; tensors as ``name: (datatype, shape)``, or (datatype,) for a sequence of them."""
    import onnx
    from onnx import helper

    folder.mkdir(parents=True)
    ends = [
        [
            helper.make_tensor_value_info(name, kind(datatype), *shape)
            if shape
            else helper.make_tensor_sequence_value_info(name, kind(datatype), None)
            for name, (datatype, *shape) in side.items()
        ]
        for side in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *ends, options.pop("initializers", []))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, folder / "model.onnx", **options)


def echo(folder: Path, datatypes: list[str], shape: list[Any]) -> None:
    from onnx import helper

    nodes = [helper.make_node("Identity", [f"in_{d}"], [f"out_{d}"]) for d in datatypes]
    names = {
        datatype: [f"{datatype}_{dim}" if isinstance(dim, str) else dim for dim in shape] for datatype in datatypes
    }
    inputs, outputs = ({f"{side}_{d}": (d, names[d]) for d in datatypes} for side in ("in", "out"))
    write(folder, nodes, inputs, outputs)


def scale(folder: Path, factor: float) -> None:
    """y = x * factor, the factor in a file beside the model."""
    from onnx import helper, numpy_helper

    table = numpy_helper.from_array(np.full(400, factor, dtype=np.float32), "table")
    nodes = [helper.make_node("Mul", ["x", "table"], ["y"])]
    tensor = ("FP32", ["n", 400])
    options = {"save_as_external_data": True, "location": "weights", "size_threshold": 0, "convert_attribute": False}
    write(folder, nodes, {"x": tensor}, {"y": tensor}, initializers=[table], **options)


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


def some(datatype: str, shape: tuple[int, ...]) -> Tensor:
    """Values at the edges of the datatype."""
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array = np.empty(count, dtype=np.object_)
        array[:] = ["ä\0b".encode(), b"", b"x" * 300][:count]
    elif datatype == "BOOL":
        array = np.arange(count) % 2 == 1
    elif datatype in ("BF16", "FP16", "FP32", "FP64"):
        wide = np.array([-0.0, 1 / 3, -3.0e4][:count], dtype=np.float32)
        array = narrow_bf16(wide) if datatype == "BF16" else wide.astype(DTYPES[datatype])
    else:
        limits = np.iinfo(DTYPES[datatype])
        array = np.array([limits.min, limits.max, 7][:count], dtype=DTYPES[datatype])
    return Tensor(datatype, array.reshape(shape))


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


@pytest.mark.parametrize(
    ("files", "version"),
    [
        (["1/model.onnx", "2/model.onnx", "10/model.onnx"], "10"),
        (["1/model.onnx", "02/model.onnx", "x/model.onnx", "0/model.onnx", "٣/model.onnx"], "1"),
        (["1/model.onnx/model.onnx"], "1"),
        (["1/model.onnx", "2/model.onnx/other"], "1"),
        (["1/other.onnx"], None),
        ([], None),
    ],
)
def test_the_highest_number_with_a_model_is_the_version(tmp_path: Path, files: list[str], version: str | None) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    if version is None:
        with pytest.raises(BundleRefused, match="has no version"):
            open_raw(folder)
        return
    bundle = open_raw(folder)
    assert (bundle.manifest.name, bundle.manifest.version) == ("model", version)
    assert (bundle.path / "model.onnx").is_file()


def test_a_name_that_no_url_can_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a model" / "1").mkdir(parents=True)
    with pytest.raises(BundleRefused, match="Rename the folder"):
        open_raw(tmp_path / "a model")


def test_a_thread_takes_only_those_empty_tensors_that_the_model_declares(tmp_path: Path) -> None:
    """A kernel that divides by the number of rows would end the agent with it."""
    for name, shape, status in (("declared", [0, 2], 200), ("free", ["n", 2], 400)):
        echo(tmp_path / name, ["FP32"], shape)
        activated = activate_raw(tmp_path / name, RawModel(name, "1", None), load_profile("x86-gateway"), alone=False)
        body, length = encode_request({"in_FP32": Tensor("FP32", np.zeros((0, 2), dtype=np.float32))})
        (answer,) = answer_batch(
            activated, [Job(request_id=1, body=body, json_length=length, deadline_at=None)], now=0.0
        )
        assert answer.status == status, answer.error


def test_external_data_stay_in_the_models_folder(tmp_path: Path) -> None:
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24):
        pytest.skip("this onnxruntime reads them wherever they are")
    scale(tmp_path / "1", 2.0)
    (tmp_path / "data").write_bytes((tmp_path / "1" / "weights").read_bytes())
    model = (tmp_path / "1" / "model.onnx").read_bytes()
    (tmp_path / "1" / "model.onnx").write_bytes(model.replace(b"weights", b"../data"))
    with pytest.raises(BundleRefused, match=r"can't load.*\.\./data"):
        activate_raw(tmp_path / "1", RawModel("m", "1", None), load_profile("x86-gateway"), alone=False)


@pytest.fixture(scope="module")
def echoes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Activated]:
    """Models that answer what they are asked: of each datatype, and of ranks 0 to 3."""
    root, profile = tmp_path_factory.mktemp("echoes"), load_profile("x86-gateway")
    found: dict[tuple[str, int], Activated] = {}
    for datatype in DTYPES:
        for rank in range(4):
            folder = root / f"{datatype}{rank}"
            echo(folder, [datatype], ["a", "b", "c"][:rank])
            found[datatype, rank] = activate_raw(folder, RawModel("echo", "1", None), profile, alone=True)
    return found


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits that a tensor can have; text is UTF-8, as models take no other."""
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array = np.empty(count, dtype=np.object_)
        array[:] = draw(st.lists(st.text(max_size=5).map(str.encode), min_size=count, max_size=count))
    elif datatype == "BOOL":
        array = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=np.bool_)
    else:
        size = count * DTYPES[datatype].itemsize
        array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), DTYPES[datatype])
    return Tensor(datatype, array.reshape(shape))


def bits(tensor: Tensor) -> Any:
    return tensor.array.ravel().tolist() if tensor.datatype == "BYTES" else tensor.array.tobytes()


def test_every_bit_goes_from_the_body_through_the_model_into_the_answer(
    echoes: dict[tuple[str, int], Activated],
) -> None:
    """Several requests at once, which a raw model answers one by one."""

    @settings(max_examples=300, deadline=None)
    @given(st.lists(tensors(), min_size=1, max_size=3), st.booleans())
    def through(drawn: list[Tensor], binary: bool) -> None:
        kind = drawn[0].datatype, drawn[0].array.ndim
        sent, jobs = [tensor for tensor in drawn if (tensor.datatype, tensor.array.ndim) == kind], []
        for number, tensor in enumerate(sent):
            try:
                body, length = encode_request({f"in_{kind[0]}": tensor}, binary=binary)
            except RequestError:  # not finite: no client could send it in JSON
                continue
            jobs.append(Job(request_id=number, body=body, json_length=length, deadline_at=None))
        for answer in answer_batch(echoes[kind], jobs, now=0.0):
            assert (answer.status, answer.error, answer.batch_size) == (200, None, 1)
            body, length = encode_response(
                model_name="m", model_version="1", outputs=answer.outputs, binary=answer.binary
            )
            found, mine = decode_response(body, length).outputs[f"out_{kind[0]}"], sent[answer.request_id]
            assert (found.datatype, found.array.shape, bits(found)) == (mine.datatype, mine.array.shape, bits(mine))

    through()
