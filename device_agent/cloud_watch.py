"""Background checks of one endpoint: of models that aren't usable yet, and of the endpoint when its breaker is open.

So no request is spent on finding out, and a device that starts offline simply has no cloud yet.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping

from aios_edge.errors import RemoteError
from device_agent.background import ended, kept_up
from device_agent.cloud_fit import misfit, takes_natural, versions_of
from device_agent.cloud_health import Emit, Health
from device_agent.cloud_model import CloudModel
from device_agent.http1 import HttpClient

log = logging.getLogger("device_agent.cloud")

CHECK_TIMEOUT_S = 3.0
RECHECK_MISFIT_S = 60.0  # someone may have repaired the server
DOUBT_S = 0.5  # between two samples of one that may have stopped answering
HALF_OPEN_S = 5.0  # so long an endpoint waits for the one request that may try


class CloudWatch:
    """Keeps ``usable`` of the models up to date, from :meth:`start` to :meth:`stop`."""

    def __init__(
        self,
        name: str,
        client: HttpClient,
        headers: Mapping[str, str],
        models: Mapping[str, CloudModel],
        health: Health,
        emit: Emit,
        clock: Callable[[], float],
        answers: Callable[[], Awaitable[bool | None]],
    ) -> None:
        self.wake = asyncio.Event()  # set when there is something to check
        self._name = name
        self._client = client
        self._headers = headers
        self._models = models
        self._health = health
        self._emit = emit
        self._clock = clock
        self._answers = answers  # whether requests are answered there, too; None: unknown
        self._doubted = False
        self._tasks: list[asyncio.Task[None]] = []
        self._rechecks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Check in the background, from now on."""
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(kept_up(step, f"cloud {self._name} could not be checked"), name=f"cloud-{self._name}")
            for step in (self._watch, self._look_again)
        ]

    async def stop(self) -> None:
        """Check no more."""
        for task in self._rechecks.values():
            task.cancel()
        await asyncio.gather(*self._rechecks.values(), return_exceptions=True)
        await ended(*self._tasks)

    def doubt(self) -> None:
        """Find out whether requests are answered: nobody is sent there until somebody was. An endpoint whose breaker
        isn't closed is checked anyway."""
        if not self._doubted and self._health.breaker.state == "closed":
            self._doubted = True
            self.wake.set()

    async def still_fits(self, model: CloudModel, version: str | None, timeout_s: float) -> bool:
        """Whether an answer of that version may be used: whoever swaps the model there may change its tensors, or the
        order of its labels. Asks for the metadata where the version is another one than was checked; many ask once."""
        if model.knows(version):
            return True
        task = self._rechecks.get(model.remote)
        if task is None or task.done():
            log.info("cloud %s: %s answers as version %s; it is checked again", self._name, model.remote, version)
            task = asyncio.get_running_loop().create_task(self._recheck(model), name=f"cloud-recheck-{self._name}")
            self._rechecks[model.remote] = task
        await asyncio.wait((task,), timeout=max(timeout_s, 0.0))
        return task.done() and model.usable and model.knows(version)

    async def _recheck(self, model: CloudModel) -> None:
        try:
            await self._check(model)
        except (RemoteError, asyncio.TimeoutError) as error:
            model.usable = False
            model.reason = f"another version answers, and its metadata can't be had: {error or 'no answer'}"
        if not model.usable:
            self.wake.set()

    async def _watch(self) -> None:
        """Check what isn't usable yet, and the endpoint itself when its breaker's pause has passed."""
        pause_s = 0.5
        told = False
        while True:
            self.wake.clear()
            unchecked = [model for model in self._models.values() if not model.usable]
            breaker = self._health.breaker
            if breaker.state != "closed":
                self._doubted = False  # or the next doubt would wake nobody
            if breaker.state == "open" and breaker.check_at is not None:
                await asyncio.sleep(max(breaker.check_at - self._clock(), 0.0))
                await self._probe()
                continue
            if self._doubted:
                there = await self._answers()
                if there:
                    self._health.succeeded()  # else the failures before it would keep everybody away
                elif there is not None:
                    self._health.failed("a sample of ours got no answer, or a late one")
                await asyncio.sleep(DOUBT_S)
                self._doubted = False
                continue
            if not unchecked:
                await self.wake.wait()
                continue
            why: str | None = None
            for model in unchecked:  # one that is missing there doesn't keep the others away
                try:
                    await self._check(model)
                except (RemoteError, asyncio.TimeoutError) as error:
                    why = error.what if isinstance(error, RemoteError) else f"no answer within {CHECK_TIMEOUT_S:g} s"
                    model.reason = why
            if why is None:
                pause_s, told = RECHECK_MISFIT_S, False
            else:
                if not told:
                    self._emit("cloud_unreachable", endpoint=self._name, why=why)
                    log.warning("cloud %s can't be reached: %s; trying again in the background", self._name, why)
                    told = True
                pause_s = min(pause_s * 2, 30.0) if pause_s < RECHECK_MISFIT_S else 1.0
            if any(not model.usable for model in unchecked):
                await _wait(self.wake, pause_s * (0.75 + 0.5 * random.random()))

    async def _probe(self) -> None:
        """The breaker is open and its pause has passed: is anybody there?"""
        try:
            for model in [model for model in self._models.values() if model.usable]:  # the others wait their turn
                await self._check(model)
            there = await self._answers() is not False
        except (RemoteError, asyncio.TimeoutError):
            there = False
        if there:
            self._health.checked()
        else:
            self._health.check_failed()

    async def _look_again(self) -> None:
        """Nobody was sent to a half-open one since it was checked, maybe because it was slow then: and now?"""
        await asyncio.sleep(HALF_OPEN_S)
        breaker = self._health.breaker
        if breaker.state != "half_open" or breaker.probing:
            return
        try:
            for model in [model for model in self._models.values() if model.usable]:
                await self._check(model)
        except (RemoteError, asyncio.TimeoutError):
            if self._health.breaker.state == "half_open":
                self._health.check_failed()
                self.wake.set()

    async def _check(self, model: CloudModel) -> None:
        """Fetch the remote model's metadata and compare; raises RemoteError or TimeoutError if there is none."""
        started = self._clock()
        response = await self._client.request("GET", model.path, headers=self._headers, timeout_s=CHECK_TIMEOUT_S)
        took_s = self._clock() - started
        if response.status != 200:
            if response.status < 500:  # somebody is there, but without this model
                model.usable = False
            raise RemoteError(f"HTTP {response.status} for the metadata of {model.remote}", where=self._client.url)
        reason, model.natural = misfit(model.shape, response.body), takes_natural(model.shape, response.body)
        model.checked(versions_of(response.body))
        if reason is None:
            if not model.usable:
                self._emit("cloud_connected", endpoint=self._name, model=model.shape.name, remote=model.remote)
                log.info("cloud %s: %s is usable (%.1f ms away)", self._name, model.remote, took_s * 1e3)
            model.usable, model.reason = True, None
            model.round_trip = model.round_trip.pinged(took_s, self._clock())
            return
        if model.usable or model.reason != reason:
            self._emit("cloud_mismatch", endpoint=self._name, model=model.shape.name, why=reason)
            log.error("cloud %s can't be used for %s: %s", self._name, model.shape.name, reason)
        model.usable, model.reason = False, reason


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except asyncio.TimeoutError:
        return
