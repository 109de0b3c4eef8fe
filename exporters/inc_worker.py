"""The process that runs neural-compressor: ``python -m exporters.inc_worker FOLDER``, started by :mod:`exporters.inc`.

Its ``autotune`` walks through configurations, the fastest first, and stops at the first that keeps the accuracy
promise. Each trial is judged by what would ship: exported, folded and run in onnxruntime, not simulated in torch, which
takes fifty times as long and isn't what the device computes.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from exporters import convert, graph, inc, ort, signature, source, steps
from exporters.quantize import Tuned

#: Newest operators that every supported onnxruntime has kernels for; 20 brings Gelu, which older exports take apart.
OPSET = 20
_GROUPS_KEPT = 2  # of products that may stay fp32


def main(folder: Path) -> None:
    """Tune in ``folder``; leaves the best candidate's ONNX file and what was tried."""
    import torch

    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=inc.Job)
    torch.set_num_threads(job.threads)
    warnings.simplefilter("ignore")
    model = convert.logits_of(source.load_torch(Path(job.model)), job.inputs)
    trials = tune(model, job, folder)
    best = max(range(len(trials)), key=lambda number: trials[number].accuracy)
    if trials[-1].accuracy >= job.accuracy - job.max_drop:
        best = len(trials) - 1
    steps.save(graph.load(folder / trial_name(best)), folder / inc.QUANTIZED)
    for number in range(len(trials)):
        steps.remove(folder / trial_name(number))
    trials[best] = msgspec.structs.replace(trials[best], kept=True)
    (folder / inc.TUNING).write_bytes(msgspec.json.encode(trials))


def tune(model: Any, job: inc.Job, folder: Path) -> list[Tuned]:
    """Run ``autotune``; what each trial was and how it did, in order."""
    import torch
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import TuningConfig, autotune

    calibration = [tensors(sample, job.inputs) for sample in inc.unpack(folder / "calibration.npz")]
    rows = inc.unpack(folder / "rows.npz")
    with np.load(folder / "answers.npz") as answers:
        labels, reference = answers["labels"], answers["reference"]
    named = configurations(groups(model))
    example, shapes = convert.example(model.model, job.inputs), convert.free_shapes(model.model, job.inputs)
    trials: list[Tuned] = []

    def calibrate(prepared: Any) -> None:
        with torch.no_grad():
            for sample in calibration:
                prepared(*sample)

    def evaluate(candidate: Any) -> float:
        if not getattr(candidate, "is_quantized", False):
            return job.accuracy
        out = folder / trial_name(len(trials))
        inc.finish(exported(candidate, example, shapes, job.inputs), levels=job.levels, out=out)
        session = ort.Session(out, inc.AT_TRIAL, threads=job.threads)
        seen = np.asarray([int(session.run(row)[0].argmax()) for row in rows])
        found = Tuned(
            configuration=list(named)[len(trials)],
            accuracy=float(np.mean(seen == labels)),
            agreement=float(np.mean(seen == reference)),
            rows=len(rows),
        )
        trials.append(found)
        return found.accuracy

    graph_module = export(model, example_inputs=example, dynamic_shapes=(shapes,))
    loss = job.max_drop / max(job.accuracy, 1e-9)  # it reckons in shares of the baseline
    wanted = TuningConfig(config_set=list(named.values()), tolerable_loss=loss)
    autotune(graph_module, wanted, eval_fn=evaluate, run_fn=calibrate, example_inputs=example)
    return trials


def configurations(groups: Sequence[tuple[str, tuple[str, ...]]]) -> dict[str, Any]:
    """What is tried, by name: everything in 8 bits by extremes, by histograms, then with the widest groups in fp32."""
    from neural_compressor.torch.quantization import INT8StaticQuantConfig

    found = {
        "all products, ranges from extremes": INT8StaticQuantConfig(act_algo="minmax"),
        "all products, ranges from histograms": INT8StaticQuantConfig(act_algo="kl"),
    }
    for count in range(1, min(_GROUPS_KEPT, len(groups)) + 1):
        config = INT8StaticQuantConfig(act_algo="kl")
        for _, names in groups[:count]:
            for name in names:
                config.set_local(name, INT8StaticQuantConfig(w_dtype="fp32", act_dtype="fp32"))
        kept = ", ".join(group for group, _ in groups[:count])
        found[f"ranges from histograms, {kept} in fp32"] = config
    return found


def groups(model: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Linear layers that recur from layer to layer, by name without its number, the widest input first."""
    import torch

    found: dict[str, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append((name, module))
    recurring = {group: members for group, members in found.items() if "*" in group}
    order = sorted(recurring, key=lambda g: (-recurring[g][0][1].in_features, -recurring[g][0][1].out_features))
    return [(group.split("*.", 1)[1], tuple(name for name, _ in recurring[group])) for group in order]


def exported(quantized: Any, example: tuple[Any, ...], shapes: tuple[Any, ...], inputs: tuple[str, ...]) -> Any:
    """The quantized module as ONNX, QDQ with fp32 weights; only torch's newer exporter knows its operators."""
    import torch

    program = torch.onnx.export(
        quantized,
        example,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=[signature.OUTPUT],
        dynamic_shapes=shapes,
    )
    assert program is not None
    return program.model_proto


def tensors(sample: dict[str, Any], inputs: tuple[str, ...]) -> tuple[Any, ...]:
    """A sample as torch takes it, in the order of the inputs."""
    import torch

    return tuple(torch.from_numpy(sample[name]) for name in inputs)


def trial_name(number: int) -> str:
    """The file of a trial."""
    return f"trial-{number}.onnx"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
