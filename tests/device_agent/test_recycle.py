"""A worker that takes ever more memory is replaced before the kernel does it, again and again, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_worker import infer

from aios_edge.errors import SettingsError
from aios_edge.profile_files import load_profile
from device_agent import recycle
from device_agent.answer import Energy
from device_agent.cloud import CloudPool
from device_agent.hosting import open_entry, worker_spec
from device_agent.memory_room import Room, read_room
from device_agent.model_host import ModelHost
from device_agent.policy_in_force import PolicyInForce
from device_agent.recycle import Worker
from device_agent.rehearsal import rehearsal_batch
from device_agent.settings import BundleEntry, Policy, parse_settings
from device_agent.surroundings import Surroundings
from device_agent.upkeep import Upkeep
from device_agent.worker_pool import WorkerSpec

GB = 1_000_000_000
MB = 1_000_000
BYTES = st.integers(1, 4 * GB)

LEAK = """
import sys
if any("device_agent.worker" in word for word in sys.orig_argv):
    import device_agent.worker_batch as batches
    kept, answer = [], batches.answering
    def leaking(*arguments, **named):
        kept.append(b"x" * {leak_bytes})
        return answer(*arguments, **named)
    batches.answering = leaking
"""


@given(rss=BYTES, ready=BYTES, ceiling=st.none() | BYTES, since=st.floats(0, 1000), start=st.floats(0.1, 60))
def test_only_a_worker_that_grew_above_its_ceiling_is_replaced(
    rss: int, ready: int, ceiling: int | None, since: float, start: float
) -> None:
    room = Room(available_bytes=GB, limit_bytes=3 * GB)
    due = recycle.above(Worker(rss_bytes=rss, ready_bytes=ready), ceiling, room, since_last_s=since, start_s=start)
    if ceiling is None or rss <= ceiling or rss <= 1.1 * ready:
        assert not due
    else:
        assert due == (since >= 3 * start or rss > min(1.5 * ceiling, 0.75 * 3 * GB))


def test_the_ceiling_is_what_was_set_or_twice_what_was_promised() -> None:
    room = Room(available_bytes=GB, limit_bytes=4 * GB)
    small = Room(available_bytes=GB, limit_bytes=800 * MB)
    assert recycle.ceiling_bytes(None, 400 * MB, room) == 800 * MB
    assert recycle.ceiling_bytes(None, 400 * MB, small) == 600 * MB, "three quarters of what there is"
    assert recycle.ceiling_bytes(None, None, small) == 600 * MB
    assert recycle.ceiling_bytes(700 * MB, 400 * MB, small) == 700 * MB
    assert recycle.ceiling_bytes(0, 400 * MB, room) is None
    assert recycle.ceiling_bytes(None, None, Room()) is None


@given(st.dictionaries(st.sampled_from("abcd"), st.builds(Worker, rss_bytes=BYTES, ready_bytes=BYTES)))
def test_where_memory_is_short_the_one_that_gives_most_back_goes(workers: dict[str, Worker]) -> None:
    grown = {name: each.rss_bytes - each.ready_bytes for name, each in workers.items()}
    model = recycle.most_grown(workers)
    if model is None:
        assert all(grown[name] < max(32 * MB, 0.25 * each.ready_bytes) for name, each in workers.items())
    else:
        assert grown[model] == max(grown.values()) or grown[model] >= 32 * MB
        assert grown[model] >= max(32 * MB, 0.25 * workers[model].ready_bytes)


def test_a_successor_is_loaded_beside_only_where_there_is_room() -> None:
    worker = Worker(rss_bytes=300 * MB, ready_bytes=200 * MB, age_s=100.0)  # a megabyte a second
    assert recycle.fits_beside(Room(), worker, 1.0)
    assert recycle.fits_beside(Room(available_bytes=300 * MB, limit_bytes=GB), worker, 1.0)
    assert not recycle.fits_beside(Room(available_bytes=300 * MB, limit_bytes=GB), worker, 20.0), "it grows meanwhile"
    assert not recycle.fits_beside(Room(available_bytes=240 * MB, limit_bytes=GB), worker, 1.0)
    stalled = Room(available_bytes=GB, limit_bytes=2 * GB, pressure_percent=50.0)
    assert not recycle.fits_beside(stalled, worker, 1.0) and recycle.is_short(stalled)
    assert recycle.is_short(Room(available_bytes=40 * MB, limit_bytes=GB))
    assert not recycle.is_short(Room(available_bytes=60 * MB, limit_bytes=GB, pressure_percent=1.0))


def tree(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "proc", root / "sys"


MEMINFO = "MemTotal:        1000000 kB\nMemFree:  1 kB\nMemAvailable:     800000 kB\nHugePages_Total: 0\n"
PSI = "some avg10={} avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"


def test_the_room_is_that_of_the_tightest_group(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice/agent.service"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/system.slice/agent.service\n",
        "proc/pressure/memory": PSI.format("3.00"),
        f"{group}/memory.max": "max\n",
        f"{group}/memory.current": "90000000\n",
        f"{group}/memory.pressure": PSI.format("12.50"),
        "sys/fs/cgroup/system.slice/memory.max": "100000000\n",
        "sys/fs/cgroup/system.slice/memory.current": "90000000\n",
        "sys/fs/cgroup/system.slice/memory.stat": "anon 1\ninactive_file 20000000\n",
    }
    room = read_room(*tree(tmp_path, files))
    assert room.available_bytes == 30 * MB and room.limit_bytes == 100 * MB
    assert room.source == str(tmp_path / "sys/fs/cgroup/system.slice") and room.pressure_percent == 12.5


def test_the_room_under_version_1_and_without_any_group(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/docker/1"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "12:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n",
        f"{group}/memory.limit_in_bytes": "500000000\n",
        f"{group}/memory.usage_in_bytes": "400000000\n",
        f"{group}/memory.stat": "total_inactive_file 50000000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    }
    room = read_room(*tree(tmp_path, files))
    assert (room.available_bytes, room.limit_bytes, room.pressure_percent) == (150 * MB, 500 * MB, None)
    alone = read_room(*tree(tmp_path / "other", {"proc/meminfo": MEMINFO, "proc/pressure/memory": PSI.format("3.00")}))
    assert alone == Room(
        available_bytes=800_000 * 1024, limit_bytes=1_000_000 * 1024, source="machine", pressure_percent=3.0
    )
    assert read_room(tmp_path / "none", tmp_path / "none") == Room()


def test_this_machine_tells_its_room() -> None:
    room = read_room()
    assert room.available_bytes and room.limit_bytes and room.available_bytes < room.limit_bytes


def test_a_ceiling_for_a_thread_is_refused(tiny_bundle: Any, tmp_path: Path) -> None:
    text = f'[device]\nid = "d"\nprofile = "x86-gateway"\n[[bundle]]\npath = "{tiny_bundle.path}"\nmax_rss_bytes = 1'
    settings = parse_settings(text, where="agent.toml", base=tmp_path)
    profile = load_profile("x86-gateway")
    (entry,) = settings.bundle
    assert worker_spec(settings, profile, entry, open_entry(entry), state_dir=None).max_rss_bytes == 1
    thread = msgspec.structs.replace(profile, isolation="thread")
    with pytest.raises(SettingsError, match="isolation"):
        worker_spec(settings, thread, entry, open_entry(entry), state_dir=None)
    unset = BundleEntry(path=tiny_bundle.path)
    made = worker_spec(settings, thread, unset, open_entry(unset), state_dir=None)
    assert made.max_rss_bytes is None and made.promised_rss_bytes == 500 * MB


@pytest.fixture
def leaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Workers that are started from now on keep 8 MB more with every batch."""
    folder = tmp_path / "leak"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(LEAK.format(leak_bytes=8 * MB))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return folder


def serve_leaking(agent: Any, recycles: int) -> list[int]:
    """Ask until that many workers were replaced; the statuses, and every worker's id on the way."""
    codes: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        while agent.status()["models"]["tiny"]["recycles"] < recycles:
            codes += [code for code, _, _ in pool.map(agent.infer, ["a good film"] * 8)]
            assert len(codes) < 600, agent.log()
    return codes


def test_a_model_that_leaks_is_replaced_again_and_again_without_loss(start_agent: Any, leaking: Path) -> None:
    ceiling = 200 * MB
    agent = start_agent(f"max_rss_bytes = {ceiling}")
    first = agent.status()["models"]["tiny"]["worker_pid"]
    codes = serve_leaking(agent, 3)
    assert set(codes) == {200}
    model = agent.status()["models"]["tiny"]
    assert model["worker_pid"] != first and model["worker_max_rss_bytes"] == ceiling
    assert model["restarts"] == 0 and not agent.events("worker_crashed")
    for event in agent.events("worker_recycled"):
        assert event["reason"] == "max_rss_bytes" and event["beside"] is True
        assert event["rss_bytes"] > ceiling > event["now_rss_bytes"] and event["max_rss_bytes"] == ceiling
    agent.until(lambda _: not Path(f"/proc/{first}").exists())
    assert f'aios_worker_recycles_total{{model="tiny"}} {model["recycles"]}' in agent.text("/metrics")
    assert agent.stop() == 0


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 400 MB, where this system lets a test make one."""
    folder = Path(f"/sys/fs/cgroup/memory/aios-edge-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(400 * MB))
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here: {error}")
    yield folder
    for pid in (folder / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    for _ in range(200):
        with contextlib.suppress(OSError):  # some are still ending
            folder.rmdir()
            return
        time.sleep(0.05)


def test_a_leak_in_a_group_with_a_limit_never_meets_the_kernels_killer(
    start_agent: Any, leaking: Path, small_group: Path
) -> None:
    own = Path("/proc/self/cgroup").read_text().partition(":memory:")[2].partition("\n")[0]
    (small_group / "cgroup.procs").write_text(str(os.getpid()))
    try:  # who is started now is in it, and stays
        agent = start_agent()
    finally:
        (Path("/sys/fs/cgroup/memory") / own.strip("/") / "cgroup.procs").write_text(str(os.getpid()))
    model = agent.status()["models"]["tiny"]
    assert 290 * MB < model["worker_max_rss_bytes"] < 310 * MB
    codes = serve_leaking(agent, 3)
    assert set(codes) == {200}
    assert "oom_kill 0" in (small_group / "memory.oom_control").read_text()
    assert not agent.events("worker_crashed")
    assert agent.stop() == 0


def with_host(
    bundle: Any, room: list[Room], scenario: Callable[[Any, list[Any]], Awaitable[None]], **spec: Any
) -> None:
    """A model with real workers on a device with that much room."""

    async def main() -> None:
        events: list[Any] = []
        policy = Policy(queue_limit=10_000, queue_delay_s=0.0)  # nobody is turned away, however slow the machine
        around = Surroundings(
            rules=PolicyInForce(policy),
            cloud=CloudPool((), policy, lambda kind, **detail: None),
            emit=lambda kind, **detail: events.append((kind, detail)),
            energy=lambda compute_s, size: Energy(energy_j=None, method="unknown"),
            room=lambda: room[0],
        )
        started = WorkerSpec(model="tiny", bundle_path=bundle.path, profile="x86-gateway", **spec)
        host = ModelHost(started, bundle, around)
        await host.activate()
        try:
            await asyncio.wait_for(scenario(host, events), 60)
        finally:
            await host.stop()

    asyncio.run(main())


async def ask(host: ModelHost, number: int) -> int:
    (made,) = rehearsal_batch("tiny", (4,), pair=False, now=0.0)
    answer = await infer(host, msgspec.structs.replace(made, request_id=number))
    return answer.status


async def ask_until(host: ModelHost, enough: Callable[[], bool]) -> None:
    """Four at a time; each is answered."""
    numbers = iter(range(1, 10_000))
    while not enough():
        assert await asyncio.gather(*(ask(host, next(numbers)) for _ in range(4))) == [200] * 4


def test_where_there_is_no_room_for_two_the_worker_ends_first(tiny_bundle: Any, leaking: Path) -> None:
    async def scenario(host: ModelHost, events: list[Any]) -> None:
        await ask_until(host, lambda: host.instance.recycling.count == 2)
        for kind, detail in events:
            assert kind == "worker_recycled" and detail["beside"] is False
            assert detail["now_rss_bytes"] < detail["max_rss_bytes"] < detail["rss_bytes"]
        assert host.instance.restarts == 0 and host.instance.plan.crashes == 0

    full = Room(available_bytes=100 * MB, limit_bytes=GB)
    with_host(tiny_bundle, [full], scenario, max_rss_bytes=180 * MB)


@pytest.mark.parametrize("beside", [True, False])
def test_of_several_workers_one_is_replaced_at_a_time_and_the_others_serve(tiny_bundle: Any, beside: bool) -> None:
    room = [Room(available_bytes=GB, limit_bytes=GB)]

    async def scenario(host: ModelHost, events: list[Any]) -> None:
        instance = host.instance
        await host.muster()
        first, second = instance.places
        if not beside:
            room[0] = Room(available_bytes=60 * MB, limit_bytes=GB)
        before, states = (first.worker.pid, second.worker.pid), set()

        def replaced(count: int) -> bool:
            states.add((host.state, instance.ready))
            return instance.recycles == count

        for place in (first, second):
            place.recycling.ask("max_rss_bytes")
        assert first.recycling.goes_on and not second.recycling.goes_on
        await ask_until(host, lambda: replaced(1))
        assert first.worker.pid != before[0] and second.worker.pid == before[1]
        second.recycling.ask("max_rss_bytes")
        await ask_until(host, lambda: replaced(2))
        assert second.worker.pid != before[1] and instance.serving == 2
        assert states == {("ready", True)} and instance.restarts == 0
        assert [(kind, detail["beside"]) for kind, detail in events] == [("worker_recycled", beside)] * 2

    with_host(tiny_bundle, room, scenario, workers=2)


def test_where_memory_is_short_a_worker_goes_that_the_model_can_do_without(tiny_bundle: Any) -> None:
    room = [Room(available_bytes=GB, limit_bytes=GB)]

    async def scenario(host: ModelHost, events: list[Any]) -> None:
        await host.muster()
        upkeep = Upkeep({"tiny": host}, {}, host._around)
        upkeep.relieve()
        assert host.instance.serving == 2
        room[0] = Room(available_bytes=10 * MB, limit_bytes=GB)
        upkeep.relieve()
        await ask_until(host, lambda: host.instance.places[1].worker.pid is None)
        assert host.instance.serving == 1 and "memory is short" in str(host.instance.places[1].detail)
        host.instance.places[1].not_before = 0.0  # the pause is over
        host.instance.crew.look()
        await ask_until(host, lambda: "no memory for" in str(host.instance.places[1].detail))
        assert events == [], "nothing broke"

    with_host(tiny_bundle, room, scenario, workers=2)


def test_where_memory_is_short_the_worker_that_grew_is_replaced(tiny_bundle: Any, leaking: Path) -> None:
    room = [Room(available_bytes=GB, limit_bytes=GB)]

    async def scenario(host: ModelHost, events: list[Any]) -> None:
        upkeep = Upkeep({"tiny": host}, {}, host._around)
        await ask_until(host, lambda: host.instance.worker.rss_bytes > 1.5 * host.instance.report.rss_bytes)
        upkeep.relieve()
        assert host.instance.recycling.due is None, "nobody needs it"
        room[0] = Room(available_bytes=10 * MB, limit_bytes=GB)
        upkeep.relieve()
        await ask_until(host, lambda: host.instance.recycling.count == 1)
        upkeep.relieve()
        assert host.instance.recycling.due is None, "a fresh one has nothing to give"
        ((kind, detail),) = events
        assert kind == "worker_recycled" and detail["reason"] == "memory_pressure" and detail["beside"] is False

    with_host(tiny_bundle, room, scenario)


def test_a_worker_that_dies_while_its_successor_loads_leaves_one_worker(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, events: list[Any]) -> None:
        old = host.instance.worker
        assert old.pid is not None
        host.instance.recycling.ask("max_rss_bytes")
        await asyncio.sleep(0)
        os.kill(old.pid, signal.SIGKILL)
        await ask_until(host, lambda: host.instance.restarts == 1)
        while not host.instance.recycling._beside.done():  # type: ignore[union-attr]  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert host.instance.worker is old and host.state == "ready" and await ask(host, 99_999) == 200
        assert host.instance.recycling.count == 0
        assert len(children()) == 1

    with_host(tiny_bundle, [Room()], scenario)


def test_a_batch_that_runs_when_the_successor_takes_over_is_answered(tiny_bundle: Any) -> None:
    async def scenario(host: ModelHost, events: list[Any]) -> None:
        old = host.instance.worker
        host.instance.recycling.ask("max_rss_bytes")
        running = [asyncio.create_task(ask(host, number)) for number in range(1, 9)]
        while host.instance.worker is old:
            running.append(asyncio.create_task(ask(host, len(running) + 1)))
            await asyncio.sleep(0.005)
        assert set(await asyncio.gather(*running)) == {200}
        await ask_until(host, lambda: old.pid is None)
        assert [kind for kind, _ in events] == ["worker_recycled"]

    with_host(tiny_bundle, [Room()], scenario, slowdown=30.0)


def test_a_model_that_is_stopped_while_its_worker_is_replaced_leaves_none(tiny_bundle: Any) -> None:
    for handed_over in (False, True):

        async def scenario(host: ModelHost, events: list[Any], handed_over: bool = handed_over) -> None:
            old = host.instance.worker
            host.instance.recycling.ask("max_rss_bytes")
            asking = [asyncio.create_task(ask(host, number)) for number in range(1, 30)]
            while handed_over and host.instance.worker is old:  # the old one's last batch isn't answered yet
                asking.append(asyncio.create_task(ask(host, len(asking) + 1)))
                await asyncio.sleep(0.005)
            await host.stop()
            told = set(await asyncio.gather(*asking))
            assert told <= {200, 503} and (200 in told or not handed_over)

        with_host(tiny_bundle, [Room()], scenario, slowdown=30.0)
        assert not children()


def children() -> list[str]:
    """Processes of ours that run a worker."""
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    return [
        pid for pid in task.read_text().split() if b"device_agent.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
