"""The supervisor's handle on real worker processes: how they start, die, and are replaced."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scripted_worker import run

from aios_edge.errors import BundleRefused, SettingsError, WorkerLost
from device_agent import wire
from device_agent.values import InferenceRequest
from device_agent.worker_pool import BatchResult, WorkerHandle, WorkerSpec

ENDLESS = 1e7  # a slowdown under which a batch of milliseconds takes hours


def request(request_id: int, *texts: str, body: bytes | None = None) -> InferenceRequest:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
    return InferenceRequest(
        request_id=request_id,
        model="tiny",
        body=body or msgspec.json.encode({"inputs": [tensor]}),
        json_length=None,
        client_id=None,
        priority=0,
        deadline_at=None,
        local_only=False,
        arrived_at=0.0,
        cost_hint_bytes=1,
    )


def spec(bundle: Any, **changes: Any) -> WorkerSpec:
    return WorkerSpec(**{"model": "tiny", "bundle_path": bundle.path, "profile": "x86-gateway", **changes})


def labels(result: BatchResult, index: int = 0) -> list[str]:
    item = result.done.items[index]
    assert item.status == 200, item.error
    outputs = msgspec.json.decode(item.outputs.of(result.payload))
    return next(tensor["data"] for tensor in outputs if tensor["name"] == "label")


def wait_gone(pid: int, limit_s: float) -> bool:
    """Whether a process (not necessarily a child) ends within the limit."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], limit_s)[0])
    finally:
        os.close(pidfd)


def worker_process(**how: Any) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = wire.pair()
    ours.setblocking(True)
    command = [sys.executable, "-m", "device_agent.worker", "--fd", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), **how)
    theirs.close()
    return ours, process


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_a_worker_starts_answers_and_stops(tiny_bundle: Any, isolation: Any) -> None:
    stages: list[str] = []

    async def journey() -> None:
        worker = WorkerHandle(spec(tiny_bundle, isolation=isolation), on_stage=stages.append)
        report = await worker.start()
        assert report.bundle_id == tiny_bundle.bundle_id
        assert (worker.pid is None) == (isolation == "thread")
        assert (worker.rss_bytes is None) == (isolation == "thread")
        result = await run(worker, [request(7, "a good film"), request(8, "an awful plot", "very funny")])
        assert [item.request_id for item in result.done.items] == [7, 8]
        assert labels(result, 0) == ["positive"]
        assert labels(result, 1) == ["negative", "positive"]
        assert result.done.items[0].batch_size == 2
        assert result.done.busy_s > 0
        pid = worker.pid
        await worker.stop()
        assert worker.pid is None and not worker.ready
        if pid is not None:
            assert wait_gone(pid, 0)
        with pytest.raises(WorkerLost):
            await run(worker, [request(9, "good")])

    asyncio.run(journey())
    assert stages[:2] == ["bundle", "profile"]


def test_kill_9_in_the_middle_of_a_batch_is_noticed_at_once_and_the_worker_comes_back(tiny_bundle: Any) -> None:
    lost: list[str] = []

    async def journey() -> None:
        worker = WorkerHandle(spec(tiny_bundle, slowdown=ENDLESS), on_lost=lost.append)
        await worker.start()
        pid = worker.pid
        assert pid is not None
        running = asyncio.ensure_future(run(worker, [request(1, "good")]))
        await asyncio.sleep(0)  # the batch is sent; it will not come back by itself
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(WorkerLost, match="SIGKILL"):
            await running
        assert time.monotonic() - killed_at < 0.5
        assert lost == ["was killed by SIGKILL"]
        report = await worker.start("quick")
        assert [check.name for check in report.checks][-1] == "golden_raw"
        assert worker.generation == 2 and worker.pid != pid and worker.ready
        await worker.stop(grace_s=1)
        assert lost == ["was killed by SIGKILL"], "a stop is no loss"

    asyncio.run(journey())


def test_an_idle_workers_death_is_reported_too(tiny_bundle: Any) -> None:
    async def journey() -> None:
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        worker = WorkerHandle(spec(tiny_bundle), on_lost=lost.set_result)
        await worker.start("quick")
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSEGV)
        assert await asyncio.wait_for(lost, 5) == "was killed by SIGSEGV"
        assert not worker.ready and worker.pid is None

    asyncio.run(journey())


def test_stop_gives_a_stuck_worker_its_grace_and_no_more(tiny_bundle: Any) -> None:
    async def journey() -> None:
        worker = WorkerHandle(spec(tiny_bundle, slowdown=ENDLESS))
        await worker.start("quick")
        pid = worker.pid
        assert pid is not None
        running = asyncio.ensure_future(run(worker, [request(1, "good")]))
        await asyncio.sleep(0)
        await worker.stop(grace_s=0.1)
        with pytest.raises(WorkerLost):
            await running
        assert wait_gone(pid, 0)

    asyncio.run(journey())


def test_signals_for_the_supervisor_do_not_end_a_worker(tiny_bundle: Any) -> None:
    async def journey() -> None:
        worker = WorkerHandle(spec(tiny_bundle))
        await worker.start("quick")
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
        assert labels(await run(worker, [request(1, "superb")])) == ["positive"]
        await worker.stop()

    asyncio.run(journey())


def test_a_large_request_travels_by_memfd(tiny_bundle: Any) -> None:
    async def journey() -> None:
        worker = WorkerHandle(spec(tiny_bundle))
        await worker.start("quick")
        text = "good " * 60_000
        assert labels(await run(worker, [request(1, text), request(2, "awful")])) == ["positive"]
        await worker.stop()

    asyncio.run(journey())


def test_what_a_worker_prints_goes_to_the_log(
    tiny_bundle: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="device_agent.worker")
    refused = tmp_path / "nowhere"

    async def journey() -> None:
        worker = WorkerHandle(spec(tiny_bundle))
        await worker.start("quick")
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGABRT)  # faulthandler writes its stack
        with pytest.raises(WorkerLost):
            await run(worker, [request(1, "good")])
        for _ in range(200):
            if "Fatal Python error" in caplog.text:
                break
            await asyncio.sleep(0.01)
        with pytest.raises(SettingsError):
            await WorkerHandle(spec(tiny_bundle, bundle_path=refused)).start("quick")

    asyncio.run(journey())
    assert "worker of tiny [" in caplog.text
    assert "Fatal Python error: Aborted" in caplog.text


def test_a_refusal_carries_the_name_of_its_check(tiny_copy: Path) -> None:
    (tiny_copy / "extra.txt").write_text("not listed")

    async def journey() -> str:
        worker = WorkerHandle(WorkerSpec(model="tiny", bundle_path=tiny_copy, profile="x86-gateway"))
        with pytest.raises(BundleRefused) as refused:
            await worker.start()
        assert worker.pid is None
        return refused.value.promise

    assert asyncio.run(journey()) == "unlisted"


def test_an_activation_that_never_ends_is_ended(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_agent.worker.serve", lambda sock: wire.receive(sock) and wire.receive(sock))

    async def journey() -> str:
        with pytest.raises(BundleRefused) as refused:
            await WorkerHandle(spec(tiny_bundle, isolation="thread")).start(timeout_s=0.05)
        return refused.value.promise

    assert asyncio.run(journey()) == "timeout"


def test_a_worker_that_talks_nonsense_is_given_up(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def babble(sock: socket.socket) -> None:
        try:
            while True:
                sock.send(os.urandom(64))
        except OSError:
            return

    monkeypatch.setattr("device_agent.worker.serve", babble)

    async def journey() -> None:
        with pytest.raises(WorkerLost, match="nonsense"):
            await WorkerHandle(spec(tiny_bundle, isolation="thread")).start()

    asyncio.run(journey())


def test_replies_of_an_old_generation_or_batch_are_dropped(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from device_agent.worker import serve

    class Confused:
        """A worker's socket that says everything three times, first with wrong numbers."""

        def __init__(self, sock: socket.socket) -> None:
            self._sock = sock

        def sendmsg(self, parts: list[bytes], control: Any = ()) -> None:
            message = msgspec.msgpack.decode(parts[1], type=wire.Message)
            old = [msgspec.structs.replace(message, generation=message.generation - 1)]
            if isinstance(message, wire.Done):
                old.append(msgspec.structs.replace(message, batch_id=message.batch_id + 5))
            for other in old:
                wire.send(self._sock, other, parts[2])
            self._sock.sendmsg(parts, control)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

    monkeypatch.setattr("device_agent.worker.serve", lambda sock: serve(Confused(sock)))  # type: ignore[arg-type]

    async def journey() -> None:
        worker = WorkerHandle(spec(tiny_bundle, isolation="thread"))
        await worker.start("quick")
        for number in range(1, 4):
            result = await run(worker, [request(number, "good")])
            assert (result.done.batch_id, result.done.generation) == (number, 1)
            assert result.done.items[0].request_id == number
        await worker.stop()

    asyncio.run(journey())


def test_a_worker_dies_with_its_parent_even_inside_a_batch(tiny_bundle: Any) -> None:
    program = """
import asyncio, sys, msgspec
from pathlib import Path
from device_agent.worker_pool import WorkerHandle, WorkerSpec
from device_agent.values import InferenceRequest
async def main():
    spec = WorkerSpec(model="tiny", bundle_path=Path(sys.argv[1]), profile="x86-gateway", slowdown=1e7)
    worker = WorkerHandle(spec)
    await worker.start("quick")
    request = msgspec.json.decode(sys.argv[2], type=InferenceRequest)
    ended = asyncio.Event()
    worker.begin([request], lambda end: ended.set())
    print(worker.pid, flush=True)
    await ended.wait()
asyncio.run(main())
"""
    command = [sys.executable, "-c", program, str(tiny_bundle.path), msgspec.json.encode(request(1, "good")).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not wait_gone(pid, 0)
        parent.kill()
    assert wait_gone(pid, 5)


@pytest.mark.parametrize("junk", [b"x", b"\xff" * 100, b"\x05\x00\x00\x00hello", b"\x02\x00\x00\x00\x81\xa4type"])
def test_a_worker_that_is_told_nonsense_exits(junk: bytes) -> None:
    ours, process = worker_process(stderr=subprocess.PIPE)
    with ours:
        ours.send(junk)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
        process.stderr.close()


def test_a_worker_exits_when_the_supervisor_closes_its_socket(tiny_bundle: Any) -> None:
    ours, process = worker_process()
    wire.send(
        ours,
        wire.Load(bundle_path=str(tiny_bundle.path), profile="x86-gateway", generation=1, check="quick"),
    )
    while True:
        received = wire.receive(ours)
        assert received is not None
        if isinstance(received[0], wire.Ready):
            break
    ours.close()
    assert process.wait(10) == 0


def test_a_worker_of_another_protocol_says_so(tiny_bundle: Any) -> None:
    ours, process = worker_process()
    with ours:
        load = wire.Load(bundle_path=str(tiny_bundle.path), profile="x86-gateway", generation=1, version=99)
        wire.send(ours, load)
        received = wire.receive(ours)
        assert received is not None and isinstance(received[0], wire.Refused)
        assert received[0].check == "runtime" and "protocol 99" in received[0].detail
        assert process.wait(10) == 0


def test_a_worker_loads_neither_torch_nor_the_workshop(tiny_bundle: Any) -> None:
    program = """
import sys, socket, threading
from device_agent import wire, worker
ours, theirs = wire.pair()
ours.setblocking(True)
wire.send(ours, wire.Load(bundle_path=sys.argv[1], profile="x86-gateway", generation=1, check="quick"))
wire.send(ours, wire.Stop())
worker.serve(theirs)
print(",".join(sorted(set(sys.modules) & {"torch", "transformers", "optimum", "onnx", "exporters", "huggingface_hub"})))
"""
    command = [sys.executable, "-c", program, str(tiny_bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_the_handle_loads_neither_numpy_nor_onnxruntime() -> None:
    program = "import sys, device_agent.worker_pool; sys.exit('numpy' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_an_emulated_slow_device_holds_its_batch_asleep(tiny_bundle: Any) -> None:
    async def journey() -> None:
        worker = WorkerHandle(spec(tiny_bundle, slowdown=30.0))
        await worker.start("quick")
        done = (await run(worker, [request(1, "good " * 2000)])).done
        assert 0 < done.items[0].compute_s <= done.busy_s  # of which one part in thirty was the model's own
        await worker.stop()

    asyncio.run(journey())


def test_a_disk_that_fails_while_loading_is_a_refusal_with_its_reason(
    tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error", "model.onnx")

    monkeypatch.setattr("device_agent.worker.activate", failing)

    async def main() -> None:
        handle = WorkerHandle(spec(tiny_bundle, isolation="thread"))
        with pytest.raises(BundleRefused, match="Input/output error"):
            await handle.start()

    asyncio.run(main())


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_a_worker_that_has_two_batches_answers_one_after_the_other(tiny_bundle: Any, isolation: Any) -> None:
    async def journey() -> list[BatchResult | WorkerLost]:
        worker = WorkerHandle(spec(tiny_bundle, isolation=isolation))
        await worker.start("quick")
        ended: list[BatchResult | WorkerLost] = []
        both = asyncio.Event()

        def end(result: BatchResult | WorkerLost) -> None:
            ended.append(result)
            if len(ended) == 2:
                both.set()

        worker.begin([request(1, "a good film")], end)
        worker.begin([request(2, "awful")], end)
        await both.wait()
        await worker.stop()
        return ended

    first, second = asyncio.run(journey())
    assert isinstance(first, BatchResult) and isinstance(second, BatchResult)
    assert (labels(first), labels(second)) == (["positive"], ["negative"])


def test_the_death_of_a_worker_is_told_to_each_of_its_batches_in_their_order(tiny_bundle: Any) -> None:
    async def journey() -> list[int]:
        worker = WorkerHandle(spec(tiny_bundle, slowdown=ENDLESS))
        await worker.start("quick")
        told: list[int] = []
        both = asyncio.Event()

        def teller(number: int) -> Any:
            def tell(end: BatchResult | WorkerLost) -> None:
                assert isinstance(end, WorkerLost) and "SIGKILL" in str(end)
                told.append(number)
                if len(told) == 2:
                    both.set()

            return tell

        for number in (1, 2):
            worker.begin([request(number, "good")], teller(number))
        worker.kill()
        await both.wait()
        return told

    assert asyncio.run(journey()) == [1, 2]
