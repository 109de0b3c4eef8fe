"""onnxruntime on the device: load a model with the bundle's session options on the profile's provider chain, run it.

The only importer of onnxruntime in the agent. How the chain is walked: :mod:`device_agent.provider_walk`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from aios_edge.bundle.read import Bundle
from aios_edge.errors import MissingExtra, RequestError, RuntimeUnavailable
from aios_edge.manifest import SessionSpec, TensorSpec
from aios_edge.oip.datatypes import DTYPES
from aios_edge.profile import DeviceProfile, Provider
from aios_edge.session import session_options
from aios_edge.telemetry import ProviderStep
from device_agent.engine_cache import keep
from device_agent.engine_plan import EnginePlan, plan_engine, settle
from device_agent.provider_chain import provider_chain
from device_agent.provider_walk import open_session, start_fault, step_down
from device_agent.runtime_values import run_session, unservable
from device_agent.values import Engines
from device_agent.wide_outputs import needs_wide_outputs, with_wide_outputs

_ERRORS_ONLY, _NOTHING = 3, 4
_EVERYWHERE = ("CPUExecutionProvider", "AzureExecutionProvider")  # the latter asks a service: nothing of this machine

#: onnxruntime's type -> the protocol's datatype.
_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class Runtime:
    """A loaded model.

    ``providers_requested`` is the profile's chain, ``providers_active`` what the session uses, ``provider_reason``
    why they differ (None when they don't; onnxruntime's implicit CPU at the end is no difference), ``steps`` all of it,
    provider by provider. ``options`` is what the session was opened with, ``engine`` TensorRT's.
    """

    def __init__(
        self,
        model_path: Path,
        session: SessionSpec,
        profile: DeviceProfile,
        plan: EnginePlan | None = None,
    ) -> None:
        """``plan``: the profile's chain with the bundle's options over it (default: the profile's alone).

        Raises :class:`MissingExtra` without onnxruntime, :class:`RuntimeUnavailable` when the model can't be
        loaded or a strict profile doesn't get its first provider.
        """
        ort = _onnxruntime()
        ort.set_default_logger_severity(_ERRORS_ONLY)
        self.options = session_options(session, profile.threads)
        self.providers_requested = tuple(provider.name for provider in profile.providers)
        self._model_path = model_path
        plan = plan or EnginePlan(chain=provider_chain(profile.providers, {}, None))
        strict = profile.name if profile.strict_providers else None
        began = time.monotonic()
        opened = open_session(ort, model_path, self.options, plan.chain, strict=strict, left_out=plan.left_out)
        took_s = time.monotonic() - began
        self._session = opened.session
        self.providers_active: tuple[str, ...] = tuple(self._session.get_providers())
        self.inputs = tuple(_spec(node, model_path) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node, model_path) for node in self._session.get_outputs())
        self._engine_key = plan.builds
        self.steps, self.engine = settle(plan, opened.steps, self.inputs, took_s)
        self.provider_reason = step_down(self.steps)
        if (why := unservable(ort, self.inputs, self.outputs)) is not None:
            remedy = "Cast to FP32 at the model's ends, or update onnxruntime"
            raise RuntimeUnavailable(why, where=str(model_path), remedy=remedy)
        self._wide = needs_wide_outputs(self.inputs, self.outputs)
        if self._wide:
            content = with_wide_outputs(model_path.read_bytes(), self.outputs)
            opened = open_session(
                ort, model_path, self.options, plan.chain, strict=strict, left_out=plan.left_out, content=content
            )
            self._session = opened.session
        self._ort = ort
        self.datatypes = {spec.name: spec.datatype for spec in self.inputs}
        self.declared_empty = frozenset(spec.name for spec in self.inputs if 0 in spec.shape)
        self.output_datatypes = {spec.name: spec.datatype for spec in self.outputs}
        self._plain = all(
            datatype not in ("BYTES", "BF16")
            for datatype in (*self.datatypes.values(), *self.output_datatypes.values())
        )
        #: Input -> the names of its free dimensions; equal names mean equal sizes, and onnxruntime doesn't ask for it.
        self._free = {
            node.name: tuple(dim if isinstance(dim, str) else None for dim in node.shape)
            for node in self._session.get_inputs()
        }

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the model once. BYTES are object arrays of ``bytes`` and BF16 bit patterns in uint16, in and out.

        Raises :class:`RequestError`: 400 for missing or unknown names, datatypes and shapes that don't fit, or values
        the model refuses; :class:`RuntimeUnavailable` when the runtime itself fails.
        """
        check_inputs(self.inputs, inputs)
        check_sizes(self._free, inputs)
        try:
            if self._plain:
                values = self._session.run(None, inputs)
            else:
                values = run_session(self._ort, self._session, self.outputs, self.datatypes, inputs, wide=self._wide)
        except RequestError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no root
            kind, text = type(error).__name__, str(error)[:300]
            # Shapes that contradict each other or an index beyond a table are the request's fault; onnxruntime calls
            # them InvalidArgument or, inside a node, RuntimeException naming that node.
            if kind == "InvalidArgument" or ("while running" in text and "allocate memory" not in text):
                raise RequestError(f"the model refuses these inputs ({text})") from error
            raise RuntimeUnavailable(f"onnxruntime failed: {kind}: {text}", where=str(self._model_path)) from error
        return dict(zip(self.output_datatypes, values, strict=True))

    def keep_engine(self) -> None:
        """Whoever opens the model next may use the engine that was built now: it has answered."""
        engine = self.engine
        if self._engine_key and engine and engine.state == "built" and engine.folder and engine.took_s is not None:
            keep(Path(engine.folder), self._engine_key, engine.took_s)


def open_runtime(
    bundle: Bundle,
    profile: DeviceProfile,
    *,
    state_dir: Path | None = None,
    engines: Engines = "build",
    root: Path = Path("/"),
) -> Runtime:
    """A bundle's model as the device runs it: its session options, its providers' options over the profile's, and its
    engine in ``state_dir`` (None: engines aren't kept). Raises as :class:`Runtime` does.

    ``root``: where TensorRT and the driver are looked for."""
    manifest = bundle.manifest
    plan = plan_engine(_onnxruntime(), bundle, profile, state_dir=state_dir, engines=engines, root=root)
    return Runtime(bundle.file(manifest.model), manifest.session, profile, plan)


def accelerators() -> tuple[ProviderStep, ...]:
    """What the installed onnxruntime has beyond the CPU, and whether it starts on this machine, whatever the model.

    Raises :class:`MissingExtra` without onnxruntime.
    """
    ort = _onnxruntime()
    ort.set_default_logger_severity(_NOTHING)
    names = (name for name in ort.get_available_providers() if name not in _EVERYWHERE)
    faults = {name: start_fault(ort, Provider(name=name)) for name in names}
    return tuple(ProviderStep(name=name, active=fault is None, reason=fault) for name, fault in faults.items())


def runtime_note() -> str:
    """What an answer's time depends on beyond the model: runtime and instruction set."""
    return f"onnxruntime {_onnxruntime().__version__} on {platform.machine()}"


def check_inputs(specs: tuple[TensorSpec, ...], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Names, datatypes, ranks and fixed dimensions against the model's inputs; raises :class:`RequestError` (400)."""
    names = [spec.name for spec in specs]
    if inputs.keys() != set(names):
        wants = f"The model's inputs are {', '.join(names)}"
        if missing := [name for name in names if name not in inputs]:
            raise RequestError(f"missing input {', '.join(missing)}", remedy=wants)
        unknown = [name for name in inputs if name not in names]
        raise RequestError(f"unknown input {', '.join(unknown)[:200]}", remedy=wants)
    for spec in specs:
        array = inputs[spec.name]
        if array.dtype != DTYPES[spec.datatype]:
            where = f"input {spec.name!r}"
            raise RequestError(f"holds {array.dtype}, the model takes {spec.datatype}", where=where)
        if not spec.shape:  # a scalar, or a rank that onnxruntime doesn't tell: it judges by itself
            continue
        fits = len(array.shape) == len(spec.shape)
        for wanted, found in zip(spec.shape, array.shape, strict=False):
            fits = fits and wanted in (-1, found)
        if not fits:
            where = f"input {spec.name!r}"
            raise RequestError(f"has shape {list(array.shape)}, the model takes {list(spec.shape)}", where=where)


def check_sizes(free: Mapping[str, tuple[str | None, ...]], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Free dimensions of one name have one size; raises :class:`RequestError` (400).

    onnxruntime broadcasts what doesn't fit where it can, and answers a question that nobody asked.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in inputs.items():
        for dim, size in zip(free[name], array.shape, strict=False):  # ranks were checked, where they are known
            if dim is not None and (seen := sizes.setdefault(dim, (size, name)))[0] != size:
                what = f"has {size} in the dimension '{dim}', where {seen[1]!r} has {seen[0]}"
                raise RequestError(what, where=f"input {name!r}", remedy="Give tensors of matching shapes")


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        missing = MissingExtra("onnxruntime", "cpu", why="Running a model")
        missing.remedy = (
            f"{missing.remedy}; with an NVIDIA GPU 'aios-edge[gpu]'; on a Jetson NVIDIA's own onnxruntime-gpu wheel "
            "for its JetPack"
        )
        raise missing from error
    return onnxruntime


def _spec(node: Any, model_path: Path) -> TensorSpec:
    if (datatype := _DATATYPES.get(node.type)) is None:
        raise RuntimeUnavailable(
            f"tensor {node.name!r} is {node.type}, which can't be served",
            where=str(model_path),
            remedy=f"Export the model with one of: {', '.join(_DATATYPES.values())}",
        )
    # A dimension is a number, the name of a free one, or None.
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    return TensorSpec(name=node.name, datatype=datatype, shape=shape)
