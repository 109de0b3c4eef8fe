"""What tests of bundles that replace each other share: clients that go on asking, models that break promises."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import http as triton

CLIENTS = 4
UNKNOWN = 1  # the token of words that no golden sample has
Failures = list[BaseException]


class _Client(triton.InferenceServerClient):  # type: ignore[misc]
    def __del__(self) -> None:
        """Not closed here: whichever thread collects it may be another one, in which that fails."""


def client(agent: Any) -> Any:
    return _Client(agent.url.removeprefix("http://"), network_timeout=60, connection_timeout=60)


def asked(text: str = "a good film") -> list[Any]:
    tensor = triton.InferInput("text", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return [tensor]


def ids(agent: Any) -> tuple[str, int]:
    model = agent.status()["models"]["tiny"]
    return model["bundle_id"], model["worker_pid"]


def memory_mapped(pid: int) -> bool:
    """Whether a process of that id still has memory."""
    try:
        return any(line.startswith("VmRSS:") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return False


@contextmanager
def traffic(agent: Any, text: str = "a good film") -> Iterator[Counter[tuple[str, bytes]]]:
    """Requests from several clients, one behind the other; yields (version, label) of the answers so far, and raises
    what any of them ran into."""
    seen: Counter[tuple[str, bytes]] = Counter()
    enough, failures = threading.Event(), Failures()

    def ask() -> None:
        mine = client(agent)
        try:
            while not enough.is_set():
                answer = mine.infer("tiny", asked(text))
                seen[answer.get_response()["model_version"], answer.as_numpy("label")[0]] += 1
        except BaseException as error:
            failures.append(error)
        finally:
            mine.close()

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        agent.until(lambda _: failures or sum(seen.values()) >= 20)
        yield seen
        known = sum(seen.values())
        agent.until(lambda _: failures or sum(seen.values()) >= known + 20)
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


def post(agent: Any, action: str, body: bytes = b"") -> tuple[int, Any]:

    request = urllib.request.Request(f"{agent.url}/v2/repository/models/tiny/{action}", body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def failing_model(parts: dict[str, Any], folder: Path) -> dict[str, Path]:
    """As the tiny model, but an unknown word makes it look beyond the table's end."""
    from onnx import TensorProto, helper

    return changed_model(
        parts,
        folder,
        [
            helper.make_node("Equal", ["input_ids", "unknown_id"], ["unknown"]),
            helper.make_node("Cast", ["unknown"], ["far"], to=TensorProto.INT64),
            helper.make_node("Mul", ["far", "many"], ["farther"]),
            helper.make_node("Add", ["input_ids", "farther"], ["looked_up"]),
        ],
    )


def slow_model(parts: dict[str, Any], folder: Path) -> dict[str, Path]:
    """As the tiny model, but an unknown word costs it some ten milliseconds or more."""
    from onnx import TensorProto, helper

    matrix = [TensorProto.FLOAT, [128, 128]]
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["before", "before"], ["after"]),
            helper.make_node("Identity", ["go_on"], ["still"]),
        ],
        "burn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", *matrix),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", *matrix),
        ],
    )
    return changed_model(
        parts,
        folder,
        [
            helper.make_node("Equal", ["input_ids", "unknown_id"], ["unknown"]),
            helper.make_node("Cast", ["unknown"], ["marks"], to=TensorProto.INT64),
            helper.make_node("ReduceMax", ["marks"], ["mark"], keepdims=0),
            helper.make_node("Mul", ["mark", "many"], ["turns"]),
            helper.make_node("Loop", ["turns", "", "zeros"], ["burnt"], body=body),
            helper.make_node("ReduceSum", ["burnt"], ["nothing_float"], keepdims=0),
            helper.make_node("Cast", ["nothing_float"], ["nothing"], to=TensorProto.INT64),
            helper.make_node("Add", ["input_ids", "nothing"], ["looked_up"]),
        ],
    )


def changed_model(parts: dict[str, Any], folder: Path, before: list[Any]) -> dict[str, Path]:
    """The tiny model with nodes that make ``looked_up`` of ``input_ids``."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(parts["files"]["model.onnx"])
    nodes = [*before, *model.graph.node]
    nodes[len(before)].input[1] = "looked_up"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, value in (
        ("unknown_id", np.array(UNKNOWN, dtype=np.int64)),
        ("many", np.array(1000, dtype=np.int64)),
        ("zeros", np.zeros((128, 128), dtype=np.float32)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.save_model(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=256,
        convert_attribute=False,
    )
    return {name: folder / name for name in ("model.onnx", "model.onnx.data")}
