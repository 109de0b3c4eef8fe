"""Answers of the cloud at the gRPC door: another agent's, and those of servers of another make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_clients import call, refused, told
from quick_constants import UNREHEARSED

from device_agent.grpc_door.messages import ModelInferRequest

GRPC = 'grpc_bind = "127.0.0.1:0"'
SLOW = "[emulate]\nslowdown = 1000.0"
HURRY = 200_000  # µs, less than a batch takes here


def request(**integers: int) -> Any:
    asked = ModelInferRequest(model_name="tiny", id="7")
    asked.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a good film")
    for name, value in integers.items():
        asked.parameters[name].int64_param = value
    return asked


def usable(status: Any) -> Any:
    return status["cloud"]["c"]["models"]["tiny"]["usable"]


def test_the_cloud_answers_as_this_device_would(start_agent: Any, small_batches: Path) -> None:
    cloud = start_agent(bundle=small_batches)
    endpoint = f'[[cloud]]\nname = "c"\nurl = "{cloud.url}"\n'
    device = start_agent(endpoint + SLOW, bundle=small_batches, http=GRPC, constants=UNREHEARSED)
    device.until(usable)
    with grpc.insecure_channel(device.grpc) as channel:
        here, there = call(channel, "ModelInfer", request()), call(channel, "ModelInfer", request(timeout=HURRY))
        routes = [answer.parameters["route"].string_param for answer in (here, there)]
        assert routes == ["local", "cloud"] and there.parameters["reason"].string_param == "predicted_late"
        assert (there.id, there.model_name, there.model_version) == ("7", "tiny", "1.0.0")
        assert there.outputs == here.outputs
        private = request(timeout=HURRY)
        private.parameters["privacy"].string_param = "local-only"
        error = refused(channel, "ModelInfer", private)
        assert error.code() is grpc.StatusCode.UNAVAILABLE and told(error)["aios-reason"] == "local_only"


def test_a_cloud_may_answer_in_json_whatever_was_asked(
    start_agent: Any, small_batches: Path, recording_cloud: Any
) -> None:
    device = start_agent(
        f'[[cloud]]\nname = "c"\nurl = "{recording_cloud.url}"\n[policy]\nbreaker_failures = 1000\n{SLOW}',
        bundle=small_batches,
        http=GRPC,
        constants=UNREHEARSED,
    )
    device.until(usable)
    score = {"name": "score", "datatype": "FP32", "shape": [1], "data": [0.25]}
    label = {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["ünsure"]}

    def answers(*outputs: Any) -> None:
        document = {"model_name": "x", "parameters": {"theirs": [1], "gone": None}, "outputs": outputs}
        recording_cloud.answer = lambda: (200, json.dumps(document).encode())

    with grpc.insecure_channel(device.grpc) as channel:
        answers(label, score)
        answer = call(channel, "ModelInfer", request(timeout=HURRY))
        assert answer.outputs[0].contents.bytes_contents[0].decode() == "ünsure"
        assert list(answer.outputs[1].contents.fp32_contents) == [0.25]
        assert answer.parameters["theirs"].string_param == "[1]" and "gone" not in answer.parameters
        raw = request(timeout=HURRY)
        raw.parameters["binary_data_output"].bool_param = True
        answer = call(channel, "ModelInfer", raw)
        assert answer.raw_output_contents[1] == np.array([0.25], dtype="<f4").tobytes()
        for broken in ({**score, "data": ["x"]}, {**score, "datatype": "COMPLEX"}, {"name": "score"}):
            answers(label, broken)
            error = refused(channel, "ModelInfer", request(timeout=HURRY))
            assert error.code() is grpc.StatusCode.UNAVAILABLE and "can't be told over gRPC" in error.details()
        recording_cloud.answer = lambda: (400, b'{"error": "no such thing"}')
        error = refused(channel, "ModelInfer", request(timeout=HURRY))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "the cloud says: no such thing" in error.details()
    assert "Traceback" not in device.log()
    device.process.kill()
