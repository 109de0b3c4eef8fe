"""The process that runs neural-compressor: ``python -m exporters.inc_worker FOLDER``, started by :mod:`exporters.inc`.

Its static backend makes one model as it does unasked. Its ``autotune`` walks through the other configurations, the
fastest first, and stops at the first that keeps the accuracy promise. Each trial is judged by what would ship:
exported, folded and run in onnxruntime, not simulated in torch, which takes fifty times as long and isn't what the
device computes.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """Leaves the model's ONNX file in ``folder``; of a tuning the best, and what was tried."""
    import torch

    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=inc.Job)
    torch.set_num_threads(job.threads)
    warnings.simplefilter("ignore")
    network = Network(job, folder, convert.logits_of(source.load_torch(Path(job.model)), job.inputs))
    if job.promise is None:
        network.save(static(network), folder / inc.QUANTIZED)
        return
    trials = tune(network, job.promise, folder)
    best = inc.best_of(trials, job.promise)
    steps.save(graph.load(folder / trial_name(best)), folder / inc.QUANTIZED)
    for number in range(len(trials)):
        steps.remove(folder / trial_name(number))
    (folder / inc.TUNING).write_bytes(msgspec.json.encode(trials))


@dataclass(frozen=True)
class Network:
    """The fine-tuned network as torch's exporters take it (``module``), and the rows that calibrate it."""

    job: inc.Job
    folder: Path
    module: Any

    @cached_property
    def example(self) -> tuple[Any, ...]:
        """What the tracer runs."""
        return convert.example(self.module.model, self.job.inputs)

    @cached_property
    def shapes(self) -> tuple[Any, ...]:
        """Its free axes."""
        return convert.free_shapes(self.module.model, self.job.inputs)

    def captured(self) -> Any:
        """The graph that the backend quantizes."""
        from neural_compressor.torch.export import export

        return export(self.module, example_inputs=self.example, dynamic_shapes=(self.shapes,))

    def calibrate(self, prepared: Any) -> None:
        """Run the calibration rows through it."""
        import torch

        with torch.no_grad():
            for sample in inc.unpack(self.folder / "calibration.npz"):
                prepared(*tensors(sample, self.job.inputs))

    def save(self, quantized: Any, out: Path) -> None:
        """As the candidate runs it."""
        proto = exported(quantized, self.example, self.shapes, self.job.inputs)
        inc.finish(proto, levels=self.job.levels, out=out)


def static(network: Network) -> Any:
    """What the static backend makes at its own defaults; no row but those that calibrate is seen."""
    from neural_compressor.torch.quantization import get_default_static_config, quantize

    config = get_default_static_config()
    return quantize(network.captured(), config, run_fn=network.calibrate, example_inputs=network.example)


def tune(network: Network, promise: inc.Promise, folder: Path) -> list[Tuned]:
    """Run ``autotune``; what each trial was and how it did, in order."""
    from neural_compressor.torch.quantization import TuningConfig, autotune

    rows, named = inc.rows_in(folder), configurations(groups(network.module))
    trials: list[Tuned] = []

    def evaluate(candidate: Any) -> float:
        if not getattr(candidate, "is_quantized", False):
            return promise.accuracy
        out = folder / trial_name(len(trials))
        network.save(candidate, out)
        session = ort.Session(out, inc.AT_TRIAL, threads=network.job.threads)
        seen = np.asarray([int(session.run(row)[0].argmax()) for row in rows.samples])
        trials.append(rows.judge(list(named)[len(trials)], seen))
        return trials[-1].accuracy

    loss = promise.max_drop / max(promise.accuracy, 1e-9)  # it reckons in shares of the baseline
    wanted = TuningConfig(config_set=list(named.values()), tolerable_loss=loss)
    calibrate, example = network.calibrate, network.example
    autotune(network.captured(), wanted, eval_fn=evaluate, run_fn=calibrate, example_inputs=example)
    return trials


def configurations(groups: Sequence[tuple[str, tuple[str, ...]]]) -> dict[str, Any]:
    """What is tried behind the default, by name: ranges from histograms, then with the widest groups in fp32."""
    from neural_compressor.torch.quantization import INT8StaticQuantConfig

    found = {"all products, ranges from histograms": INT8StaticQuantConfig(act_algo="kl")}
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
