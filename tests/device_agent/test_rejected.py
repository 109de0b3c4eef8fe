"""A bundle that had to go doesn't come back by a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from swapping import client, failing_model, ids, post

from device_agent.kept_bundles import keep
from device_agent.rejected import NAME, Rejected, RejectedBundles

SHADOW = "[policy]\nshadow_share = 1.0\ntrial_s = 600.0"


@pytest.fixture
def place(tmp_path: Path, make_bundle: Any) -> Path:
    """Where agent.toml's bundle lies; version 1.0.0 at first."""
    path: Path = make_bundle(tmp_path / "bundle").path
    return path


def version(agent: Any) -> str:
    answer: str = agent.infer()[1]["model_version"]
    return answer


def test_after_a_way_back_a_restart_begins_with_what_served(
    start_agent: Any, place: Path, tmp_path: Path, make_bundle: Any, tiny_parts: dict[str, Any]
) -> None:
    agent = start_agent(bundle=place)
    old = ids(agent)[0]
    files = failing_model(tiny_parts, tmp_path)
    size = sum(path.stat().st_size for path in files.values())
    measured = msgspec.structs.replace(tiny_parts["manifest"]["measured"], size_bytes=size)
    bad = make_bundle(place, version="1.1.0", files=files, measured=measured, promises={"size_bytes": size}).bundle_id
    client(agent).load_model("tiny")
    agent.until(lambda _: agent.infer("a strange film") and agent.events("rolled_back"), limit_s=30)
    agent.until(lambda status: status["models"]["tiny"]["rejected"])
    assert agent.stop() == 0

    agent = start_agent(again=agent)
    assert ids(agent)[0] == old and version(agent) == "1.0.0" and agent.infer("a strange film")[0] == 200
    rejected = agent.status()["models"]["tiny"]["rejected"]
    assert (rejected["bundle_id"], rejected["version"], rejected["kept_id"]) == (bad, "1.1.0", old)
    assert "error rate" in rejected["reason"]
    (told,) = agent.events("bundle_passed_over")
    assert (told["bundle_id"], told["kept"], told["path"]) == (bad, old, str(place))
    assert post(agent, "load")[0] == 200 and version(agent) == "1.1.0", "by hand it may"
    assert agent.status()["models"]["tiny"]["rejected"] is None
    assert agent.stop() == 0

    agent = start_agent(again=agent)
    assert version(agent) == "1.1.0" and agent.events("bundle_passed_over") == []
    assert agent.stop() == 0


def test_a_trial_that_was_not_over_begins_anew_by_hand_only(start_agent: Any, place: Path, make_bundle: Any) -> None:
    agent = start_agent(SHADOW, bundle=place)
    make_bundle(place, version="1.1.0")
    client(agent).load_model("tiny")
    assert agent.status()["models"]["tiny"]["rejected"] is None, "it is on trial"
    assert agent.stop() == 0
    agent = start_agent(again=agent)
    assert version(agent) == "1.0.0"
    assert agent.status()["models"]["tiny"]["rejected"]["reason"] == "its trial wasn't over"
    make_bundle(place, version="1.2.0")
    assert agent.stop() == 0
    agent = start_agent(again=agent)
    assert version(agent) == "1.2.0", "something else lies there now"
    assert agent.status()["models"]["tiny"]["rejected"] is None
    assert agent.stop() == 0


def test_without_a_copy_or_with_a_damaged_file_the_path_is_all_there_is(tmp_path: Path, make_bundle: Any) -> None:
    old, bad = make_bundle(tmp_path / "old"), make_bundle(tmp_path / "bad", version="1.1.0")
    state = tmp_path / "state"
    keep(old, state)
    known = RejectedBundles(state)
    known.remember(
        "tiny",
        Rejected(bundle_id=bad.bundle_id, version="1.1.0", kept_id=old.bundle_id, reason="slow", ts="2026-01-31"),
    )
    again = RejectedBundles(state)
    again.open()
    assert again.instead_of(bad).bundle_id == old.bundle_id and again.by_model == known.by_model
    (state / "bundles" / old.bundle_id[:16] / "model.onnx").write_bytes(b"")
    assert again.instead_of(bad) is bad and again.by_model == {}
    (state / NAME).write_bytes(b"{")
    again.open()
    assert again.instead_of(bad) is bad
