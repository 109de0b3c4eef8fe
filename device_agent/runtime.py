"""onnxruntime on the device: load a model with the bundle's session options on the profile's provider chain, run it.

The only user of onnxruntime in the agent. onnxruntime falls back to the CPU without failing, so the chain is walked
here: only providers that this build has are asked for, what the session really uses is compared afterwards, and the
reason for a difference is kept. (A GPU build lists its providers even on a machine without a GPU.)
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from aios_edge.bundle.read import Bundle
from aios_edge.errors import MissingExtra, RequestError, RuntimeUnavailable
from aios_edge.manifest import Scalar, SessionSpec, TensorSpec
from aios_edge.oip.datatypes import DTYPES
from aios_edge.profile import DeviceProfile, Provider
from aios_edge.session import native, session_options
from device_agent.provider_chain import cache_folder, provider_chain
from device_agent.runtime_values import run_session, unservable
from device_agent.wide_outputs import needs_wide_outputs, with_wide_outputs

CPU = "CPUExecutionProvider"
_ERRORS_ONLY = 3
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"

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
    why they differ (None when they don't; onnxruntime's implicit CPU at the end is no difference). ``options`` is what
    the session was opened with.
    """

    def __init__(
        self,
        model_path: Path,
        session: SessionSpec,
        profile: DeviceProfile,
        providers: tuple[Provider, ...] | None = None,
    ) -> None:
        """``providers``: the profile's with the bundle's options over theirs (default: the profile's).

        Raises :class:`MissingExtra` without onnxruntime, :class:`RuntimeUnavailable` when the model can't be
        loaded or a strict profile doesn't get its first provider.
        """
        ort = _onnxruntime()
        ort.set_default_logger_severity(_ERRORS_ONLY)
        self.options = session_options(session, profile.threads)
        self.providers_requested = tuple(provider.name for provider in profile.providers)
        self._providers = provider_chain(profile.providers, {}, None) if providers is None else providers
        self._model_path = model_path
        self._session, reasons = self._open(ort, profile)
        self.providers_active: tuple[str, ...] = tuple(self._session.get_providers())
        self.provider_reason = self._reason(reasons)
        if profile.strict_providers and self.providers_active[0] != self.providers_requested[0]:
            raise RuntimeUnavailable(
                f"profile '{profile.name}' is strict and {self.providers_requested[0]} is not active: "
                f"{self.provider_reason}",
                where=str(model_path),
                remedy="Install the runtime with that provider (see aios-edge doctor), or set strict_providers = false",
            )
        self.inputs = tuple(_spec(node, model_path) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node, model_path) for node in self._session.get_outputs())
        if (why := unservable(ort, self.inputs, self.outputs)) is not None:
            remedy = "Cast to FP32 at the model's ends, or update onnxruntime"
            raise RuntimeUnavailable(why, where=str(model_path), remedy=remedy)
        self._wide = needs_wide_outputs(self.inputs, self.outputs)
        if self._wide:
            self._session, _ = self._open(ort, profile, with_wide_outputs(model_path.read_bytes(), self.outputs))
        self._ort = ort
        self._datatypes = {spec.name: spec.datatype for spec in self.inputs}
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
            values = run_session(self._ort, self._session, self.outputs, self._datatypes, inputs, wide=self._wide)
        except RequestError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no root
            kind, text = type(error).__name__, str(error)[:300]
            # Shapes that contradict each other or an index beyond a table are the request's fault; onnxruntime calls
            # them InvalidArgument or, inside a node, RuntimeException naming that node.
            if kind == "InvalidArgument" or ("while running" in text and "allocate memory" not in text):
                raise RequestError(f"the model refuses these inputs ({text})") from error
            raise RuntimeUnavailable(f"onnxruntime failed: {kind}: {text}", where=str(self._model_path)) from error
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}

    def _open(self, ort: Any, profile: DeviceProfile, model: bytes | None = None) -> tuple[Any, list[str]]:
        """``model``: other bytes than the file's; its external data lie beside the file."""
        available = ort.get_available_providers()
        reasons = [f"{name} is not in this onnxruntime" for name in self.providers_requested if name not in available]
        chain = [
            (provider.name, {key: _option(value) for key, value in provider.options.items()})
            for provider in self._providers
            if provider.name in available
        ]
        strict = profile.strict_providers and self.providers_requested[0] != CPU
        if strict:
            # Fails loudly where a node would fall to the CPU; must not be combined with listing the CPU.
            chain = [entry for entry in chain if entry[0] != CPU]
            if not chain:
                raise RuntimeUnavailable(
                    f"profile '{profile.name}' is strict and {'; '.join(reasons)}",
                    where=str(self._model_path),
                    remedy="Install the onnxruntime that has it: [gpu], or on a Jetson NVIDIA's wheel",
                )
        elif all(name != CPU for name, _ in chain):
            chain.append((CPU, {}))
        while True:
            options = native(ort, self.options)
            if strict:
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            if model is not None:
                options.add_session_config_entry(_DATA_FOLDER, str(self._model_path.parent))
            try:
                opened = ort.InferenceSession(
                    str(self._model_path) if model is None else model,
                    options,
                    providers=chain,
                    disabled_optimizers=list(self.options.disabled_optimizers) or None,
                    # onnxruntime's own fallback prints to stdout and drops the whole chain at once
                    enable_fallback=0,
                )
            except Exception as error:  # onnxruntime's exceptions share no root
                text = str(error).replace("\n", " ")[:300]
                if strict or len(chain) <= 1:
                    raise RuntimeUnavailable(
                        f"onnxruntime {ort.__version__} can't load the model ({text})",
                        where=str(self._model_path),
                        remedy="Check the bundle with: aios-edge bundle verify; export it again for this device",
                    ) from error
                reasons.append(f"{chain[0][0]} failed ({text})")
                chain = chain[1:]
                continue
            return opened, reasons

    def _reason(self, reasons: list[str]) -> str | None:
        missing = [name for name in self.providers_requested if name not in self.providers_active]
        for name in missing:
            if all(not reason.startswith(name) for reason in reasons):
                reasons.append(f"{name} is in this onnxruntime but didn't start (driver or library missing?)")
        return "; ".join(reasons) if missing else None


def open_runtime(bundle: Bundle, profile: DeviceProfile, *, state_dir: Path | None = None) -> Runtime:
    """A bundle's model as the device runs it: its session options, its providers' options over the profile's, and
    their caches in ``state_dir`` (None: no caches). Raises as :class:`Runtime` does."""
    manifest = bundle.manifest
    runtime = _onnxruntime().__version__
    cache = cache_folder(profile.providers, bundle.bundle_id, state_dir, runtime=runtime)
    chain = provider_chain(profile.providers, manifest.provider_options, cache)
    return Runtime(bundle.file(manifest.model), manifest.session, profile, chain)


def runtime_note() -> str:
    """What an answer's time depends on beyond the model: runtime and instruction set."""
    return f"onnxruntime {_onnxruntime().__version__} on {platform.machine()}"


def check_inputs(specs: tuple[TensorSpec, ...], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Names, datatypes, ranks and fixed dimensions against the model's inputs; raises :class:`RequestError` (400)."""
    names = [spec.name for spec in specs]
    wants = f"The model's inputs are {', '.join(names)}"
    if missing := [name for name in names if name not in inputs]:
        raise RequestError(f"missing input {', '.join(missing)}", remedy=wants)
    if unknown := [name for name in inputs if name not in names]:
        raise RequestError(f"unknown input {', '.join(unknown)[:200]}", remedy=wants)
    for spec in specs:
        array = inputs[spec.name]
        where = f"input {spec.name!r}"
        if array.dtype != DTYPES[spec.datatype]:
            raise RequestError(f"holds {array.dtype}, the model takes {spec.datatype}", where=where)
        if not spec.shape:  # a scalar, or a rank that onnxruntime doesn't tell: it judges by itself
            continue
        fits = all(wanted in (-1, found) for wanted, found in zip(spec.shape, array.shape, strict=False))
        if array.ndim != len(spec.shape) or not fits:
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


def _option(value: Scalar) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


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
