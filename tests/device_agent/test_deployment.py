"""Loads, unloads, new bundles and bad ones in any order, under requests: who asks is answered, no worker is left."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_worker import REPORT, Batches, infer

from aios_edge.bundle.read import open_bundle
from aios_edge.errors import BundleRefused, RequestError, RuntimeUnavailable
from aios_edge.profile_files import load_profile
from device_agent import wire
from device_agent.answer import Energy
from device_agent.cloud import CloudPool
from device_agent.deployment import Deployment
from device_agent.policy_in_force import PolicyInForce
from device_agent.probation import LEAST_ERRORS
from device_agent.rehearsal import rehearsal_batch
from device_agent.settings import BundleEntry, Device, Policy, Settings
from device_agent.surroundings import Surroundings
from device_agent.values import ActivationReport, InferenceRequest
from device_agent.worker_pool import BatchResult, WorkerSpec

HELD_BYTES = 100
Scenario = Callable[["Place"], Awaitable[None]]


class Worker(Batches):
    """Stands for the handle of a worker; answers with the id of the bundle it was started with."""

    alive: set[Worker] = set()  # noqa: RUF012 - emptied by each device
    bad: set[str] = set()  # noqa: RUF012 - bundles whose live requests fail
    refused: set[str] = set()  # noqa: RUF012 - bundles that don't pass their activation
    before: Callable[[str, WorkerSpec], None]  # told of each that starts or ends

    def __init__(self, spec: WorkerSpec, **_: Any) -> None:
        self.generation = 0
        self.spec, self.ready, self.report, self.rss_bytes, self.pid = spec, False, None, None, None

    async def start(self, check: str = "full", timeout_s: float = 600.0) -> ActivationReport:
        await asyncio.sleep(0)
        self.before("start", self.spec)
        bundle_id = open_bundle(self.spec.bundle_path, verify=False).bundle_id
        if bundle_id != self.spec.bundle_id:
            raise BundleRefused("replaced", "another bundle took its place")
        if bundle_id in self.refused:
            raise BundleRefused("golden", "it answers otherwise")
        self.ready, self.rss_bytes = True, HELD_BYTES
        self.alive.add(self)
        return msgspec.structs.replace(REPORT, bundle_id=bundle_id)

    async def run(self, requests: Sequence[InferenceRequest]) -> BatchResult:
        await asyncio.sleep(0.001)
        assert self in self.alive, "nobody is sent to a worker that ended"
        failed = self.spec.bundle_id in self.bad and requests[0].request_id > 0  # a rehearsal's are negative
        payload = str(self.spec.bundle_id).encode()
        items = tuple(
            wire.DoneItem(
                request_id=each.request_id,
                status=500 if failed else 200,
                outputs=wire.Region(0, len(payload)),
                length=5,
            )
            for each in requests
        )
        done = wire.Done(batch_id=1, generation=1, busy_s=0.01, rss_bytes=1, items=items)
        return BatchResult(done=done, payload=memoryview(payload))

    async def stop(self, grace_s: float = 5.0) -> None:
        self.before("stop", self.spec)
        self.ready = False
        self.alive.discard(self)

    def kill(self) -> None:
        self.ready = False
        self.alive.discard(self)

    def successor(self, spec: WorkerSpec | None = None, on_lost: Any = None) -> Worker:
        return Worker(spec or self.spec)


class Place:
    """A deployment of one bundle, whose path is a link to one of several, and of others."""

    def __init__(self, folder: Path, bundles: Sequence[Any], *others: BundleEntry, policy: Policy) -> None:
        self.bundles, self.path = bundles, folder / "bundle"
        self.events: list[str] = []
        self.point_to(0)
        given_settings = Settings(
            device=Device(id="d", profile="x86-gateway", state_dir=folder / "state"),
            bundle=(BundleEntry(path=self.path, never_leave_device=True), *others),
            policy=policy,
        )
        around = Surroundings(
            rules=PolicyInForce(policy),
            cloud=CloudPool((), policy, lambda kind, **detail: None),
            emit=lambda kind, **detail: self.events.append(kind),
            energy=lambda compute_s, size: Energy(energy_j=None, method="unknown"),
        )
        self.settings = given_settings
        self.deployment = Deployment(given_settings, load_profile("x86-gateway"), around)
        self._numbers = iter(range(1, 10_000))

    def point_to(self, number: int) -> None:
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(self.bundles[number].path)

    def reload(self, **changes: Any) -> None:
        """Its bundles are to be so from now on."""
        entries = tuple(msgspec.structs.replace(entry, **changes) for entry in self.settings.bundle)
        self.settings = msgspec.structs.replace(self.settings, bundle=entries)
        self.deployment.follow(self.settings)

    @property
    def serving(self) -> str | None:
        host = self.deployment.hosts.get("tiny")
        return host.bundle.bundle_id if host else None

    async def ask(self, model: str = "tiny") -> tuple[int, str]:
        """The status and the bundle that answered."""
        (made,) = rehearsal_batch(model, (4,), pair=False, now=0.0)
        request = msgspec.structs.replace(made, request_id=next(self._numbers), local_only=False)
        try:
            host = self.deployment.host(model, None)
        except RequestError as error:
            return error.http_status, ""
        answer = await infer(host, request)
        assert answer.status != 200 or answer.outputs.decode() == host.bundle.bundle_id, "each by the one it went to"
        return answer.status, host.bundle.bundle_id


@pytest.fixture(scope="module")
def bundles(make_bundle: Any) -> list[Any]:
    return [make_bundle(version=f"1.{number}.0") for number in range(3)]


def drive(
    bundles: Sequence[Any],
    scenario: Scenario,
    *others: BundleEntry,
    policy: Policy | None = None,
    before: Callable[[Place, str, WorkerSpec], None] = lambda device, what, spec: None,
) -> None:
    """``before``: what happens while a worker starts or stops."""

    async def main(folder: Path) -> None:
        Worker.alive.clear(), Worker.bad.clear(), Worker.refused.clear()
        device = Place(folder, bundles, *others, policy=policy or Policy())
        Worker.before = staticmethod(partial(before, device))  # type: ignore[assignment]
        await device.deployment.activate_all()
        try:
            await asyncio.wait_for(scenario(device), 20)
        finally:
            await device.deployment.stop()
        assert not Worker.alive

    folder = Path(tempfile.mkdtemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("device_agent.model_instance.WorkerHandle", Worker)
        try:
            asyncio.run(main(folder))
        finally:
            shutil.rmtree(folder)


STEPS = st.lists(
    st.sampled_from(("ask", "ask", "point 1", "point 2", "load", "load", "unload", "bad", "refused", "wait")),
    max_size=16,
)


@settings(max_examples=20, deadline=None)
@given(steps=STEPS)
def test_whatever_comes_who_asks_is_answered_and_no_worker_is_left(bundles: list[Any], steps: list[str]) -> None:
    async def scenario(device: Place) -> None:
        asked: list[asyncio.Task[tuple[int, str]]] = []
        changes: list[asyncio.Task[None]] = []
        for step in steps:
            match step.split():
                case ["ask"]:
                    asked += [asyncio.create_task(device.ask()) for _ in range(LEAST_ERRORS)]
                case ["point", number]:
                    device.point_to(int(number))
                case ["load"]:
                    changes.append(asyncio.create_task(device.deployment.load("tiny")))
                case ["unload"]:
                    changes.append(asyncio.create_task(device.deployment.unload("tiny")))
                case ["bad"]:
                    Worker.bad.add(bundles[1].bundle_id)
                case ["refused"]:
                    Worker.refused.add(bundles[2].bundle_id)
                case ["wait"]:
                    await asyncio.gather(*changes, return_exceptions=True)
            await asyncio.sleep(0)
        answers = await asyncio.gather(*asked)
        for error in await asyncio.gather(*changes, return_exceptions=True):
            assert error is None or isinstance(error, BundleRefused), error
        for status, bundle_id in answers:
            # Unloaded; or loaded anew, and its worker is starting.
            allowed = {200} | ({404, 503} if "unload" in steps else set())
            assert status in allowed | ({500} if bundle_id in Worker.bad else set())
        async with device.deployment._turn:  # a roll-back may be under way
            live = [host for host in device.deployment.hosts.values() if host.state == "ready"]
            assert len(Worker.alive) == len(live) <= 1
            assert [*device.deployment.hosts] == ["tiny"] * len(live)
            assert len(live) + len(device.deployment.unloaded) + len(device.deployment.refused) == 1

    drive(bundles, scenario)


async def until_back(device: Place, number: int) -> None:
    while device.serving != device.bundles[number].bundle_id:
        await device.ask()
        await asyncio.sleep(0.001)


def test_a_bundle_unloaded_or_swapped_on_probation_does_not_come_back(bundles: list[Any]) -> None:
    async def scenario(device: Place) -> None:
        Worker.bad.add(bundles[1].bundle_id)
        device.point_to(1)
        await device.deployment.load("tiny")
        asked = [asyncio.create_task(device.ask()) for _ in range(3 * LEAST_ERRORS)]
        await asyncio.sleep(0)
        await device.deployment.unload("tiny")
        assert [status for status, _ in await asyncio.gather(*asked)] == [500] * (3 * LEAST_ERRORS)
        assert device.serving is None and "rolled_back" not in device.events

        await device.deployment.load("tiny")
        assert not device.deployment.probations, "there is nothing to go back to"
        device.point_to(2)
        await device.deployment.load("tiny")
        assert device.deployment.probations["tiny"].previous.bundle.bundle_id == bundles[1].bundle_id

    drive(bundles, scenario)


def test_the_previous_bundle_comes_back_from_its_copy_and_may_be_swapped_again(bundles: list[Any]) -> None:
    async def scenario(device: Place) -> None:
        Worker.bad.add(bundles[1].bundle_id)
        device.point_to(1)
        await device.deployment.load("tiny")
        await until_back(device, 0)
        assert (await device.ask())[0] == 200
        device.point_to(2)
        await device.deployment.load("tiny")
        assert device.serving == bundles[2].bundle_id and device.events.count("swapped") == 2
        assert device.deployment.host("tiny", None).never_leaves, "whichever bundle it is"

    drive(bundles, scenario)


def test_where_the_previous_bundle_does_not_come_back_the_new_one_serves_on(bundles: list[Any]) -> None:
    async def scenario(device: Place) -> None:
        Worker.bad.add(bundles[1].bundle_id)
        Worker.refused.add(bundles[0].bundle_id)
        device.point_to(1)
        await device.deployment.load("tiny")
        while "roll_back_failed" not in device.events:
            await device.ask()
        assert device.serving == bundles[1].bundle_id and not device.deployment.probations
        Worker.bad.clear()
        assert (await device.ask())[0] == 200

    drive(bundles, scenario)


def test_a_load_brings_the_model_it_names_and_no_other(bundles: list[Any], make_bundle: Any) -> None:
    other = make_bundle(name="other")

    async def scenario(device: Place) -> None:
        await device.deployment.unload("tiny")
        device.bundles = [*bundles, other]
        device.point_to(len(bundles))
        with pytest.raises(BundleRefused, match="is named 'other' now, not 'tiny'"):
            await device.deployment.load("tiny")
        assert not device.deployment.hosts
        await device.deployment.load("other")
        assert [*device.deployment.hosts] == ["other"]
        await device.deployment.unload("other")
        device.point_to(1)
        await device.deployment.load("tiny")
        assert device.serving == bundles[1].bundle_id

    drive(bundles, scenario)


def test_a_name_that_never_leaves_stays_under_another_entry_too(bundles: list[Any]) -> None:
    async def scenario(device: Place) -> None:
        assert device.serving == bundles[0].bundle_id and len(device.deployment.refused) == 1
        await device.deployment.unload("tiny")
        await device.deployment.load("tiny")
        assert device.serving == bundles[0].bundle_id, "not the one that was refused for its name"
        await device.deployment.unload("tiny")
        Worker.refused.add(bundles[0].bundle_id)
        with pytest.raises(BundleRefused):
            await device.deployment.load("tiny")
        await device.deployment.load("tiny")
        assert device.serving == bundles[1].bundle_id
        assert device.deployment.host("tiny", None).never_leaves

    drive(bundles, scenario, BundleEntry(path=bundles[1].path))


def test_an_agent_that_stops_begins_no_change(bundles: list[Any]) -> None:
    async def scenario(device: Place) -> None:
        device.point_to(1)
        loading = asyncio.create_task(device.deployment.load("tiny"))
        await asyncio.sleep(0)
        device.deployment.give_up_changes()
        for change in (loading, device.deployment.unload("tiny")):
            with pytest.raises(RuntimeUnavailable, match="the agent is stopping"):
                await change
        assert device.serving == bundles[0].bundle_id and (await device.ask())[0] == 200

    drive(bundles, scenario)


async def settled(device: Place) -> None:
    """Once whatever was begun is over."""
    while device.deployment._changes:
        await asyncio.gather(*device.deployment._changes)


@pytest.mark.parametrize("moment", ["start", "stop"])
@pytest.mark.parametrize("serves", [True, False])
def test_a_reload_while_a_bundle_comes_or_goes_leaves_it_in_one_place(
    bundles: list[Any], moment: str, serves: bool
) -> None:
    reloads: list[int] = []

    def before(device: Place, what: str, spec: WorkerSpec) -> None:
        if reloads and what == moment:
            device.reload(workers=reloads.pop())

    async def scenario(device: Place) -> None:
        if moment == "stop":
            reloads.append(2)
        await device.deployment.unload("tiny")
        if moment == "start":
            reloads.append(2)
        if not serves:
            Worker.refused.add(bundles[0].bundle_id)
            with pytest.raises(BundleRefused):
                await device.deployment.load("tiny")
        else:
            await device.deployment.load("tiny")
        await settled(device)
        assert not reloads
        states = [status.state for status in (*device.deployment.refused, *device.deployment.unloaded)]
        assert states == ([] if serves else ["refused"]) and device.deployment.degraded == (not serves)
        assert [len(host.instance.places) for host in device.deployment.hosts.values()] == [2] * serves

    drive(bundles, scenario, before=before)


def test_a_reload_during_the_start_holds_for_the_bundles_that_are_still_to_come(
    bundles: list[Any], others: list[Path]
) -> None:
    reloads = [2]

    def before(device: Place, what: str, spec: WorkerSpec) -> None:
        if reloads:
            device.reload(workers=reloads.pop())

    async def scenario(device: Place) -> None:
        await settled(device)
        sizes = {name: len(host.instance.places) for name, host in device.deployment.hosts.items()}
        assert sizes == {"tiny": 2, "second": 2, "third": 2}
        assert all(entry.workers == 2 for entry in device.deployment.entries.values())

    drive(bundles, scenario, *[BundleEntry(path=path) for path in others], before=before)


TURNS = st.lists(
    st.sampled_from(("tiny", "second", "third", "all", "all", "look", "unload third", "load third", "load tiny")),
    max_size=14,
)


@settings(max_examples=25, deadline=None)
@given(turns=TURNS)
def test_models_that_do_not_all_fit_come_and_go_within_the_budget_and_everyone_is_answered(
    bundles: list[Any], others: list[Path], turns: list[str]
) -> None:
    async def scenario(device: Place) -> None:
        deployment, here = device.deployment, {"tiny", "second", "third"}
        for turn in turns:
            what, _, model = turn.partition(" ")
            if what == "look":
                await deployment._upkeep.keep_budget()
            elif what == "unload":
                await deployment.unload(model)
                here.discard(model)
            elif what == "load":
                await deployment.load(model)
                here.add(model)
                assert deployment.hosts[model].state == "ready"
            else:
                asked = ["tiny", "second", "third", "tiny"] if what == "all" else [what]
                answers = await asyncio.gather(*map(device.ask, asked))
                assert [status for status, _ in answers] == [200 if name in here else 404 for name in asked]
            assert len(Worker.alive) <= 2, "as many as the budget holds"
            assert deployment.hosts["second"].state == "ready", "it is pinned"
            assert deployment.ready and set(deployment.hosts) == here

    entries = [BundleEntry(path=path, pinned=path.name == "second") for path in others]
    drive(bundles, scenario, *entries, policy=Policy(memory_budget_bytes=2 * HELD_BYTES))


def test_a_bundle_on_trial_counts_in_the_memory_budget(bundles: list[Any], others: list[Path]) -> None:
    async def scenario(device: Place) -> None:
        deployment = device.deployment
        await deployment._upkeep.keep_budget()
        assert [host.state for host in deployment.hosts.values()] == ["ready"] * 3, "three fit"
        device.point_to(1)
        await deployment.load("tiny")
        assert deployment.trials, "a fourth is here"
        await device.ask("third")
        await deployment._upkeep.keep_budget()
        assert {name: host.state for name, host in deployment.hosts.items()} == {
            "tiny": "ready",  # used before all others, but on trial
            "second": "resting",
            "third": "ready",
        }
        assert deployment.trials["tiny"].successor.instance.ready

    policy = Policy(memory_budget_bytes=3 * HELD_BYTES, canary_share=0.01, trial_s=600.0)
    drive(bundles, scenario, *[BundleEntry(path=path) for path in others], policy=policy)


@pytest.fixture(scope="module")
def others(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("others")
    return [make_bundle(root / name, name=name).path for name in ("second", "third")]
