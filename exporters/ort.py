"""The only user of onnxruntime in the workshop: sessions, its graph optimizer, its quantizer.

Everything that is heavy to import is imported inside the function that needs it, so that measuring a model's
memory loads no more than the agent would.
"""

from __future__ import annotations

import gc
import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from aios_edge.errors import RuntimeUnavailable
from aios_edge.manifest import SessionSpec
from aios_edge.profile import Threads
from aios_edge.session import native, session_options
from exporters import steps

Tensors = dict[str, NDArray[Any]]

SKIP_FUSION = "SkipLayerNormFusion"
#: fp32 as anyone would run it: the baseline of every speed-up.
DEFAULT_SPEC = SessionSpec(graph_optimization_level="all")


class Session:
    """An inference session on the CPU with the options of a bundle; one inter-op thread, no spinning, and ``threads``
    intra-op ones where the bundle doesn't say otherwise."""

    def __init__(self, model: Path, spec: SessionSpec, *, threads: int = 1, optimized: Path | None = None) -> None:
        options = native(onnxruntime, session_options(spec, Threads(intra_op=threads)))
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        extra = {"disabled_optimizers": list(spec.disabled_optimizers)} if spec.disabled_optimizers else {}
        try:
            self._session = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"], **extra
            )
        except Exception as error:  # onnxruntime's own kinds share no public root
            remedy = "Try another onnxruntime version"
            raise RuntimeUnavailable(
                f"can't load {model.name} ({error})", where="onnxruntime", remedy=remedy
            ) from error
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())

    def run(self, inputs: Tensors) -> NDArray[np.float32]:
        """The first output, as float32."""
        answer: NDArray[np.float32] = self._session.run(None, inputs)[0]
        return answer.astype(np.float32, copy=False)


def version() -> str:
    """onnxruntime's version."""
    return str(onnxruntime.__version__)


def machine_note() -> str:
    """What an answer may depend on beyond the model: runtime and instruction set."""
    return f"onnxruntime {version()} on {platform.machine()}"


def fuse_bert(model: Path, out: Path, *, heads: int, hidden: int) -> None:
    """Write the graph with attention, GELU and layer norm fused.

    SkipLayerNormalization stays apart: its CPU kernel is slower than Add + LayerNormalization. So do the embeddings:
    the fused operator takes quantized tables with a single scale only (:mod:`exporters.tables`). The mask stays a raw
    0/1 mask, so padding may stand anywhere.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.enable_skip_layer_norm = False
    options.enable_bias_skip_layer_norm = False
    options.enable_embed_layer_norm = False
    options.use_raw_attention_mask(True)
    # It keeps several copies of the model, and finds a Reshape that does nothing, at most.
    options.enable_shape_inference = not steps.lies_apart(model)
    with _quiet():
        fused = optimize_model(
            str(model),
            model_type="bert",
            num_heads=heads,
            hidden_size=hidden,
            optimization_options=options,
            opt_level=0,
            use_gpu=False,
        )
    fused.save_model_to_file(str(out), use_external_data_format=steps.is_large(fused.model))
    if steps.lies_apart(model):
        del fused
        gc.collect()  # its fusions and it hold each other, and with them all weights


def activations(model: Any, names: Sequence[str], samples: Sequence[Tensors]) -> Iterator[list[NDArray[Any]]]:
    """The named tensors of an ONNX model (a proto, left as it is) for each sample."""
    outputs = [type(model.graph.output[0])(name=name) for name in names]
    with _loaded(model, outputs) as session:
        for sample in samples:
            yield session.run(list(names), sample)


def answers(model: Any, samples: Sequence[Tensors]) -> NDArray[np.float32]:
    """The first output [N, ...] of an ONNX model (a proto) for samples of one row each."""
    with _loaded(model) as session:
        return np.concatenate([session.run(None, sample)[0] for sample in samples]).astype(np.float32)


@contextmanager
def _loaded(model: Any, outputs: Sequence[Any] = ()) -> Iterator[Any]:
    """A session of a proto with ``outputs`` added; through a file, because a proto may be too large for one message."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with TemporaryDirectory(prefix="aios-edge-") as folder:
        path = Path(folder) / "model.onnx"
        steps.save(model, path, outputs=outputs)
        yield onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def optimize_offline(model: Path, out: Path, *, apart: tuple[str, ...] = ()) -> None:
    """Write the graph as the ``extended`` level leaves it, without SkipLayerNorm fusion and those named in ``apart``.

    ``extended`` and not ``all``: the latter bakes in this machine's memory layouts. Load the result at ``basic``;
    any higher level would fuse SkipLayerNorm after all.
    """
    beside = {"session.optimized_model_external_initializers_file_name": steps.beside(out).name}
    spec = SessionSpec(
        graph_optimization_level="extended",
        disabled_optimizers=(SKIP_FUSION, *apart),
        config_entries=beside if steps.lies_apart(model) else {},
    )
    Session(model, spec, optimized=out)


def quantize_dynamic_s8(model: Path, out: Path, *, operators: tuple[str, ...], reduce_range: bool) -> None:
    """s8 weights per channel, u8 activations with their scale found at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            str(model),
            str(out),
            op_types_to_quantize=list(operators),
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            use_external_data_format=steps.lies_apart(model),
            extra_options={"DefaultTensorType": 1},  # float: type inference stops at fused operators
        )


def to_float16(model: Any) -> Any:
    """An ONNX model with fp16 weights and arithmetic; inputs and outputs keep their types.

    The converter sees the graph alone: it infers shapes, which ends at 2 GB, and needs a table many times over.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    names = [entry.name for entry in (*model.graph.input, *model.graph.output)]
    with _quiet():
        bare = convert_float_to_float16(steps.without_weights(model), keep_io_types=names)
    return steps.with_weights(bare, model)


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's tools advise on the root logger; nobody here can act on it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
