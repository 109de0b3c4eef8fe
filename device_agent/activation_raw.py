"""Before a raw model goes live: that onnxruntime loads it, and that its tensors can be served. There is no contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from aios_edge.bundle.read import Bundle
from aios_edge.errors import BundleRefused, RuntimeUnavailable
from aios_edge.golden import RawInput
from aios_edge.manifest import TensorSpec
from aios_edge.oip.datatypes import Tensor
from aios_edge.profile import DeviceProfile
from aios_edge.tasks import Prediction
from device_agent.activation import Activated, Record
from device_agent.raw_model import digested, notes, raw_bundle, with_tensors
from device_agent.runtime import open_runtime
from device_agent.values import ActivationCheck, Engines
from device_agent.wire import RawModel


def activate_raw(
    root: Path,
    model: RawModel,
    profile: DeviceProfile,
    *,
    alone: bool,
    state_dir: Path | None = None,
    engines: Engines = "build",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Activated:
    """Load the model in ``root``, the one with ``model.digest`` where that is known.

    The other arguments, and refusals, as of :func:`device_agent.activation.activate`.
    """
    record = Record(on_stage)
    record.bundle = bundle = raw_bundle(root, model.name, model.version)
    try:
        record.stage("digest")
        record.bundle = bundle = _digested(record, bundle)
        if model.digest not in (None, bundle.bundle_id):
            what, remedy = "was written over while it served", "Load it again, and put a new model in a new version"
            raise record.refused(BundleRefused("digest", what, where=str(root), remedy=remedy))
        record.add(ActivationCheck(name="contract", passed=True, skipped=True, detail=notes(bundle)))
        record.stage("load")
        started_at = time.perf_counter()
        record.runtime = runtime = open_runtime(bundle, profile, state_dir=state_dir, engines=engines)
        record.load_s = time.perf_counter() - started_at
        runtime.keep_engine()
        record.add(ActivationCheck(name="load", passed=True, detail=f"loaded on {', '.join(runtime.providers_active)}"))
    except (RuntimeUnavailable, OSError) as error:
        what = error.what if isinstance(error, RuntimeUnavailable) else f"can't be read ({error.strerror})"
        remedy = "Check that the file is whole, its external data beside it, and made for this onnxruntime"
        if isinstance(error, RuntimeUnavailable) and "can't load" not in error.what:
            remedy = error.remedy or remedy
        raise record.refused(BundleRefused(record.current, what, where=str(root), remedy=remedy)) from error
    return Activated(
        runtime=runtime,
        task=NoTask(),
        bundle=with_tensors(bundle, runtime.inputs, runtime.outputs),
        report=record.report(alone),
        raw=True,
        takes_empty=alone,
    )


def _digested(record: Record, bundle: Bundle) -> Bundle:
    try:
        return digested(bundle)
    except BundleRefused as error:
        raise record.refused(error) from error


class NoTask:
    """A model that takes its own tensors only; see :class:`aios_edge.tasks.task.Task`."""

    natural_inputs: tuple[TensorSpec, ...] = ()
    natural_outputs: tuple[TensorSpec, ...] = ()
    natural_names: tuple[str, ...] = ()

    def raw_tensors(self, inputs: Mapping[str, Tensor]) -> tuple[RawInput, ...] | None:
        """None: no input is natural. So nothing below is ever called."""
        return None

    def encode(self, raw: Sequence[RawInput]) -> dict[str, NDArray[Any]]:
        raise NotImplementedError

    def lengths(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
        raise NotImplementedError

    def decode(self, outputs: Mapping[str, NDArray[Any]], *, finite: bool = True) -> tuple[Prediction, ...]:
        raise NotImplementedError

    def prediction_tensors(self, predictions: Sequence[Prediction]) -> dict[str, Tensor]:
        raise NotImplementedError
