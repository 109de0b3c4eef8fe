"""The audit on disk: whole lines, bounded, private, and a disk that refuses stops nobody."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from device_agent import audit as audit_module
from device_agent.audit import AuditLog, AuditRecord


def record(number: int, tenant: str = "a", path: str = "/v2/models/m/infer") -> AuditRecord:
    return AuditRecord(
        ts="2026-01-31T12:00:00.000Z",
        tenant=tenant,
        request_id=number,
        id=None,
        method="POST",
        path=path,
        model="m",
        route="local",
        reason="idle",
        status=200,
        bytes_in=1,
        bytes_out=2,
    )


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["request_id"] for line in path.read_text().splitlines()]


def test_each_tenant_has_its_file_and_only_the_agent_reads_it(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path, {"a": 10_000, "b": 10_000})
    for number in range(10):
        audit.write(record(number, "a" if number % 2 else "b"))
    audit.close()
    folder = tmp_path / "audit"
    assert numbers(folder / "a.jsonl") == [1, 3, 5, 7, 9] and numbers(folder / "b.jsonl") == [0, 2, 4, 6, 8]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "a.jsonl").stat().st_mode) == 0o600


def test_without_a_request_nothing_is_made(tmp_path: Path) -> None:
    AuditLog(tmp_path, {"a": 10_000}).close()
    assert list(tmp_path.iterdir()) == []


def test_it_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    for start in range(0, 300, 100):  # three runs of an agent
        audit = AuditLog(tmp_path, {"a": 10_000})
        for number in range(start, start + 100):
            audit.write(record(number))
        audit.close()
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 10_000
    kept = [*numbers(folder / "a.jsonl.1"), *numbers(folder / "a.jsonl")]
    assert len(kept) > 20 and kept == list(range(300 - len(kept), 300))
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_line_that_was_cut_off_spoils_only_itself(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    path = tmp_path / "audit" / "a.jsonl"
    path.write_bytes(b'{"request_id": 7}\n{"requ')
    audit = AuditLog(tmp_path, {"a": 10_000})
    audit.write(record(8))
    audit.close()
    lines = path.read_text().splitlines()
    assert lines[1] == '{"requ' and json.loads(lines[2])["request_id"] == 8


def test_a_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "audit" / "a.jsonl").symlink_to(tmp_path / "victim")
    audit = AuditLog(tmp_path, {"a": 10_000})
    audit.write(record(1))
    audit.close()
    assert (tmp_path / "victim").read_text() == "mine" and "can't be written" in caplog.text


def test_a_disk_that_refuses_is_said_once_and_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(audit_module, "_REOPEN_S", 0.0)
    (tmp_path / "audit").write_text("no folder")
    audit = AuditLog(tmp_path, {"a": 10_000})
    for number in range(5):
        audit.write(record(number))
    audit.close()
    assert caplog.text.count("can't be written") == 1
    file = audit_module._AuditFile(tmp_path / "later" / "a.jsonl", 5_000)
    (tmp_path / "later").write_text("no folder")
    file.append([b"lost\n"])
    (tmp_path / "later").unlink()
    file.append([b"kept\n"])
    file.close()
    assert (tmp_path / "later" / "a.jsonl").read_bytes() == b"kept\n" and "1 lines are missing" in caplog.text


def test_a_hanging_disk_fills_no_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, released, put = threading.Event(), threading.Event(), os.write

    def slow(fd: int, data: bytes) -> int:
        hangs.set()
        released.wait(30)
        return put(fd, data)

    monkeypatch.setattr(audit_module, "MAX_WAITING", 5)
    monkeypatch.setattr(audit_module.os, "write", slow)
    audit = AuditLog(tmp_path, {"a": 100_000})
    audit.write(record(0))
    assert hangs.wait(30)
    for number in range(1, 20):
        audit.write(record(number))
    released.set()
    audit.close()
    assert numbers(tmp_path / "audit" / "a.jsonl") == [0, 1, 2, 3, 4, 5] and "lacks 14 lines" in caplog.text
