"""torch to ONNX: one adapter for every model, then the fusion that BERT-class encoders need to be fast.

The TorchScript exporter is used on purpose: the graph of torch's newer one leaves GELU in pieces, and onnxruntime
then fuses no attention at all without saying so. Names, free axes and opset are optimum's where it knows the model type
(:mod:`exporters.signature`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import msgspec

from aios_edge.errors import PromiseBroken
from exporters import first_token, graph, ort, prune, steps
from exporters.signature import Signature, signature_of

#: As torch wrote it: what anyone would run, and so the baseline of every comparison.
RAW = "raw.onnx"
#: The same in standard operators, without what the answer doesn't need.
STANDARD = "standard.onnx"
FUSED = "fused.onnx"
GRAPHS = (RAW, STANDARD, FUSED)
#: Encoders whose attention onnxruntime's BERT optimizer knows; others run as converted.
FUSED_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


class Converted(msgspec.Struct, frozen=True, kw_only=True):
    """What came out; ``converted.json`` beside the graphs. ``operators`` of the best of them, ``signature`` by whom."""

    inputs: tuple[str, ...]
    layers: int
    fused: bool
    gelu: bool
    operators: dict[str, int]
    signature: str = "torch"


def convert(model: Any, inputs: tuple[str, ...], work: Path) -> Converted:
    """Write ``raw.onnx``, ``standard.onnx`` and, for types that fuse, ``fused.onnx``.

    Raises :class:`PromiseBroken` (``conversion`` or ``fusion``).
    """
    config = model.config
    signature = signature_of(config, inputs)
    _export(model, signature, work / RAW)
    fused = config.model_type in FUSED_TYPES
    gelu = "gelu" in str(getattr(config, "hidden_act", ""))
    best = work / STANDARD
    first_token.rewrite(work / RAW, best)
    if fused:
        best = work / FUSED
        ort.fuse_bert(work / RAW, best, heads=prune.heads_kept(config), hidden=config.hidden_size)
        first_token.rewrite(best, best)  # after the fusion, which knows only whole layers
        graph.check_fusion(graph.outline(best), layers=config.num_hidden_layers, where="convert", gelu=gelu)
    return Converted(
        inputs=inputs,
        layers=int(getattr(config, "num_hidden_layers", 0)),
        fused=fused,
        gelu=gelu,
        operators=dict(graph.operator_counts(best)),
        signature=signature.origin,
    )


def logits_of(model: Any, inputs: tuple[str, ...]) -> Any:
    """A module that takes the inputs by position and returns the logits alone, as torch's exporters want it."""
    import torch

    class Logits(torch.nn.Module):
        """Tensors in, logits out."""

        def __init__(self, model: Any) -> None:  # not from around: a class is freed late, and would keep it
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            return self.model(**dict(zip(inputs, tensors, strict=True))).logits

    return Logits(model).eval()


def example(model: Any, inputs: tuple[str, ...]) -> tuple[Any, ...]:
    """Tensors of two texts of 16 tokens for the tracer."""
    import torch

    ids = torch.arange(1, 33).reshape(2, 16) % max(2, int(model.config.vocab_size))
    filled = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return tuple(filled[name] for name in inputs)


def free_shapes(model: Any, inputs: tuple[str, ...]) -> tuple[Any, ...]:
    """The same axes for torch's newer exporter, which wants to know how long a text may be."""
    import torch

    longest = int(getattr(model.config, "max_position_embeddings", 512))
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=longest)}
    return tuple(free for _ in inputs)


def _export(model: Any, signature: Signature, path: Path) -> None:
    import torch

    inputs = tuple(signature.inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracer advice on shapes, which parity checks below
            torch.onnx.export(
                logits_of(model, inputs),
                example(model, inputs),
                str(path),
                dynamo=False,
                opset_version=signature.opset,
                input_names=list(inputs),
                output_names=list(signature.outputs),
                dynamic_axes=signature.axes,
            )
    except Exception as error:  # the exporter raises many kinds
        what = f"torch could not export {type(model).__name__} ({error})"
        remedy = "Use a BERT-class encoder"
        raise PromiseBroken("conversion", what, where="convert", remedy=remedy) from error
    steps.settle(path)


def save_converted(converted: Converted, work: Path) -> None:
    """Write ``converted.json``."""
    (work / "converted.json").write_bytes(msgspec.json.encode(converted))


def load_converted(folder: Path) -> Converted:
    """Read ``converted.json``."""
    return msgspec.json.decode((folder / "converted.json").read_bytes(), type=Converted)
