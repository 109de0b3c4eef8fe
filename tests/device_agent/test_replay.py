"""A trace of a real agent, and what other policies would have made of it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.errors import SettingsError
from device_agent.device_state import STRAINS, DeviceState
from device_agent.policy_in_force import policy_digest
from device_agent.replay import replay
from device_agent.router import Here, Question, There
from device_agent.scheduler import Forecast
from device_agent.settings import Policy
from device_agent.trace import Decided, Opinion, Traced, decided, traced
from device_agent.trace_reader import TraceLines, load_policy
from device_agent.trace_writer import TraceWriter
from device_agent.values import Cloud

SECRET = "a film nobody may read"
AT = 1000.0
LOCAL = Decided(route="local", reason="idle")


def line(**changes: Any) -> Traced:
    fields = {
        "model": "m",
        "at": AT,
        "forecast": Forecast(expected_at=AT + 0.01, safe_at=AT + 0.02, idle=True),
        "there": There(endpoint="c", expected_s=0.03, safe_s=0.04),
        "decided": Decided(route="local", reason="no_deadline"),
        "outcome": Decided(route="local", reason="no_deadline"),
        "status": 200,
        "latency_s": 0.01,
    }
    return Traced(**{**fields, **changes})


def replayed(*lines: Traced, **policy: Any) -> dict[str, int]:
    found = replay(lines, Policy(**policy))
    return {f"{each.route} {each.reason}": each.count for each in found.replayed}


def test_each_part_of_a_policy_moves_what_it_is_about() -> None:
    assert replayed(line()) == {"local no_deadline": 1}
    assert replayed(line(), default_deadline_s=1.0) == {"local idle": 1}
    assert replayed(line(queued=5), queue_limit=5) == {"cloud queue_full": 1}
    assert replayed(line(queued=5, crowded=True), queue_limit=9) == {"cloud queue_full": 1}, "too many for its tenant"
    spent = line(queued=5, there=None, dear=There(endpoint="c", expected_s=0.03, safe_s=0.04))
    assert replayed(spent, queue_limit=5) == {"shed budget": 1}
    hot = line(device=DeviceState(temperature_c=90.0), sampled_at=AT)
    assert replayed(hot, max_temperature_c=80.0) == {"cloud hot": 1}
    assert replayed(hot, max_temperature_c=95.0) == {"local no_deadline": 1}
    unsure = line(opinion=Opinion(at=AT + 0.01, confidence=0.6, there=There(endpoint="c", expected_s=0, safe_s=0.1)))
    assert replayed(unsure, min_confidence=0.7) == {"cloud low_confidence": 1}
    assert replayed(unsure, min_confidence=0.5) == {"local no_deadline": 1}
    assert replayed(msgspec.structs.replace(unsure, local_only=True), min_confidence=0.7) == {"local local_only": 1}
    assert replay([line(), unsure], Policy(min_confidence=0.7)).unsure_unknown == 1


def test_lines_are_replayed_as_they_came_and_a_start_knows_nothing_of_the_one_before(tmp_path: Path) -> None:
    later = line(at=AT + 1.0, sampled_at=AT + 1.0, device=DeviceState(temperature_c=50.0))
    first = line(sampled_at=AT, device=DeviceState(temperature_c=90.0))
    assert replayed(later, first, max_temperature_c=80.0) == {"cloud hot": 2}, "still within the hold"
    path = tmp_path / "trace"

    async def write(*lines: Traced) -> None:
        writer = TraceWriter(path, 1_000_000)
        for each in lines:
            writer.write(each)
        await writer.stop()

    asyncio.run(write(first))
    asyncio.run(write(later))
    found = replay(TraceLines(path), Policy(max_temperature_c=80.0))
    assert {(each.route, each.count) for each in found.replayed} == {("cloud", 1), ("local", 1)}
    assert found.requests == 2 and found.span_s == 0.0


MOMENTS = st.floats(AT, AT + 1.0)
OFFERS = st.none() | st.builds(There, endpoint=st.just("c"), expected_s=st.floats(0, 1), safe_s=st.floats(0, 2))
QUESTIONS = st.builds(
    Question,
    now=st.just(AT),
    deadline_at=st.none() | MOMENTS,
    local_only=st.booleans(),
    here=st.builds(
        Here,
        forecast=st.none() | st.builds(Forecast, expected_at=MOMENTS, safe_at=MOMENTS, idle=st.booleans()),
        worker_ready=st.booleans(),
    ),
    there=OFFERS,
    queued=st.integers(0, 600),
)


@given(question=QUESTIONS, limit=st.integers(1, 500), hot=st.booleans())
def test_under_the_policy_it_was_recorded_with_nothing_moves(question: Question, limit: int, hot: bool) -> None:
    policy = Policy(queue_limit=limit, max_temperature_c=80.0)
    here = msgspec.structs.replace(
        question.here, queue_full=question.queued >= limit, strain=STRAINS[0] if hot else None
    )
    question = msgspec.structs.replace(question, here=here)
    device = DeviceState(temperature_c=99.0 if hot else 20.0)
    decision = question.decide()
    recorded = traced(
        "m", question, decision, device=device, sampled_at=AT, opinion=None, outcome=LOCAL, status=200, now=AT + 1
    )
    again = msgspec.json.decode(msgspec.json.encode(recorded), type=Traced)
    assert again == recorded, "to the last digit"
    found = replay([again], policy)
    assert not found.moved and found.recorded == found.replayed
    assert found.recorded[0].route == decided(decision).route
    private = msgspec.structs.replace(again, local_only=True)
    for rules in (policy, Policy(min_confidence=1.0, max_temperature_c=1.0, queue_limit=1)):
        (only,) = replay([private], rules).replayed
        assert only.route != "cloud"
    assert isinstance(decision, Cloud) <= (question.there is not None and not question.local_only)


def test_a_trace_is_bounded_and_a_torn_line_costs_itself(tmp_path: Path) -> None:
    path = tmp_path / "trace"

    async def main() -> None:
        for _ in range(20):
            writer = TraceWriter(path, 20_000)
            for number in range(10):
                writer.write(line(at=AT + number))
            await writer.stop()
            assert writer.dropped == 0

    asyncio.run(main())
    older = path.with_name("trace.1")
    assert older.is_file() and path.stat().st_size + older.stat().st_size <= 20_000
    assert replay(TraceLines(path), Policy()).requests % 10 == 0
    with path.open("ab") as file:
        file.write(b'{"type":"request","mod')
    lines = TraceLines(path)
    assert replay(lines, Policy()).requests and lines.torn == 1


def test_more_lines_at_once_than_a_part_holds_keep_the_bound_too(tmp_path: Path) -> None:
    path = tmp_path / "trace"

    async def main() -> None:
        writer = TraceWriter(path, 20_000)
        for number in range(1000):
            writer.write(line(at=AT + number))
        await writer.stop()

    asyncio.run(main())
    older = path.with_name("trace.1")
    assert path.stat().st_size + older.stat().st_size <= 20_000
    assert replay(TraceLines(path), Policy()).requests > 10, "the last of them are there"


def test_an_agent_that_served_nobody_leaves_a_trace_alone(tmp_path: Path) -> None:
    """It may be another agent's, whose state folder this one found in use."""
    path = tmp_path / "trace"
    path.write_bytes(b"x" * 600)

    async def main() -> None:
        await TraceWriter(path, 1000).stop()

    asyncio.run(main())
    assert [each.name for each in tmp_path.iterdir()] == ["trace"] and path.read_bytes() == b"x" * 600


def test_a_disk_that_fails_costs_lines_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        writer = TraceWriter(tmp_path / "absent" / "trace", 1000)
        writer.write(line())
        writer._flush()
        writer.write(line())
        await writer.stop()
        assert writer.dropped == 2

    asyncio.run(main())
    assert len(caplog.records) == 1 and "No such file" in caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not json", "is no trace"),
        (b'{"type": "other"}\n', "is no line of a trace"),
        (b'{"type": "request", "model": 5}\n', ":1"),
        (b'{"type": "begin", "version": 9, "ts": "", "agent_version": "7"}\n', "aios-edge 7"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(SettingsError, match=says):
        list(TraceLines(tmp_path / "trace"))
    with pytest.raises(SettingsError, match="can't be read"):
        list(TraceLines(tmp_path / "none"))


def test_a_policy_stands_alone_or_in_an_agents_configuration(tmp_path: Path) -> None:
    (alone := tmp_path / "policy.toml").write_text("[policy]\nqueue_limit = 7\n")
    assert load_policy(alone).queue_limit == 7
    (whole := tmp_path / "agent.toml").write_text('[device]\nid = "d"\nprofile = "rpi5"\n[policy]\nqueue_limit = 8\n')
    assert load_policy(whole).queue_limit == 8
    alone.write_text("[policy]\nqueue_limt = 7\n")
    with pytest.raises(SettingsError, match="Did you mean 'queue_limit'"):
        load_policy(alone)
    with pytest.raises(SettingsError, match="can't be read"):
        load_policy(tmp_path / "none.toml")


def load_policy_digest(config: Path) -> str:
    return policy_digest(load_policy(config))


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aios_edge.cli.main", "policy", "replay", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_agents_trace_replays_as_it_was_and_otherwise(
    start_agent: Any, recording_cloud: Any, tmp_path: Path
) -> None:
    recording_cloud.answer = lambda: (500, b"{}")
    trace = tmp_path / "trace"
    agent = start_agent(
        f'[policy]\ntrace = "{trace}"\nbreaker_failures = 1000\n[[cloud]]\nname = "c"\nurl = "{recording_cloud.url}"\n'
    )
    agent.until(lambda status: status["cloud"]["c"]["models"]["tiny"]["usable"])
    for parameters in ({}, {"timeout": 5_000_000}, {"timeout": 1_000}, {"privacy": "local-only"}):
        agent.infer(SECRET, **parameters)
    assert agent.stop() == 0
    text = trace.read_text()
    assert SECRET not in text
    lines = [json.loads(each) for each in text.splitlines()]
    assert lines[0]["type"] == "begin" and lines[0]["version"] == 1
    assert lines[1]["type"] == "policy" and lines[1]["values"]["breaker_failures"] == 1000
    lines = lines[2:]
    assert {each["policy"] for each in lines} == {load_policy_digest(agent.config)}
    assert [each["outcome"]["reason"] for each in lines[:2]] == ["no_deadline", "idle"]
    assert 0.5 < lines[0]["opinion"]["confidence"] < 1.0
    same = shutil.copy(agent.config, tmp_path / "same.toml")
    document = json.loads(run(trace, "--policy", same, "--json").stdout)
    assert (
        document["requests"] == len(lines) >= 3
        and document["moved"] == []
        and document["recorded"] == document["replayed"]
    )
    assert document["policies"] == [{"digest": document["policy"], "requests": len(lines)}]
    (tmp_path / "unsure.toml").write_text("[policy]\nmin_confidence = 1.0\n")
    document = json.loads(run(trace, "--policy", tmp_path / "unsure.toml", "--json").stdout)
    moved = {(each["recorded"]["reason"], each["replayed"]["reason"]): each["count"] for each in document["moved"]}
    assert moved[("no_deadline", "low_confidence")] == 1 and moved[("idle", "low_confidence")] == 1
    told = run(trace, "--policy", tmp_path / "unsure.toml")
    assert told.returncode == 0 and "local idle -> cloud low_confidence" in told.stdout
    wrong = run(agent.config, "--policy", same)
    assert wrong.returncode == 2 and "policy.trace" in wrong.stderr
