"""What a batch of requests becomes: which share a model run, and that none spoils another."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import msgspec
import numpy as np
import pytest

from aios_edge.errors import RequestError
from aios_edge.oip.envelope import encode_response
from aios_edge.oip.tensors import decode_response
from aios_edge.profile_files import load_profile
from device_agent.activation import Activated, activate
from device_agent.worker_batch import Answer, Job, answer_batch
from device_agent.worker_natural import Runner


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Any) -> Activated:
    return activate(tiny_bundle.path, load_profile("x86-gateway"), "quick", alone=False)


def job(request_id: int, document: object, deadline_at: float | None = None) -> Job:
    return Job(request_id=request_id, body=msgspec.json.encode(document), json_length=None, deadline_at=deadline_at)


def text_job(request_id: int, *texts: str, **more: Any) -> Job:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
    return job(request_id, {"inputs": [tensor], **more})


def ids_job(request_id: int, rows: list[list[int]]) -> Job:
    shape = [len(rows), len(rows[0])]
    ids = {"name": "input_ids", "datatype": "INT64", "shape": shape, "data": rows}
    mask = {"name": "attention_mask", "datatype": "INT64", "shape": shape, "data": np.ones(shape, dtype=int).tolist()}
    return job(request_id, {"inputs": [ids, mask]})


def run(tiny: Activated, *jobs: Job) -> list[Answer]:
    return answer_batch(tiny, jobs, now=time.monotonic())


def output(answer: Answer, name: str) -> Any:
    assert answer.status == 200, answer.error
    return next(tensor["data"] for tensor in msgspec.json.decode(answer.outputs) if tensor["name"] == name)


def test_texts_of_several_requests_share_one_run(tiny: Activated) -> None:
    first, second = run(tiny, text_job(1, "a good film"), text_job(2, "awful", "great plot"))
    assert (first.batch_size, second.batch_size) == (2, 2)
    assert output(first, "label") == ["positive"]
    assert output(second, "label") == ["negative", "positive"]
    assert (first.length, second.length) == (5, 4)  # with [CLS] and [SEP]; the longest row of each request
    assert first.compute_s > 0


def test_an_answer_says_how_sure_its_least_sure_row_is(tiny: Activated) -> None:
    single, double, tensors = run(tiny, text_job(1, "good"), text_job(2, "good", "a film"), ids_job(3, [[2, 4, 3]]))
    assert single.confidence == pytest.approx(output(single, "score")[0], abs=1e-6)
    assert double.confidence == pytest.approx(min(output(double, "score")), abs=1e-6) and double.confidence < 0.9
    assert tensors.confidence is None


def test_the_answer_does_not_depend_on_the_order_of_arrival(tiny: Activated) -> None:
    jobs = [text_job(number, f"{'the film and ' * number}good") for number in range(1, 6)]
    forth, back = run(tiny, *jobs), run(tiny, *reversed(jobs))
    assert [answer.request_id for answer in back] == [5, 4, 3, 2, 1]
    assert {a.request_id: a.outputs for a in forth} == {a.request_id: a.outputs for a in back}


def test_more_rows_than_the_largest_batch_are_split(tiny: Activated) -> None:
    words = ["good" if number % 3 else "bad" for number in range(75)]  # max_batch_size is 32
    (answer,) = run(tiny, text_job(1, *words))
    assert output(answer, "label") == ["positive" if word == "good" else "negative" for word in words]


def told(answers: list[Answer]) -> list[Answer]:
    return [msgspec.structs.replace(answer, compute_s=0.0) for answer in answers]


def test_with_a_thread_for_the_runs_the_answers_are_the_same(tiny: Activated, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["good", "bad", "a film", "the plot and the film"]
    jobs = [text_job(n, *(words[(n + k) % 4] for k in range(n % 5 * 12 + 1))) for n in range(1, 9)]
    threads: set[str] = set()
    run_once = tiny.runtime.run

    def noted(inputs: Any) -> Any:
        threads.add(threading.current_thread().name)
        return run_once(inputs)

    monkeypatch.setattr(tiny.runtime, "run", noted)
    with Runner(tiny) as runner:
        for _ in range(2):
            beside = answer_batch(tiny, jobs, now=time.monotonic(), runner=runner)
    assert threads == {"model-runs"}
    assert told(beside) == told(run(tiny, *jobs))
    assert all(answer.compute_s > 0 for answer in beside)


def test_a_run_that_fails_in_its_thread_leaves_nothing_behind(tiny: Activated, monkeypatch: pytest.MonkeyPatch) -> None:
    run_once = tiny.runtime.run

    def picky(inputs: Any) -> Any:
        if (inputs["input_ids"] == 1).any():  # [UNK]
            raise ZeroDivisionError
        return run_once(inputs)

    monkeypatch.setattr(tiny.runtime, "run", picky)
    jobs = [text_job(n, *["a good film" if n % 2 else "awful"] * 16) for n in range(1, 5)]
    with Runner(tiny) as runner:
        for more, statuses in (([text_job(9, "zebra " * 6)], [200] * 4 + [500]), ([], [200] * 4)):
            answers = answer_batch(tiny, [*jobs, *more], now=time.monotonic(), runner=runner)
            assert [answer.status for answer in answers] == statuses
            assert [set(output(answer, "label")) for answer in answers[:4]] == [{"positive"}, {"negative"}] * 2


def test_tensor_rows_beyond_the_largest_batch_are_run_in_parts(
    tiny: Activated, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[2, 4 + number % 20, 3] for number in range(75)]
    seen: list[int] = []
    run_once = tiny.runtime.run
    monkeypatch.setattr(tiny.runtime, "run", lambda inputs: seen.append(len(inputs["input_ids"])) or run_once(inputs))
    logits = np.reshape(output(run(tiny, ids_job(1, rows))[0], "logits"), (75, 2))
    assert seen == [32, 32, 11]
    alone = [output(run(tiny, ids_job(1, [row]))[0], "logits") for row in rows]
    assert np.allclose(logits, alone, atol=1e-6)


def test_without_rows_there_is_an_answer_without_rows_and_the_model_is_not_asked(
    tiny: Activated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.runtime, "run", lambda inputs: pytest.fail("it ran"))
    shape = {"datatype": "INT64", "shape": [0, 3], "data": []}
    own = job(1, {"inputs": [{"name": name, **shape} for name in ("input_ids", "attention_mask")]})
    natural = job(2, {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [0], "data": []}]})
    tensors, texts = run(tiny, own, natural)
    assert (tensors.status, texts.status, tensors.batch_size, texts.batch_size) == (200, 200, 0, 0)
    assert json.loads(tensors.outputs) == [{"name": "logits", "datatype": "FP32", "shape": [0, 2], "data": []}]
    assert [(one["name"], one["shape"], one["data"]) for one in json.loads(texts.outputs)] == [
        ("label", [0], []),
        ("score", [0], []),
        ("probabilities", [0, 2], []),
    ]


def test_those_beside_one_without_rows_are_answered_as_ever(tiny: Activated) -> None:
    natural = job(2, {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [0], "data": []}]})
    alone, (with_it, empty) = run(tiny, text_job(1, "good"))[0], run(tiny, text_job(1, "good"), natural)
    assert with_it.outputs == alone.outputs and (empty.status, empty.batch_size) == (200, 0)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (([1, 0], [1, 0]), "the tensor is empty"),  # a row of no tokens
        (([0, 3], [1, 3]), "the tensor is empty"),
        (([0, 3], None), "the tensor is empty"),
        (([0], [0]), "has shape [0], the model takes [-1, -1]"),
    ],
)
def test_other_empty_tensors_are_refused_before_the_model_sees_them(
    tiny: Activated, shapes: tuple[list[int], list[int] | None], says: str
) -> None:
    inputs = [
        {"name": name, "datatype": "INT64", "shape": shape, "data": [1] * int(np.prod(shape))}
        for name, shape in zip(("input_ids", "attention_mask"), shapes, strict=True)
        if shape is not None
    ]
    (answer,) = run(tiny, job(1, {"inputs": inputs}))
    assert answer.status == 400 and answer.error is not None and says in answer.error


def test_tensors_of_equal_shape_share_a_run_and_others_run_alone(tiny: Activated) -> None:
    answers = run(tiny, ids_job(1, [[2, 4, 3]]), ids_job(2, [[2, 14, 3], [2, 5, 3]]), ids_job(3, [[2, 4, 24, 3]]))
    assert [answer.batch_size for answer in answers] == [2, 2, 1]
    assert [answer.length for answer in answers] == [3, 3, 4]
    alone = [run(tiny, each)[0] for each in (ids_job(1, [[2, 4, 3]]), ids_job(2, [[2, 14, 3], [2, 5, 3]]))]
    for together, single in zip(answers, alone, strict=False):
        assert output(together, "logits") == pytest.approx(output(single, "logits"))


def test_one_bad_request_never_spoils_its_batch(tiny: Activated) -> None:
    answers = run(
        tiny,
        text_job(1, "good"),
        Job(request_id=2, body=b"{nonsense", json_length=None, deadline_at=None),
        ids_job(3, [[2, 4, 3]]),
        ids_job(4, [[2, 10_000_000, 3]]),  # no such row in the model's table: the run they share fails
        job(5, {"inputs": [{"name": "other", "datatype": "FP32", "shape": [1], "data": [1.0]}]}),
        text_job(6, "awful"),
    )
    assert [answer.status for answer in answers][:4] == [200, 400, 200, answers[3].status]
    assert answers[3].status >= 400 and answers[3].error
    assert 400 <= answers[4].status < 500
    assert output(answers[0], "label") == ["positive"] and output(answers[5], "label") == ["negative"]


def test_a_wrong_name_is_named_beside_those_the_model_takes(tiny: Activated) -> None:
    (answer,) = run(tiny, job(1, {"inputs": [{"name": "txt", "datatype": "BYTES", "shape": [1], "data": ["good"]}]}))
    assert answer.status == 400 and answer.error is not None
    for name in ("'txt'", "text", "input_ids", "attention_mask"):
        assert name in answer.error


def test_a_request_whose_deadline_passed_is_not_run(tiny: Activated) -> None:
    now = time.monotonic()
    late, timely = answer_batch(
        tiny,
        [
            Job(request_id=1, body=text_job(1, "good").body, json_length=None, deadline_at=now - 0.001),
            Job(request_id=2, body=text_job(2, "good").body, json_length=None, deadline_at=now + 60),
        ],
        now=now,
    )
    assert (late.status, late.outputs) == (504, b"")
    assert (timely.status, timely.batch_size) == (200, 1)


def test_an_unexpected_failure_is_a_500_without_its_traceback(
    tiny: Activated, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(inputs: object) -> None:
        raise ZeroDivisionError("a secret path /etc/passwd")

    monkeypatch.setattr(tiny.runtime, "run", fail)
    first, second = run(tiny, text_job(1, "good"), text_job(2, "bad"))
    assert (first.status, second.status) == (500, 500)
    assert first.error is not None and "secret" not in first.error
    assert "secret" in capfd.readouterr().err


def test_what_the_model_refuses_is_the_clients_fault_only_where_it_sent_the_tensors(
    tiny: Activated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(inputs: object) -> None:
        raise RequestError("the model refuses these inputs")

    monkeypatch.setattr(tiny.runtime, "run", refuse)
    text, tensors = run(tiny, text_job(1, "good"), ids_job(2, [[2, 4, 3]]))
    assert (text.status, tensors.status) == (500, 400)


def test_outputs_are_binary_where_asked(tiny: Activated) -> None:
    (answer,) = run(
        tiny, text_job(1, "good", outputs=[{"name": "score", "parameters": {"binary_data": True}}, {"name": "label"}])
    )
    tensors = {tensor["name"]: tensor for tensor in msgspec.json.decode(answer.outputs)}
    assert set(tensors) == {"score", "label"}
    assert tensors["score"]["parameters"]["binary_data_size"] == len(answer.binary) == 4
    assert 0.5 < np.frombuffer(answer.binary, dtype="<f4")[0] <= 1.0


@pytest.fixture(scope="module")
def unsure(make_bundle: Any, tiny_bundle: Any) -> Activated:
    """The tiny model, whose logits are NaN for a text with an unknown word."""
    table = np.frombuffer(tiny_bundle.file("model.onnx.data").read_bytes(), dtype="<f4").copy()
    table[2:4] = np.nan  # [UNK], the second row
    bundle = make_bundle(files={"model.onnx.data": table.tobytes()})
    return activate(bundle.path, load_profile("x86-gateway"), "quick", alone=False)


def test_an_answer_that_is_no_number_is_refused_as_json_and_spoils_no_other(unsure: Activated) -> None:
    label_only = {"outputs": [{"name": "label"}]}
    mixed = {"outputs": [{"name": "score", "parameters": {"binary_data": True}}, {"name": "label"}]}
    unknown = "a zebra"
    good, *bad = run(
        unsure,
        text_job(1, "good"),
        text_job(2, unknown),
        text_job(3, "good", unknown, **label_only),
        text_job(4, unknown, **mixed),
    )
    assert output(good, "label") == ["positive"]
    assert [answer.status for answer in bad] == [422, 422, 422]
    for answer, name in zip(bad, ("label", "label", "label"), strict=True):
        assert answer.error is not None and f"output '{name}'" in answer.error and "binary" in answer.error
    assert "row 1" in str(bad[1].error)


def test_an_answer_that_is_no_number_travels_as_binary(unsure: Activated) -> None:
    (answer,) = run(unsure, text_job(1, "a zebra", "good", parameters={"binary_data_output": True}))
    assert answer.status == 200 and answer.confidence == 0.0
    body, length = encode_response(model_name="m", model_version="1", outputs=answer.outputs, binary=answer.binary)
    outputs = decode_response(body, length).outputs
    assert outputs["label"].array.tolist() == [b"", b"positive"]
    assert np.isnan(outputs["score"].array).tolist() == [True, False]
    assert np.isnan(outputs["probabilities"].array).tolist() == [[True, True], [False, False]]
