"""Who answers while a bundle is on trial, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent.device_state import DeviceState
from device_agent.learning import Learning
from device_agent.rehearsal import rehearsal_batch
from device_agent.track_record import TrackRecord
from device_agent.trial import TrialRules
from device_agent.trial_run import TrialRun
from device_agent.values import InferenceRequest
from device_agent.wire import Done, DoneItem
from device_agent.worker_pool import BatchResult

REQUESTS = rehearsal_batch("tiny", (4, 4), pair=False, now=0.0)


def host(name: str) -> Any:
    """As much of a model host as a trial looks at."""
    learning = Learning()
    manifest = SimpleNamespace(version=name, labels=("a", "b"))
    instance = SimpleNamespace(ready=True, tells_classes=False)
    instance.tell_classes = lambda told: setattr(instance, "tells_classes", told)
    return SimpleNamespace(
        name=name,
        record=TrackRecord(learning),
        service=learning.service,
        queued=0,
        detail="away",
        submit=None,
        instance=instance,
        bundle=SimpleNamespace(manifest=manifest),
    )


def result(requests: Any, status: int = 200, label: int = 0, busy_s: float = 0.001) -> BatchResult:
    items = tuple(DoneItem(request_id=one.request_id, status=status, classes=(label,)) for one in requests)
    done = Done(batch_id=1, generation=1, busy_s=busy_s, rss_bytes=0, items=items)
    return BatchResult(done=done, payload=memoryview(b""))


steps = st.one_of(
    st.tuples(st.just("current answers"), st.sampled_from((200, 500)), st.integers(0, 1)),
    st.tuples(st.just("successor answers"), st.sampled_from((200, 200, 500)), st.integers(0, 1)),
    st.tuples(st.just("successor is away"), st.booleans()),
    st.tuples(st.just("somebody waits"), st.integers(0, 1)),
    st.tuples(st.just("it is hot"), st.booleans()),
    st.tuples(st.just("time passes"), st.floats(0.0, 30.0)),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(steps, max_size=60),
    st.builds(
        TrialRules,
        shadow_share=st.sampled_from((0.0, 0.5, 1.0)),
        canary_share=st.sampled_from((0.1, 1.0)),
        requests=st.integers(1, 40),
        max_disagreement=st.sampled_from((0.0, 0.05, 1.0)),
    ),
    st.floats(0.0, 0.999),
)
def test_only_a_canary_that_is_there_answers_and_the_end_is_told_once(
    happened: list[tuple[Any, ...]], rules: TrialRules, luck: float
) -> None:
    current, successor, now, hot = host("1"), host("2"), [0.0], [False]
    copied: list[InferenceRequest] = []
    told: list[str | None] = []
    label = [0]

    def submit(copy: InferenceRequest, on_answer: Any) -> Any:
        assert copy.local_only and copy.deadline_at is None
        copied.append(copy)
        on_answer(SimpleNamespace(route="local"))
        if len(copied) % len(REQUESTS) == 0:
            successor.record.answered(REQUESTS, result(REQUESTS, label=label[0]), 0.001)
        return SimpleNamespace()

    successor.submit = submit

    around: Any = SimpleNamespace(
        clock=lambda: now[0],
        device=lambda: (DeviceState(throttled=hot[0]), None),
        strain=lambda: None,
        policy=SimpleNamespace(batch_timeout_s=1.0),
    )

    async def main() -> None:
        def on_end(reason: str | None) -> None:
            told.append(reason)
            assert reason is not None or (trial.phase == "canary" and successor.instance.ready)

        trial = TrialRun(current, successor, rules, around, on_end, draw=lambda: luck)
        phases = [trial.phase]
        for what, *values in happened:
            before = len(copied)
            if what == "current answers":
                label[0] = values[1]
                may = phases[-1] == "shadow" and not told and values[0] == 200 and luck < rules.shadow_share
                current.record.answered(REQUESTS, result(REQUESTS, values[0]), 0.001)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                if not may or current.queued or hot[0] or not successor.instance.ready:
                    assert len(copied) == before
                else:
                    assert len(copied) == before + len(REQUESTS)
            elif what == "successor answers" and trial.phase == "canary" and not trial.ended:
                successor.record.answered(REQUESTS, result(REQUESTS, values[0], values[1]), 0.001)
            elif what == "successor is away":
                successor.instance.ready = not values[0]
            elif what == "somebody waits":
                current.queued = values[0]
            elif what == "it is hot":
                hot[0] = values[0]
            elif what == "time passes":
                now[0] += values[0]
            phases.append(trial.phase)
            who = trial.takes()
            canary = trial.phase == "canary" and not trial.ended and successor.instance.ready
            assert who is (successor if canary and luck < rules.canary_share else current)
            assert trial.ended == bool(told) and len(told) <= 1
            assert trial.figures.disagreed <= trial.figures.compared
        assert "shadow" not in phases[phases.index("canary") :] if "canary" in phases else True
        trial.stop()
        assert trial.takes() is current and not successor.instance.tells_classes

    asyncio.run(main())


def test_a_clock_that_is_behind_the_loops_does_not_keep_a_trial_from_its_end(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str | None] = []
    around: Any = SimpleNamespace(clock=lambda: 0.0)

    async def main() -> None:
        trial = TrialRun(host("1"), host("2"), TrialRules(shadow_share=1.0, lasts_s=0.001), around, told.append)
        while not told:  # noqa: ASYNC110 - a condition in the code under test
            await asyncio.sleep(0.001)
        trial.stop()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert told == [None]
    assert "nobody asked" in caplog.text  # and it took over all the same
