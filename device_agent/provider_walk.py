"""A model opened on a chain of execution providers, and what became of each of them.

onnxruntime goes down a chain without a word: a provider whose libraries are missing is left out or makes the session
fail as a whole, and what it can't run falls to the next. So the chain is walked here: only providers of this build are
asked for; when the session fails it is found out who doesn't start at all; and which nodes run where is asked of the
session, where onnxruntime can tell (``get_provider_graph_assignment_info``, which 1.23 doesn't have).

``ort`` is the module onnxruntime, which only :mod:`device_agent.runtime` imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios_edge.errors import RuntimeUnavailable
from aios_edge.profile import Provider
from aios_edge.provider_options import TENSORRT
from aios_edge.session import SessionOptions, native
from aios_edge.telemetry import ProviderStep
from device_agent.gpu import NoGpu, find_gpu
from device_agent.tiny_model import STRING, identity

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PLACEMENT = "session.record_ep_graph_assignment_info"
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_NO_CPU_FALLBACK = "session.disable_cpu_ep_fallback"
#: The provider's own library, beside onnxruntime's: the loader says what it misses.
_LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
_NVIDIA = frozenset(_LIBRARIES)
_LONGEST = 300  # characters of onnxruntime's words


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A session, and what became of each provider; the CPU comes last where nobody asked for it and it is there."""

    session: Any
    steps: tuple[ProviderStep, ...]


def open_session(
    ort: Any,
    model: Path,
    options: SessionOptions,
    chain: tuple[Provider, ...],
    *,
    strict: str | None = None,
    left_out: Mapping[str, str] | None = None,
    content: bytes | None = None,
) -> Opened:
    """Open a model on as much of the chain as there is.

    ``strict``: the name of a profile that takes its first provider or nothing. ``left_out``: providers that aren't
    asked for, and why. ``content``: other bytes than the file's; its external data lie beside the file. Raises
    :class:`RuntimeUnavailable` when nothing opens it, or not what a strict profile wants.
    """
    first, available = chain[0].name, ort.get_available_providers()
    reasons = dict(left_out or {})
    for provider in chain:
        if provider.name not in available:
            reasons.setdefault(provider.name, not_in(ort))
    holds = strict is not None and first != CPU
    _preload(ort, chain)
    while True:
        asked = [entry for entry in chain if entry.name not in reasons and not (holds and entry.name == CPU)]
        if holds and first in reasons:
            raise _refused(strict, first, reasons[first], model)
        try:
            session = _session(ort, model, options, asked, holds, content)
            break
        except Exception as error:  # onnxruntime's exceptions share no root
            text = _words(error)
            accelerated = [provider for provider in asked if provider.name != CPU]
            if not accelerated or (holds and asked[0] is accelerated[-1]):
                if accelerated and (why := start_fault(ort, accelerated[0])) is not None:
                    raise _refused(strict, first, why, model) from error
                raise RuntimeUnavailable(
                    f"onnxruntime {ort.__version__} can't load the model ({text})",
                    where=str(model),
                    remedy="Check the bundle with: aios-edge bundle verify; export it again for this device",
                ) from error
            faults = {provider.name: start_fault(ort, provider) for provider in accelerated}
            dead = {name: why for name, why in faults.items() if why is not None}
            # Where all of them start, it is the model that the first one doesn't take.
            reasons.update(dead or {accelerated[0].name: f"doesn't take this model ({text})"})
    active = session.get_providers()
    for provider in asked:
        if provider.name not in active:
            reasons[provider.name] = start_fault(ort, provider) or "didn't start, and onnxruntime doesn't say why"
    if holds and active[0] != first:
        raise _refused(strict, first, reasons.get(first, "is not active"), model)
    steps = _steps(session, chain, active, reasons)
    if holds and steps[0].nodes == 0:
        raise _refused(strict, first, "takes no node of this model", model)
    return Opened(session=session, steps=steps)


def step_down(steps: tuple[ProviderStep, ...]) -> str | None:
    """Why what is active isn't what was asked for, in one line; None when it is."""
    return "; ".join(f"{step.name} {step.reason}" for step in steps if not step.active) or None


def start_fault(ort: Any, provider: Provider) -> str | None:
    """Why a provider doesn't start on this machine, whatever the model; None where it does."""
    _preload(ort, (provider,))
    options = ort.SessionOptions()
    options.log_severity_level = 4  # it is about to fail, and the reason is told below
    entry = (provider.name, native_options(provider))
    try:
        # Of strings, so that nothing is built for it: every provider starts, the CPU gets the node.
        session = ort.InferenceSession(identity(STRING), options, providers=[entry], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no root
        return f"doesn't start: {_cause(ort, provider) or _words(error)}"
    if provider.name in session.get_providers():
        return None
    return f"doesn't start: {_cause(ort, provider) or 'onnxruntime left it out without a word'}"


def native_options(provider: Provider) -> dict[str, str]:
    """Its options as onnxruntime takes them."""
    return {key: str(int(value)) if isinstance(value, bool) else str(value) for key, value in provider.options.items()}


def not_in(ort: Any) -> str:
    """The reason of a provider that this build doesn't have."""
    has = ", ".join(short(name) for name in ort.get_available_providers())
    return f"is not in this onnxruntime {ort.__version__} (it has {has})"


def short(name: str) -> str:
    """A provider's name without what all of them end with."""
    return name.removesuffix("ExecutionProvider")


def _preload(ort: Any, chain: Sequence[Provider]) -> None:
    """CUDA's libraries from NVIDIA's Python packages, where the loader doesn't look; newer onnxruntimes know how."""
    preload = getattr(ort, "preload_dlls", None)
    if preload is None or all(provider.name not in _NVIDIA for provider in chain):
        return
    # It prints what it doesn't find; what is missed is told by who doesn't start.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        preload()


def _session(
    ort: Any, model: Path, options: SessionOptions, chain: list[Provider], strict: bool, content: bytes | None
) -> Any:
    made = native(ort, options)
    made.add_session_config_entry(_PLACEMENT, "1")  # an older onnxruntime doesn't know it and minds nothing
    providers = [(provider.name, native_options(provider)) for provider in chain]
    if strict:
        # Fails loudly where a node would fall to the CPU; must not be combined with listing the CPU.
        made.add_session_config_entry(_NO_CPU_FALLBACK, "1")
    elif all(name != CPU for name, _ in providers):
        providers.append((CPU, {}))
    if content is not None:
        made.add_session_config_entry(_DATA_FOLDER, str(model.parent))
    return ort.InferenceSession(
        str(model) if content is None else content,
        made,
        providers=providers,
        disabled_optimizers=list(options.disabled_optimizers) or None,
        # onnxruntime's own fallback prints to stdout and drops the whole chain at once
        enable_fallback=0,
    )


def _steps(
    session: Any, chain: tuple[Provider, ...], active: list[str], reasons: Mapping[str, str]
) -> tuple[ProviderStep, ...]:
    placed, untold = placement(session)
    implied = tuple(Provider(name=name) for name in active if all(provider.name != name for provider in chain))
    return tuple(
        ProviderStep(
            name=provider.name,
            active=provider.name in active,
            reason=None if provider.name in active else reasons.get(provider.name),
            options=native_options(provider),
            nodes=None if untold or provider.name not in active else placed[provider.name].total(),
            nodes_reason=untold if provider.name in active else "it is not active",
            operators=dict(placed[provider.name].most_common()) if provider.name in active else {},
        )
        for provider in (*chain, *implied)
    )


def placement(session: Any) -> tuple[dict[str, Counter[str]], str | None]:
    """Provider -> its nodes by operator, as the graph was divided when the session was made; or why that isn't known.

    Operators outside ONNX's own domain have theirs in front (``com.microsoft:Attention``).
    """
    placed: dict[str, Counter[str]] = {name: Counter() for name in session.get_providers()}
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return placed, "this onnxruntime doesn't tell which node runs where"
    try:
        for part in ask():
            counts = placed.setdefault(part.ep_name, Counter())
            for node in part.get_nodes():
                counts[f"{node.domain}:{node.op_type}" if node.domain else node.op_type] += 1
    except Exception as error:  # onnxruntime's exceptions share no root
        return placed, f"onnxruntime doesn't tell which node runs where ({_words(error)})"
    return placed, None


def _cause(ort: Any, provider: Provider) -> str | None:
    """What stands in its way, by the loader's and the driver's words: onnxruntime's own are on stderr, if anywhere."""
    if provider.name not in _NVIDIA:
        return None
    found = []
    library = Path(getattr(ort, "__file__", "") or "").parent / "capi" / _LIBRARIES[provider.name]
    if library.is_file():
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            found.append(str(error))
    gpu = find_gpu(int(provider.options.get("device_id", 0)))
    if isinstance(gpu, NoGpu):
        found.append(gpu.reason)
    return "; ".join(found) or None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST]


def _refused(profile: str | None, first: str, reason: str, model: Path) -> RuntimeUnavailable:
    return RuntimeUnavailable(
        f"profile '{profile}' is strict and {first} {reason}",
        where=str(model),
        remedy="Install what has it (the onnxruntime of [gpu], or on a Jetson NVIDIA's wheel; see aios-edge doctor), "
        "or set strict_providers = false",
    )
