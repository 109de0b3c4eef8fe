"""What an onnxruntime session is opened with: as the bundle says, and as the profile does where the bundle is silent.

Exporter and agent both open their sessions with :func:`native` of the value that :func:`session_options` gives, so a
model runs on the device as it was verified and measured. Nothing here imports onnxruntime.

The rule for threads and spinning (ADR 0015): what the bundle was measured with on its target is used exactly. It may
take less of the CPU than the profile grants, never more: :func:`excess` says where it does, and the agent refuses that.
"""

from __future__ import annotations

from typing import Any

import msgspec

from aios_edge.manifest import SessionSpec
from aios_edge.profile import Threads

_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_SPINNING = ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning")
_ERRORS_ONLY = 3


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an onnxruntime session is opened with, but model and providers."""

    graph_optimization_level: str
    disabled_optimizers: tuple[str, ...]
    intra_op_threads: int
    inter_op_threads: int
    spinning: bool
    config_entries: dict[str, str]  # without those that spinning stands for


def session_options(spec: SessionSpec, threads: Threads) -> SessionOptions:
    """The bundle's options; threads and spinning are the profile's where the bundle names none. Pure."""
    return SessionOptions(
        graph_optimization_level=spec.graph_optimization_level,
        disabled_optimizers=spec.disabled_optimizers,
        intra_op_threads=threads.intra_op if spec.intra_op_threads is None else spec.intra_op_threads,
        inter_op_threads=threads.inter_op if spec.inter_op_threads is None else spec.inter_op_threads,
        spinning=threads.spinning if spec.spinning is None else spec.spinning,
        config_entries={key: value for key, value in spec.config_entries.items() if key not in _SPINNING},
    )


def pinned(spec: SessionSpec, threads: Threads) -> SessionSpec:
    """The bundle's options with the threads they were measured with. Pure."""
    return msgspec.structs.replace(
        spec, intra_op_threads=threads.intra_op, inter_op_threads=threads.inter_op, spinning=threads.spinning
    )


def native(ort: Any, options: SessionOptions) -> Any:
    """onnxruntime's own ``SessionOptions``; ``ort`` is the module. ``disabled_optimizers`` isn't in it: onnxruntime
    takes that beside it."""
    made = ort.SessionOptions()
    made.log_severity_level = _ERRORS_ONLY
    made.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[options.graph_optimization_level])
    made.intra_op_num_threads = options.intra_op_threads
    made.inter_op_num_threads = options.inter_op_threads
    for key, value in options.config_entries.items():
        made.add_session_config_entry(key, value)
    for key in _SPINNING:
        made.add_session_config_entry(key, "1" if options.spinning else "0")
    return made


def excess(spec: SessionSpec, threads: Threads) -> str | None:
    """Where a bundle asks for more of the CPU than the profile grants, in words; None where it doesn't. Pure."""
    found = [
        f"{asked} {name} threads, the profile grants {granted}"
        for name, asked, granted in (
            ("intra-op", spec.intra_op_threads, threads.intra_op),
            ("inter-op", spec.inter_op_threads, threads.inter_op),
        )
        if asked is not None and asked > granted
    ]
    if spec.spinning and not threads.spinning:
        found.append("spinning threads, the profile grants none")
    return f"was measured with {'; '.join(found)}" if found else None


def differences(spec: SessionSpec, threads: Threads) -> str | None:
    """Where a bundle uses less of the CPU than the profile grants, in words; None where it doesn't. Pure."""
    used = session_options(spec, threads)
    found = [
        f"{name} {mine} (the profile grants {granted})"
        for name, mine, granted in (
            ("intra-op threads", used.intra_op_threads, threads.intra_op),
            ("inter-op threads", used.inter_op_threads, threads.inter_op),
            ("spinning", used.spinning, threads.spinning),
        )
        if mine != granted
    ]
    return f"runs as it was measured: {', '.join(found)}" if found else None
