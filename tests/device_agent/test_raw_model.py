"""A raw ONNX model without an agent around it: which folders are one, and every bit through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_models import echo, scale

from aios_edge.errors import BundleRefused, RequestError
from aios_edge.oip.datatypes import DTYPES, Tensor
from aios_edge.oip.envelope import encode_response
from aios_edge.oip.tensors import decode_response, encode_request
from aios_edge.profile_files import load_profile
from device_agent.activation import Activated
from device_agent.activation_raw import activate_raw
from device_agent.raw_model import open_raw
from device_agent.wire import RawModel
from device_agent.worker_batch import Job, answer_batch


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
        answers = answer_batch(echoes[kind], jobs, now=0.0)
        assert [answer.request_id for answer in answers] == [job.request_id for job in jobs]
        for answer in answers:
            assert (answer.status, answer.error, answer.batch_size) == (200, None, 1)
            body, length = encode_response(
                model_name="m", model_version="1", outputs=answer.outputs, binary=answer.binary
            )
            found, mine = decode_response(body, length).outputs[f"out_{kind[0]}"], sent[answer.request_id]
            assert (found.datatype, found.array.shape, bits(found)) == (mine.datatype, mine.array.shape, bits(mine))

    through()
