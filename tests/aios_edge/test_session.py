"""One value says what a session is opened with, and both sides open it with exactly that."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest

from aios_edge.manifest import SessionSpec
from aios_edge.profile import Threads
from aios_edge.profile_files import load_profile
from aios_edge.session import differences, excess, session_options


def test_the_bundle_decides_where_it_was_measured_and_the_profile_elsewhere() -> None:
    threads = Threads(intra_op=4, inter_op=2, spinning=True)
    silent = session_options(SessionSpec(), threads)
    assert (silent.intra_op_threads, silent.inter_op_threads, silent.spinning) == (4, 2, True)
    measured = session_options(SessionSpec(intra_op_threads=1, inter_op_threads=1, spinning=False), threads)
    assert (measured.intra_op_threads, measured.inter_op_threads, measured.spinning) == (1, 1, False)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (SessionSpec(), None),
        (SessionSpec(intra_op_threads=1, inter_op_threads=1, spinning=False), None),
        (SessionSpec(intra_op_threads=3), "3 intra-op threads, the profile grants 2"),
        (SessionSpec(inter_op_threads=2), "2 inter-op threads, the profile grants 1"),
        (SessionSpec(spinning=True), "spinning threads, the profile grants none"),
    ],
)
def test_a_bundle_may_take_less_of_the_cpu_than_the_profile_grants_and_never_more(
    spec: SessionSpec, says: str | None
) -> None:
    found = excess(spec, Threads(intra_op=2))
    assert (found is None) == (says is None)
    assert says is None or says in (found or "")


def test_what_differs_from_the_profile_is_said() -> None:
    assert differences(SessionSpec(), Threads(intra_op=2)) is None
    assert differences(SessionSpec(intra_op_threads=2), Threads(intra_op=2)) is None
    said = differences(SessionSpec(intra_op_threads=1, spinning=False), Threads(intra_op=2, spinning=True))
    assert said is not None and "intra-op threads 1 (the profile grants 2), spinning False (the profile gr" in said


@pytest.mark.parametrize(
    "spec",
    [
        SessionSpec(graph_optimization_level="basic", intra_op_threads=1, inter_op_threads=1, spinning=False),
        SessionSpec(disabled_optimizers=("SkipLayerNormFusion",), intra_op_threads=2, spinning=True),
        SessionSpec(config_entries={"session.set_denormal_as_zero": "1", "session.inter_op.allow_spinning": "1"}),
    ],
)
def test_exporter_and_agent_open_the_same_session(
    tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch, spec: SessionSpec
) -> None:
    from device_agent.runtime import Runtime
    from exporters.ort import Session

    seen: list[dict[str, Any]] = []

    def opened(model: str, options: Any, *, disabled_optimizers: Any = None, **others: Any) -> Any:
        entries = (*spec.config_entries, "session.intra_op.allow_spinning", "session.inter_op.allow_spinning")
        plain = {name: getattr(options, name) for name in dir(options) if not callable(getattr(options, name))}
        seen.append(
            {name: value for name, value in plain.items() if not name.startswith("__")}
            | {key: options.get_session_config_entry(key) for key in entries}
            | {"disabled_optimizers": list(disabled_optimizers or ())}
        )
        raise RuntimeError("seen enough")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    model = tiny_bundle.file("model.onnx")
    for open_it in (lambda: Session(model, spec), lambda: Runtime(model, spec, load_profile("x86-gateway"))):
        with pytest.raises(Exception, match="can't load"):
            open_it()
    assert seen[0] == seen[1]
    assert seen[0]["intra_op_num_threads"] == (spec.intra_op_threads or 1)
    assert seen[0]["session.inter_op.allow_spinning"] == str(int(bool(spec.spinning)))
