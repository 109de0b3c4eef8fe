"""Models that never end, or take more memory with every request, behind a real agent: it and its clients live on."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest


def write_endless(folder: Path) -> None:
    """y = x after ``rounds`` rounds of a loop that does nothing."""
    import onnx
    from onnx import TensorProto, helper

    def tensor(name: str, kind: int, shape: list[int]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["go_on"], ["goes_on"]), helper.make_node("Identity", ["was"], ["is"])],
        "body",
        [
            tensor("round", TensorProto.INT64, []),
            tensor("go_on", TensorProto.BOOL, []),
            tensor("was", TensorProto.FLOAT, [1]),
        ],
        [tensor("goes_on", TensorProto.BOOL, []), tensor("is", TensorProto.FLOAT, [1])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)],
        "endless",
        [tensor("rounds", TensorProto.INT64, []), tensor("x", TensorProto.FLOAT, [1])],
        [tensor("y", TensorProto.FLOAT, [1])],
    )
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save_model(model, folder / "model.onnx")


def ask(agent: Any, rounds: int, **parameters: Any) -> tuple[int, Any]:
    inputs = [
        {"name": "rounds", "datatype": "INT64", "shape": [], "data": [rounds]},
        {"name": "x", "datatype": "FP32", "shape": [1], "data": [7.0]},
    ]
    body = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    try:
        with urllib.request.urlopen(f"{agent.url}/v2/models/endless/infer", body, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write_endless(root / "endless" / "1")
    return root


def test_an_endless_loop_in_a_model_is_ended_and_its_request_answered(start_agent: Any, repository: Path) -> None:
    agent = start_agent(f'[repository]\npath = "{repository}"\n[policy]\nbatch_timeout_s = 0.5')
    assert ask(agent, 3)[0] == 200
    code, document = ask(agent, 2**62)
    assert code == 503 and document["parameters"]["reason"] == "worker_lost", document
    agent.until(lambda status: status["models"]["endless"]["state"] == "ready")
    assert ask(agent, 3)[0] == 200
    crashes = agent.events("worker_crashed")
    assert len(crashes) == 2, "once among others, once alone, and no more"
    assert all("did not end a batch within 0.5 s and was killed" in crash["how"] for crash in crashes)
    assert agent.infer()[0] == 200, "the other model never noticed"
    code, document = ask(agent, 2**62, timeout=100_000)
    assert code in (503, 504), "with a deadline it isn't tried again after it"
    agent.until(lambda _: len(agent.events("worker_crashed")) == 3)
    assert agent.stop() == 0
