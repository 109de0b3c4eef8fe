"""What the supervisor says of a model, without loading it, is what the worker takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aios_edge.manifest import TextInput
from aios_edge.tasks import task_for
from device_agent.metadata import natural_tensors
from device_agent.rehearsal import BATCHES, rehearsal_batch


@pytest.mark.parametrize("pair", [False, True])
def test_natural_inputs_are_those_of_the_task(pair: bool, tiny_bundle: Any) -> None:
    text = TextInput(tokenizer="tokenizer.json", max_length=64, pad_id=0, pair=pair)
    manifest = msgspec.structs.replace(tiny_bundle.manifest, preprocess=text)
    told, answered = natural_tensors(manifest)
    task = task_for(manifest, Path(tiny_bundle.path))
    assert tuple((t.name, t.datatype, t.shape) for t in told) == tuple(
        (t.name, t.datatype, t.shape) for t in task.natural_inputs
    )
    assert [t.name for t in answered] == [t.name for t in task.natural_outputs]
    for words in BATCHES:
        for request in rehearsal_batch("tiny", words, pair=pair, now=0.0):
            assert [i["name"] for i in json.loads(request.body)["inputs"]] == [t.name for t in told]
