"""Requests with their answers as files: bounded, whole, private ones never, and a disk that refuses stops nobody."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios_edge.errors import SettingsError
from device_agent import capture
from device_agent.capture import BLOCK_BYTES, Captured, Captures
from device_agent.settings import parse_settings
from device_agent.tenants import Tenant, key_sha256, new_key

KEY = new_key()
JSON = b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a good film"]}]}'
BINARY = b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":8}}]}'


def captured(number: int, request: bytes = b"{}", **more: Any) -> Captured:
    known = {"client_id": None, "route": "local", "reason": "idle", "request_json_length": None}
    answer = {"answer": b'{"outputs":[]}', "answer_json_length": None}
    return Captured(**{"model": "m", "request_id": number, "request": request, **known, **answer, **more})


def keep(
    folder: Path, records: list[Captured], *, limit_bytes: int = 1_000_000, times_s: list[float] | None = None
) -> tuple[list[str], tuple[int, int] | None]:
    """Write them through one life of the agent; the events, and the counts."""
    tenant = Tenant(id="a", unix_uids=(0,), capture_dir=folder, capture_bytes=limit_bytes)
    told: list[str] = []
    clock = iter(times_s or [1e9 + record.request_id for record in records])  # type: ignore[operator]

    async def main() -> tuple[int, int] | None:
        captures = Captures([tenant], lambda kind, **_: told.append(kind), wall=lambda: next(clock))
        for record in records:
            captures.keep("a", record)
        await asyncio.to_thread(captures.close)
        return captures.counts("a")

    counts = asyncio.run(main())
    return told, counts


def test_a_file_has_request_and_answer_and_is_the_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "kept"
    binary = captured(2, b'{"x":1}\xff\x00', request_json_length=7, answer=b"\x01", answer_json_length=0)
    assert keep(folder, [captured(1, JSON, client_id="q"), binary]) == ([], (2, 0))
    assert [path.name for path in sorted(folder.iterdir())] == ["1000000001000-1.json", "1000000002000-2.json"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    first, second = (json.loads(path.read_bytes()) for path in sorted(folder.iterdir()))
    assert first == {
        "ts": "2001-09-09T01:46:41.000Z",
        "tenant": "a",
        "model": "m",
        "request_id": 1,
        "id": "q",
        "route": "local",
        "reason": "idle",
        "request": json.loads(JSON),
        "answer": {"outputs": []},
    }
    assert base64.b64decode(second["request_base64"]) == binary.request and second["request_json_length"] == 7
    assert base64.b64decode(second["answer_base64"]) == b"\x01" and second["answer_json_length"] == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5 * BLOCK_BYTES), max_size=8), max_size=4), st.integers(1, 12))
def test_the_folder_never_takes_more_than_its_bound_and_the_oldest_go_first(
    tmp_path_factory: pytest.TempPathFactory, lives: list[list[int]], blocks: int
) -> None:
    folder, limit_bytes, number = tmp_path_factory.mktemp("kept"), blocks * BLOCK_BYTES, 0
    (folder / "labels.csv").write_text("somebody's")
    (folder / "1000000000000-0.json.new").write_text("half a")
    fits: list[int] = []
    for life in lives:
        records = []
        for size in life:
            number += 1
            records.append(captured(number, b'"%s"' % (b"x" * size)))
            if size + 250 < limit_bytes:
                fits.append(number)
        keep(folder, records, limit_bytes=limit_bytes)
        here = [path for path in folder.iterdir() if path.suffix == ".json"]
        assert sum(-(-path.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES for path in here) <= limit_bytes
        numbers = sorted(int(path.stem.split("-")[1]) for path in here)
        assert set(fits[-1:]) <= set(numbers), "the newest is there"
        later = [one for one in fits if numbers and one >= numbers[0]]
        assert set(later) <= set(numbers), "none in between is missing"
        assert all(json.loads(path.read_bytes())["request_id"] for path in here), "each is whole"
    assert (folder / "labels.csv").read_text() == "somebody's"
    assert not [*folder.glob("*.new")] or not any(lives)


def test_a_disk_that_refuses_is_told_of_once_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capture, "_AGAIN_S", 0.0)
    folder = tmp_path / "kept"
    folder.mkdir()
    broken = folder / "1000000001000-1.json.new"
    broken.mkdir()  # as little can be removed or written there as on a full disk
    (broken / "x").touch()
    told: list[str] = []

    async def main() -> None:
        numbers = iter((1, 2, 3))
        captures = Captures(
            [Tenant(id="a", unix_uids=(0,), capture_dir=folder)],
            lambda kind, **_: told.append(kind),
            wall=lambda: 1e9 + next(numbers),
        )
        captures.keep("a", captured(1))
        captures.keep("a", captured(2))
        while captures.counts("a") != (0, 2):  # noqa: ASYNC110 - a condition in the code under test
            await asyncio.sleep(0.005)
        (broken / "x").unlink()
        broken.rmdir()
        captures.keep("a", captured(3))
        await asyncio.to_thread(captures.close)
        assert captures.counts("a") == (1, 2)

    asyncio.run(main())
    assert told == ["capture_failed", "capture_resumed"]
    assert [path.name for path in folder.iterdir()] == ["1000000003000-3.json"]
    assert "serving goes on without it" in caplog.text


def test_a_disk_that_hangs_costs_files_and_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_WAITING_BYTES", 100)
    assert keep(tmp_path, [captured(1), captured(2, b'"%s"' % (b"x" * 200))]) == ([], (1, 1))


def test_what_can_not_be_meant_is_refused(tmp_path: Path) -> None:
    def refusal(more: str) -> str:
        text = '[device]\nid = "d"\nprofile = "rpi5"\n[http]\nunix_socket = "s"\n'
        with pytest.raises(SettingsError) as caught:
            parse_settings(f'{text}[[tenant]]\nid = "a"\nunix_uids = [1]\n{more}', where="agent.toml", base=tmp_path)
        return str(caught.value)

    assert "capture_share" in refusal("capture_share = 1.5") and "capture_share" in refusal("capture_share = 0")
    assert "capture_bytes" in refusal("capture_bytes = 0")
    assert "nothing is captured" in refusal("capture_local_only = true")
    other = 'capture_dir = "c"\n[[tenant]]\nid = "b"\nunix_uids = [2]\ncapture_dir = "./c"'
    assert "another tenant's" in refusal(other)


@pytest.fixture(scope="module")
def ask(start_agent: Any, make_bundle: Any) -> Callable[..., tuple[int, bytes]]:
    """A real agent, its config's folder and who asks it."""
    stays = make_bundle(name="stays").path
    tenant = '[[tenant]]\nid = "{}"\nkey_sha256 = "{}"\ncapture_dir = "{}"\n'
    keys = {"some": KEY, "all": new_key(), "root": new_key()}
    agent = start_agent(
        f'[[bundle]]\npath = "{stays}"\nnever_leave_device = true\n'
        + tenant.format("some", key_sha256(keys["some"]), "some")
        + tenant.format("all", key_sha256(keys["all"]), "all")
        + "capture_local_only = true\n"
        + f'[[tenant]]\nid = "root"\nkey_sha256 = "{key_sha256(keys["root"])}"\nadmin = true\n'
    )

    def ask(who: str, path: str, body: bytes | None = None, json_length: int | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(agent.url.removeprefix("http://"), timeout=30)
        headers = {} if json_length is None else {"Inference-Header-Content-Length": str(json_length)}
        headers |= {"Authorization": f"Bearer {keys.get(who, who)}"} if who else {}
        connection.request("GET" if body is None else "POST", path, body, headers)
        with connection.getresponse() as response:
            status, content = response.status, response.read()
        connection.close()
        return status, content

    ask.folder = agent.config.parent  # type: ignore[attr-defined]
    return ask


def files(folder: Path, count: int) -> list[dict[str, Any]]:
    """What is there once so many are; they are written within a moment, or the test's limit tells."""
    while len(found := sorted(folder.glob("*.json"))) < count:
        pass
    return [json.loads(path.read_bytes()) for path in found]


def test_a_tenants_requests_are_kept_and_nobody_elses_and_private_ones_only_where_it_says_so(ask: Any) -> None:
    private = JSON[:-1] + b', "parameters": {"privacy": "local-only"}}'
    for who in ("some", "all", "root"):
        assert ask(who, "/v2/models/tiny/infer", private)[0] == 200
        assert ask(who, "/v2/models/stays/infer", JSON)[0] == 200
        assert ask(who, "/v2/models/tiny/infer", b"{")[0] == 400, "nothing to label"
        status, answer = ask(who, "/v2/models/tiny/infer", JSON)
        assert status == 200
    body = BINARY + b"\x04\x00\x00\x00good"
    status, answer_of_binary = ask("some", "/v2/models/tiny/infer", body, len(BINARY))
    assert status == 200
    first, second = files(ask.folder / "some", 2)
    assert first["request"] == json.loads(JSON) and first["tenant"] == "some" and first["route"] == "local"
    assert first["answer"]["outputs"] == json.loads(answer)["outputs"] and first["answer"]["model_version"] == "1.0.0"
    assert base64.b64decode(second["request_base64"]) == body and second["request_json_length"] == len(BINARY)
    assert second["answer"] == json.loads(answer_of_binary)
    kept = files(ask.folder / "all", 3)
    assert [one["model"] for one in kept] == ["tiny", "stays", "tiny"]
    assert kept[0]["request"]["parameters"] == {"privacy": "local-only"}
    assert KEY not in "".join(path.read_text() for path in (ask.folder / "some").iterdir())
    page = ask("root", "/metrics")[1].decode()
    assert 'aios_tenant_captured_total{tenant="some"} 2\n' in page
    assert 'aios_tenant_capture_lost_total{tenant="all"} 0\n' in page and 'captured_total{tenant="root"}' not in page


def test_who_has_no_key_is_written_down_with_address_and_without_key(ask: Any) -> None:
    assert ask("", "/v2/models/tiny?key=secret")[0] == 401
    assert ask("aios_wrong-key", "/status")[0] == 401
    path = ask.folder / "state" / "audit" / "_unauthorized.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 2:
        pass
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["address"], line["path"], line["key_sent"]) for line in lines] == [
        ("127.0.0.1", "/v2/models/tiny", False),
        ("127.0.0.1", "/status", True),
    ]
    assert "secret" not in path.read_text() and "wrong" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
