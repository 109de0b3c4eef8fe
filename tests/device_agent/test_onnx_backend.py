"""The ONNX backend's own test models through the agent's doors, JSON, binary and gRPC: what bare onnxruntime answers.

Every model goes into a repository, also those that can't be served: those the agent has to refuse. What can't be
compared is counted by its reason, and the long test prints that table.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import http.client
import importlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_clients import infer

from aios_edge.errors import RequestError
from aios_edge.oip.datatypes import FLOATS, Tensor, widen_bf16
from aios_edge.oip.tensors import decode_response, encode_request
from device_agent.grpc_door.contents import RAW_ONLY

ROOT = Path(__file__).parents[2]
AT_ONCE = 250  # models of one agent; its workers are threads, with two descriptors each
RUNS = 4  # of each model: binary, gRPC raw and typed, JSON
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16

#: What ``make test`` runs: many datatypes, scalars, empty tensors, text, and what can't be served.
SAMPLE_MODULES = ("abs", "bernoulli", "cast", "constant", "identity", "isnan", "nonzero", "reducemax", "size", "where")
SAMPLE_MODULES += ("dropout", "string_concat", "topk")
SAMPLE = {
    "test_abs",
    "test_bernoulli",
    "test_bernoulli_expanded",
    "test_cast_BFLOAT16_to_FLOAT",
    "test_cast_FLOAT_to_BFLOAT16",
    "test_cast_FLOAT_to_DOUBLE",
    "test_cast_FLOAT_to_FLOAT16",
    "test_cast_FLOAT_to_FLOAT8E4M3FN",
    "test_constant",
    "test_identity",
    "test_identity_sequence",
    "test_identity_opt",
    "test_isnan",
    "test_isnan_float16",
    "test_nonzero_example",
    "test_reduce_max_bool_inputs",
    "test_reduce_max_empty_set",
    "test_size",
    "test_string_concat",
    "test_string_concat_utf8",
    "test_training_dropout",
    "test_top_k",
    "test_top_k_uint64",
    "test_where_example",
}

#: onnxruntime's names of the types that the protocol has.
SERVED = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
SERVED |= {"bool", "float", "double", "float16", "bfloat16", "string"}

UNSUPPORTED = "onnxruntime can't load it"
NO_TENSOR = "a sequence or an optional value among its inputs or outputs"
NOT_IN_PROTOCOL = "a datatype that the protocol doesn't have"
TEXT_TO_BF16 = "text in and BF16 out, which onnxruntime's Python can't pass"
FAILS = "onnxruntime loads it and fails to run it"
BINARY_ONLY = "NaN or infinity in its inputs, which JSON can't carry: binary and gRPC compared"
EXACT = "the same answer, JSON, binary and gRPC"
FOR_PROCESSES = "an empty tensor where the model declares a free dimension, which only a worker process takes"
EXACT_BINARY = "the same answer in binary and gRPC, and a 422 in JSON for NaN or infinity"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with one set of inputs. ``expected``: the answers to :data:`RUNS` runs in a row; those of a dropout
    differ. ``unservable``: why the agent has to refuse it."""

    name: str
    model: bytes
    inputs: dict[str, Tensor]
    expected: tuple[tuple[Tensor, ...], ...] = ()
    unservable: str | None = None
    detail: str = ""  # what of the model makes it so
    fails: bool = False


@dataclass
class Tally:
    """Names by what became of them, and what went wrong."""

    by_outcome: dict[str, list[Case]] = field(default_factory=lambda: collections.defaultdict(list))
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take over another's."""
        for outcome, cases in other.by_outcome.items():
            self.by_outcome[outcome] += cases
        self.wrong += other.wrong

    def table(self) -> str:
        """Each outcome with the reasons counted, or the models named where they are few."""
        lines = []
        for outcome, cases in sorted(self.by_outcome.items(), key=lambda item: -len(item[1])):
            lines.append(f"{len(cases):5}  {outcome}")
            reasons = collections.Counter(case.detail for case in cases if case.detail)
            lines += [f"       {count:5}  {reason}" for reason, count in reasons.most_common()]
            if not reasons and len(cases) <= 12:
                lines += [f"              {case.name}" for case in cases]
        return "\n".join(lines)


def node_tests(modules: Sequence[str] | None = None) -> list[Any]:
    """The backend's test cases; ``modules`` None: of every operator."""
    from onnx.backend.test.case import node
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they overflow on purpose
        if modules is None:
            found: list[Any] = load_model_tests(kind="node")
            return found
        for module in modules:
            importlib.import_module(f"onnx.backend.test.case.node.{module}")
    return list(node._NodeTestCases)


def model_tests() -> list[Any]:
    """The backend's other test cases, whole little networks; ``real`` ones would have to be downloaded."""
    from onnx.backend.test.loader import load_model_tests

    kinds = ("simple", "pytorch-operator", "pytorch-converted")
    return [test for kind in kinds for test in load_model_tests(kind=kind) if test.model_dir]


def tensor_of(value: Any) -> Tensor:
    """An input of a test case as the protocol has it."""
    from onnx import TensorProto, numpy_helper

    array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
    if array.dtype.name == "bfloat16":
        return Tensor("BF16", array.view(np.uint16))
    return Tensor.of(array)


def case_of(test: Any) -> Case:
    """Open and run a model with bare onnxruntime, on the agent's one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    folder = Path(test.model_dir) if test.model is None else None
    model = test.model.SerializeToString() if folder is None else (folder / "model.onnx").read_bytes()
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return Case(name=test.name, model=model, inputs={}, unservable=UNSUPPORTED, detail=why_not(str(error)))
    takes, gives = [node.type for node in session.get_inputs()], [node.type for node in session.get_outputs()]
    why: str | None = None
    if not all(kind.startswith("tensor(") for kind in takes + gives):
        why = NO_TENSOR
    elif any(kind.removeprefix("tensor(").rstrip(")") not in SERVED for kind in takes + gives):
        why = NOT_IN_PROTOCOL
    elif "tensor(string)" in takes and "tensor(bfloat16)" in gives:
        why = TEXT_TO_BF16
    if why is not None:
        served = [f"tensor({name})" for name in SERVED]
        detail = ", ".join(sorted({kind for kind in takes + gives if kind not in served}) or takes + gives)
        return Case(name=test.name, model=model, inputs={}, unservable=why, detail=detail)
    given = test.data_sets[0][0] if folder is None else stored(folder / "test_data_set_0")
    names = [node.name for node in session.get_inputs()]
    inputs = {name: tensor_of(value) for name, value in zip(names, given, strict=True)}
    try:
        expected = tuple(bare(session, inputs) for _ in range(RUNS))
        return Case(name=test.name, model=model, inputs=inputs, expected=expected)
    except Exception as error:
        return Case(name=test.name, model=model, inputs=inputs, fails=True, detail=why_not(str(error)))


def stored(folder: Path) -> list[Any]:
    """The inputs that lie beside a model."""
    import onnx

    paths = sorted(folder.glob("input_*.pb"), key=lambda path: int(path.stem.removeprefix("input_")))
    return [onnx.load_tensor(path) for path in paths]


def why_not(error: str) -> str:
    """The kind of onnxruntime's refusal, without what differs from model to model."""
    if found := re.search(r"implementation for (\w+)\(\d+\)|kernel for (?:the )?(?:operator )?(\w+)", error):
        return f"no kernel for {found[1] or found[2]} at this opset and of these types"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", error.splitlines()[0])
    text = re.sub(r"\S*/\S+:\d+ .*?\)(::<lambda\S*>)?( \[with [^\]]*\])? ", "", text)  # file and function
    return re.sub(r"\(node:?[^)]*\)|Node:\S+|'[^']*'", "…", text)[:140]


def bare(session: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What onnxruntime answers without any of our code."""
    import onnxruntime as ort

    feeds: dict[str, Any] = {}
    for name, tensor in inputs.items():
        if tensor.datatype == "BF16":
            feeds[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.array, BFLOAT16)
        elif tensor.datatype == "BYTES":
            feeds[name] = np.array([item.decode() for item in tensor.array.ravel()], dtype=object)
            feeds[name] = feeds[name].reshape(tensor.array.shape)
        else:
            feeds[name] = tensor.array
    if all(node.type != "tensor(bfloat16)" for node in session.get_outputs()):
        return tuple(Tensor.of(np.asarray(array)) for array in session.run(None, feeds))
    values = {n: v if isinstance(v, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(v) for n, v in feeds.items()}
    names = [node.name for node in session.get_outputs()]
    found = []
    for value in session.run_with_ort_values(names, values):
        if value.element_type() != BFLOAT16:
            found.append(Tensor.of(value.numpy()))
            continue
        content = ctypes.string_at(value.data_ptr(), 2 * math.prod(value.shape())) if math.prod(value.shape()) else b""
        found.append(Tensor("BF16", np.frombuffer(content, np.uint16).reshape(value.shape())))
    return tuple(found)


def same(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit."""
    if (left.datatype, left.array.shape) != (right.datatype, right.array.shape):
        return False
    if left.datatype == "BYTES":
        return bool(left.array.ravel().tolist() == right.array.ravel().tolist())
    return left.array.tobytes() == right.array.tobytes()


def finite(tensor: Tensor) -> bool:
    if tensor.datatype not in FLOATS:
        return True
    return bool(np.isfinite(widen_bf16(tensor.array) if tensor.datatype == "BF16" else tensor.array).all())


class Door:
    """One connection each to an agent's REST and gRPC doors."""

    def __init__(self, url: str, address: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        self.channel = grpc.insecure_channel(address)

    def infer(self, model: str, inputs: dict[str, Tensor], *, binary: bool) -> tuple[int, Any]:
        """Status and outputs, or status and error. Raises :class:`RequestError` for what JSON can't carry."""
        body, length = encode_request(inputs, binary=binary)
        headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
        self._connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        response = self._connection.getresponse()
        content, found = response.read(), response.headers.get("Inference-Header-Content-Length")
        if response.status != 200:
            return response.status, json.loads(content)["error"]
        return response.status, decode_response(content, int(found) if found else None).outputs


def outcome(case: Case, model: str, door: Door) -> str:
    """What became of a served model; raises :class:`AssertionError` for what must not be."""
    status, binary = door.infer(model, case.inputs, binary=True)
    over_grpc = grpc_answers(case, model, door)
    if case.fails:
        assert status >= 400, f"answered {status} where onnxruntime fails"
        assert not over_grpc, "answered over gRPC where onnxruntime fails"
        return FAILS
    if status == 400 and "the tensor is empty" in binary and not all(t.array.size for t in case.inputs.values()):
        return FOR_PROCESSES
    assert status == 200, binary

    answers_of_bare = iter(case.expected)

    def check(outputs: dict[str, Tensor], door: str) -> None:
        found, expected = tuple(outputs.values()), next(answers_of_bare)
        assert len(found) == len(expected)
        for mine, theirs, name in zip(found, expected, outputs, strict=True):
            assert same(mine, theirs), f"{door} {name}: {mine} instead of {theirs}"

    check(binary, "binary")
    assert "raw" in over_grpc, "refused over gRPC"
    for form, answer in over_grpc.items():
        check(answer, f"gRPC, {form}")
    try:
        status, answer = door.infer(model, case.inputs, binary=False)
    except RequestError:
        assert not all(finite(tensor) for tensor in case.inputs.values())
        return BINARY_ONLY
    if not all(finite(tensor) for tensor in case.expected[0]):
        assert status == 422 and "binary" in answer, answer
        return EXACT_BINARY
    assert status == 200, answer
    check(answer, "JSON")
    return EXACT


def grpc_answers(case: Case, model: str, door: Door) -> dict[str, dict[str, Tensor]]:
    """The outputs raw, and typed where there are fields for all datatypes; what is refused has none."""
    kinds = {tensor.datatype for tensor in (*case.inputs.values(), *sum(case.expected[:1], ()))}
    forms = {"raw": True} if kinds.intersection(RAW_ONLY) else {"raw": True, "typed": False}
    answers = {}
    for form, raw in forms.items():
        with contextlib.suppress(grpc.RpcError):
            answers[form] = infer(door.channel, model, case.inputs, raw=raw)
    assert len(answers) in (0, len(forms)), "refused in one form only"
    return answers


def run_all(cases: Sequence[Case], start_agent: Any, profile: Path | str, folder: Path) -> Tally:
    """Every case through an agent; so many at once that their workers fit."""
    tally = Tally()
    for start in range(0, len(cases), AT_ONCE):
        part = {f"m{start + index}": case for index, case in enumerate(cases[start : start + AT_ONCE])}
        repository = folder / str(start)
        for name, case in part.items():
            (repository / name / "1").mkdir(parents=True)
            (repository / name / "1" / "model.onnx").write_bytes(case.model)
        options = {"profile": profile, "limit_s": 300.0, "http": 'grpc_bind = "127.0.0.1:0"'}
        agent = start_agent(f'[repository]\npath = "{repository}"', **options)
        refused = {bundle["model"]: bundle["detail"] for bundle in agent.status()["refused"]}
        door = Door(agent.url, agent.grpc)
        for name, case in part.items():
            try:
                if case.unservable is None:
                    assert name not in refused, refused.get(name)
                    tally.by_outcome[outcome(case, name, door)].append(case)
                else:
                    assert name in refused, "is served"
                    assert ("can't load" in refused[name]) == (case.unservable == UNSUPPORTED), refused[name]
                    tally.by_outcome[f"refused: {case.unservable}"].append(case)
            except AssertionError as error:
                tally.wrong.append(f"{case.name}: {str(error)[:300]}")
        door.channel.close()
        assert agent.stop() == 0
    return tally


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A profile whose workers are threads: a process for each of so many models would take minutes and gigabytes."""
    text = (ROOT / "profiles" / "x86-gateway.toml").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("profile") / "threads.toml"
    if "isolation" in text:
        text = "\n".join(line for line in text.splitlines() if not line.startswith("isolation"))
    path.write_text(text.replace("\nname", '\nisolation = "thread"\nname', 1), encoding="utf-8")
    yield path


def test_a_sample_of_the_backends_models(start_agent: Any, threads: Path, tmp_path: Path) -> None:
    chosen = [test for test in node_tests(SAMPLE_MODULES) if test.name in SAMPLE]
    assert {test.name for test in chosen} == SAMPLE
    tally = run_all([case_of(test) for test in chosen], start_agent, threads, tmp_path)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert {EXACT, EXACT_BINARY, BINARY_ONLY} <= set(tally.by_outcome), tally.table()


@pytest.mark.long
def test_every_model_of_the_backends(
    start_agent: Any, threads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [case_of(test) for test in (*node_tests(), *model_tests())]
    tally = run_all(cases, start_agent, threads, tmp_path / "threads")
    again = tally.by_outcome.pop(FOR_PROCESSES, [])
    tally.add(run_all(again, start_agent, "x86-gateway", tmp_path / "processes"))
    with capsys.disabled():
        print(f"\n{len(cases)} models of the ONNX backend at all doors, against bare onnxruntime:\n{tally.table()}")
    assert not tally.wrong and FOR_PROCESSES not in tally.by_outcome, "\n".join(tally.wrong)
    # With onnxruntime 1.23, the last for Python 3.10, 1,320; with 1.32 1,703.
    compared = sum(len(tally.by_outcome[name]) for name in (EXACT, EXACT_BINARY, BINARY_ONLY))
    assert compared > 1300 and len(cases) > 1600, tally.table()
