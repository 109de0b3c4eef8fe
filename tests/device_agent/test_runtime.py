"""The runtime on real onnxruntime sessions, and the provider chain on every kind of machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aios_edge.errors import RequestError, RuntimeUnavailable
from aios_edge.manifest import SessionSpec, TensorSpec
from aios_edge.oip.datatypes import DTYPES, narrow_bf16
from aios_edge.profile import DeviceProfile, Provider, Threads
from aios_edge.provider_options import TENSORRT
from aios_edge.session import native, session_options
from device_agent import runtime as module
from device_agent.provider_walk import CPU, CUDA
from device_agent.runtime import Runtime


def profile(*providers: str, strict: bool = False, **threads: Any) -> DeviceProfile:
    return DeviceProfile(
        schema="1.0",
        name="here",
        title="",
        arch="any",
        providers=tuple(Provider(name=name, options={}) for name in providers or (CPU,)),
        precision_preference=("fp32",),
        quantization="none",
        strict_providers=strict,
        threads=Threads(**threads),
    )


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Any) -> Runtime:
    return Runtime(tiny_bundle.file("model.onnx"), tiny_bundle.manifest.session, profile())


def ids(*rows: list[int]) -> dict[str, Any]:
    array = np.array(rows, dtype=np.int64)
    return {"input_ids": array, "attention_mask": np.ones_like(array)}


def test_the_sessions_tensors_are_the_manifests(tiny: Runtime, tiny_bundle: Any) -> None:
    assert tiny.inputs == tiny_bundle.manifest.inputs
    assert tiny.outputs == tiny_bundle.manifest.outputs
    assert (tiny.providers_requested, tiny.providers_active, tiny.provider_reason) == ((CPU,), (CPU,), None)


def test_a_run_gives_named_outputs(tiny: Runtime) -> None:
    outputs = tiny.run(ids([2, 4, 3], [2, 14, 3]))
    assert list(outputs) == ["logits"]
    assert outputs["logits"].shape == (2, 2) and outputs["logits"].dtype == np.float32


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "missing input input_ids, attention_mask"),
        ({**ids([2, 3]), "extra": np.zeros(1)}, "unknown input extra"),
        ({name: array.astype(np.int32) for name, array in ids([2, 3]).items()}, "holds int32, the model takes INT64"),
        ({name: array[0] for name, array in ids([2, 3]).items()}, "has shape"),
        ({**ids([2, 3]), "attention_mask": np.ones((1, 3), dtype=np.int64)}, "3 in the dimension 'length'"),
        (ids([2, 10_000]), "the model refuses"),
    ],
)
def test_inputs_that_do_not_fit_are_the_clients_fault(tiny: Runtime, inputs: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        tiny.run(inputs)
    assert caught.value.http_status == 400


def test_a_provider_that_is_not_installed_is_replaced_and_the_reason_kept(tiny_bundle: Any) -> None:
    got = Runtime(tiny_bundle.file("model.onnx"), SessionSpec(), profile(TENSORRT, CUDA, CPU))
    assert got.providers_requested == (TENSORRT, CUDA, CPU) and got.providers_active == (CPU,)
    assert got.provider_reason is not None and TENSORRT in got.provider_reason and CUDA in got.provider_reason


def test_a_chain_without_the_cpu_ends_there_all_the_same(tiny_bundle: Any) -> None:
    got = Runtime(tiny_bundle.file("model.onnx"), SessionSpec(), profile(CUDA))
    assert got.providers_active == (CPU,) and "not in this onnxruntime" in (got.provider_reason or "")


def test_a_strict_profile_refuses_to_fall_back(tiny_bundle: Any) -> None:
    with pytest.raises(RuntimeUnavailable, match=CUDA) as caught:
        Runtime(tiny_bundle.file("model.onnx"), SessionSpec(), profile(CUDA, CPU, strict=True))
    assert "[gpu]" in str(caught.value)
    Runtime(tiny_bundle.file("model.onnx"), SessionSpec(), profile(CPU, strict=True))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"not a model" * 10):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(RuntimeUnavailable, match="can't load"):
            Runtime(tmp_path / "model.onnx", SessionSpec(), profile())
    with pytest.raises(RuntimeUnavailable):
        Runtime(tmp_path / "missing.onnx", SessionSpec(), profile())


def saved(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: Any = ()) -> Path:
    import onnx
    from onnx import helper

    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_session_options_reach_the_session(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    one = numpy_helper.from_array(np.ones(1, dtype=np.float32), "one")
    nodes = [helper.make_node("Add", ["x", "one"], ["a"]), helper.make_node("Identity", ["a"], ["y"])]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 1])] for name in ("x", "y")]
    path = saved(tmp_path / "m.onnx", nodes, ends[0], ends[1], [one])
    written = tmp_path / "optimized.onnx"
    entries = {"session.intra_op.allow_spinning": "1", "session.x": "7"}
    spec = SessionSpec(graph_optimization_level="basic", disabled_optimizers=("X",), config_entries=entries)
    options = native(module._onnxruntime(), session_options(spec, Threads(intra_op=3, inter_op=2)))
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.graph_optimization_level.name == "ORT_ENABLE_BASIC"
    assert options.get_session_config_entry("session.x") == "7"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"  # not by the back door
    assert options.log_severity_level == 3 and not written.exists()
    assert Runtime(path, spec, profile()).run({"x": np.zeros((2, 1), dtype=np.float32)})["y"].tolist() == [[1], [1]]


@pytest.mark.parametrize("datatype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (2,), (0, 3)])
def test_tensors_of_every_kind_pass_through(tmp_path: Path, datatype: str, shape: tuple[int, ...]) -> None:
    from onnx import TensorProto, helper

    kinds = {"FP16": "FLOAT16", "BF16": "BFLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}
    kind = getattr(TensorProto, kinds.get(datatype, datatype))
    ends = [[helper.make_tensor_value_info(name, kind, list(shape))] for name in ("x", "y")]
    runtime = Runtime(
        saved(tmp_path / "m.onnx", [helper.make_node("Identity", ["x"], ["y"])], ends[0], ends[1]),
        SessionSpec(),
        profile(),
    )
    assert runtime.inputs == (TensorSpec(name="x", datatype=datatype, shape=shape),)
    array = np.full(shape, "ä".encode() if datatype == "BYTES" else 1, dtype=DTYPES[datatype])
    array.flags.writeable = False
    answer = runtime.run({"x": array})["y"]
    assert answer.shape == shape and answer.dtype == array.dtype and answer.tolist() == array.tolist()


def ends(*kinds: str, shape: Any = (2,)) -> list[Any]:
    """Inputs or outputs of these types, named by their places."""
    from onnx import TensorProto, helper

    return [helper.make_tensor_value_info(f"t{n}", getattr(TensorProto, kind), shape) for n, kind in enumerate(kinds)]


def test_every_bit_of_bf16_comes_back(tmp_path: Path) -> None:
    from onnx import helper

    nodes = [helper.make_node("Identity", ["t0"], ["y"])]
    one = helper.make_tensor_value_info("y", 16, [65536])
    runtime = Runtime(
        saved(tmp_path / "m.onnx", nodes, ends("BFLOAT16", shape=[65536]), [one]), SessionSpec(), profile()
    )
    every = np.arange(65536, dtype=np.uint16)  # NaN with all their payloads among them
    assert (runtime.run({"t0": every})["y"] == every).all()
    assert (runtime.run({"t0": every[::-1]})["y"] == every[::-1]).all(), "an array that isn't contiguous"


def test_bf16_goes_with_other_datatypes(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["t0"], ["y0"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["t1"], ["y1"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["t1"], ["y2"], to=TensorProto.STRING),
    ]
    kinds = (TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.STRING)
    outputs = [helper.make_tensor_value_info(f"y{n}", kind, (2,)) for n, kind in enumerate(kinds)]
    runtime = Runtime(saved(tmp_path / "m.onnx", nodes, ends("FLOAT", "BFLOAT16"), outputs), SessionSpec(), profile())
    assert [spec.datatype for spec in runtime.outputs] == ["BF16", "FP32", "BYTES"]
    values = np.array([1.5, -2.0], dtype=np.float32)
    found = runtime.run({"t0": values, "t1": narrow_bf16(values)})
    assert found["y0"].tolist() == narrow_bf16(values).tolist() and found["y1"].tolist() == values.tolist()
    assert found["y2"].tolist() == [b"1.5", b"-2"]
    with pytest.raises(RequestError):
        runtime.run({"t0": values, "t1": values})


def test_text_and_bf16_go_together_on_both_sides(tmp_path: Path) -> None:
    from onnx import helper

    both = [helper.make_node("Identity", [f"t{n}"], [f"y{n}"]) for n in range(2)]
    inputs, outputs = (
        [helper.make_tensor_value_info(f"{side}{n}", kind, [None, 2]) for n, kind in enumerate((8, 16))]
        for side in ("t", "y")
    )
    runtime = Runtime(saved(tmp_path / "m.onnx", both, inputs, outputs), SessionSpec(), profile())
    assert [(spec.name, spec.datatype, spec.shape) for spec in runtime.outputs] == [
        ("y0", "BYTES", (-1, 2)),
        ("y1", "BF16", (-1, 2)),
    ]
    every = np.arange(65536, dtype=np.uint16).reshape(-1, 2)
    text = np.full(every.shape, b"\xc3\xa4", dtype=np.object_)
    found = runtime.run({"t0": text, "t1": every})
    number = ((every & 0x7F80) != 0x7F80) | ((every & 0x7F) == 0)
    assert (found["y1"] == every)[number].all() and found["y0"].tolist() == text.tolist()
    assert (((found["y1"] & 0x7F80) == 0x7F80) & ((found["y1"] & 0x7F) != 0))[~number].all(), (
        "what is no number is none"
    )
    assert runtime.run({"t0": text[:0], "t1": every[:0]})["y1"].shape == (0, 2)


def test_the_weights_beside_such_a_model_are_found(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.arange(1000, dtype=np.float32)
    nodes = [
        helper.make_node("Cast", ["t"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["number", "weights"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.BFLOAT16),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("t", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [1000])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="data", size_threshold=256)
    found = Runtime(path, SessionSpec(), profile()).run({"t": np.array([b"0.5"], dtype=np.object_)})["y"]
    assert found.tolist() == narrow_bf16(weights * np.float32(0.5)).tolist()


def test_what_is_no_tensor_of_the_protocol_is_refused_with_its_type(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    def sequence(path: Path) -> Path:
        nodes = [helper.make_node("SequenceConstruct", ["t0"], ["y"])]
        return saved(path, nodes, ends("FLOAT"), [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)])

    def optional(path: Path) -> Path:
        kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, (2,)))
        return saved(
            path, [helper.make_node("Optional", ["t0"], ["y"])], ends("FLOAT"), [helper.make_value_info("y", kind)]
        )

    def float8(path: Path) -> Path:
        return saved(
            path,
            [helper.make_node("Identity", ["t0"], ["y"])],
            ends("FLOAT8E5M2"),
            [helper.make_tensor_value_info("y", TensorProto.FLOAT8E5M2, (2,))],
        )

    for make, says in ((sequence, r"seq\(tensor\(float\)\)"), (optional, "optional"), (float8, "float8e5m2")):
        with pytest.raises(RuntimeUnavailable, match=says):
            Runtime(make(tmp_path / "m.onnx"), SessionSpec(), profile())


def test_an_older_onnxruntime_refuses_bf16_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from onnx import helper

    real = module._onnxruntime()
    older = SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if not name.startswith("__")})
    older.__version__, older.OrtValue = "1.19.2", SimpleNamespace()
    monkeypatch.setattr(module, "_onnxruntime", lambda: older)
    y = helper.make_tensor_value_info("y", 16, (2,))
    path = saved(tmp_path / "m.onnx", [helper.make_node("Identity", ["t0"], ["y"])], ends("BFLOAT16"), [y])
    with pytest.raises(RuntimeUnavailable, match=r"1\.19\.2 has no way to pass BF16.*update onnxruntime"):
        Runtime(path, SessionSpec(), profile())


def test_without_onnxruntime_every_way_to_get_it_is_named(tiny_bundle: Any) -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
from pathlib import Path
from aios_edge.manifest import SessionSpec
from aios_edge.errors import MissingExtra
from aios_edge.profile_files import load_profile
from device_agent.runtime import Runtime
try:
    Runtime(Path(sys.argv[1]), SessionSpec(), load_profile("x86-gateway"))
except MissingExtra as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, "m.onnx"], capture_output=True, text=True, check=True)
    assert all(part in done.stdout for part in ("aios-edge[cpu]", "aios-edge[gpu]", "Jetson"))


def test_loading_and_refusing_say_nothing_on_stdout(tiny_bundle: Any) -> None:
    code = """
import sys
from pathlib import Path
import msgspec
from aios_edge.manifest import SessionSpec
from aios_edge.errors import RequestError
from aios_edge.profile import Provider
from aios_edge.profile_files import load_profile
from device_agent.runtime import Runtime
profile = msgspec.structs.replace(load_profile("x86-gateway"), providers=(Provider(name="CUDAExecutionProvider"),))
try:
    Runtime(Path(sys.argv[1]), SessionSpec(), profile).run({})
except RequestError:
    pass
"""
    path = str(tiny_bundle.file("model.onnx"))
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
