"""The cloud: any Open Inference Protocol v2 server over HTTP(S). Nothing here decides; the router does.

An endpoint is usable for a model once its metadata was seen to fit ours (names, datatypes, and label order where the
server tells it) and while its breaker allows. It is checked in the background, at start and with back-off after
failures, so that no request is spent on finding out; a device that starts offline simply has no cloud yet.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

import msgspec

from aios_edge.errors import AiosEdgeError, RemoteError, RequestError
from aios_edge.oip.envelope import JSON_LENGTH_HEADER, parse_json_length, rewrite_request, rewrite_response
from device_agent.answer import Answer
from device_agent.breaker import Breaker, BreakerRule
from device_agent.cloud_fit import ModelShape, misfit, takes_natural
from device_agent.http1 import HttpClient, Response
from device_agent.payload_audit import PayloadAudit
from device_agent.round_trip import RoundTrip
from device_agent.router import There
from device_agent.settings import CloudEndpoint, Policy, read_secret
from device_agent.status import CloudModelStatus, CloudStatus
from device_agent.values import Cloud, InferenceRequest

log = logging.getLogger("device_agent.cloud")

CHECK_TIMEOUT_S = 3.0
RECHECK_MISFIT_S = 60.0  # someone may have repaired the server
_PASSED_ON = (400, 413, 422)  # the request itself is at fault: the client hears it, the endpoint is fine
#: Parameters of every answer of ours that a server of another make doesn't give.
_UNTOLD = dict.fromkeys(("queue_us", "compute_us", "batch_size", "energy_j", "energy_method"))

Emit = Callable[..., None]


@dataclass
class _Model:
    """What is known of one of our models at one endpoint."""

    remote: str  # name[:version] there
    path: str
    shape: ModelShape
    usable: bool = False
    natural: bool = False  # whether it takes the task's natural input
    reason: str | None = "not checked yet"
    round_trip: RoundTrip = field(default_factory=RoundTrip)


class Endpoint:
    """One ``[[cloud]]``: its connections, breaker, and what it knows of our models."""

    def __init__(
        self,
        settings: CloudEndpoint,
        policy: Policy,
        emit: Emit,
        clock: Callable[[], float],
        audit: PayloadAudit,
    ) -> None:
        self.name = settings.name
        self.url = settings.url
        self.models: dict[str, _Model] = {}
        self.breaker = Breaker(
            rule=BreakerRule(
                failures=policy.breaker_failures,
                backoff_s=policy.breaker_backoff_s,
                backoff_max_s=policy.breaker_backoff_max_s,
            )
        )
        self._settings = settings
        self._emit = emit
        self._clock = clock
        self._audit = audit
        self._client = HttpClient(settings.url, ca=str(settings.ca) if settings.ca else None)
        self._headers: dict[str, str] = {}
        if settings.bearer_file:
            self._headers["Authorization"] = f"Bearer {read_secret(settings.bearer_file)}"
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def add(self, shape: ModelShape) -> None:
        """A model of ours that may go there, under the name of the model map. What is known of it stays, where only its
        version is new."""
        known = self.models.get(shape.name)
        if known is not None and msgspec.structs.replace(known.shape, version=shape.version) == shape:
            known.shape = shape
            return
        remote = self._settings.model_map.get(shape.name, shape.name)
        name, _, version = remote.partition(":")
        path = f"/v2/models/{quote(name, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
        self.models[shape.name] = _Model(remote=remote, path=path, shape=shape)
        self._wake.set()

    def maps(self, model: str) -> bool:
        """Whether the model map names it."""
        return model in self._settings.model_map

    def start(self) -> None:
        """Check in the background, from now on."""
        self._task = asyncio.get_running_loop().create_task(self._watch(), name=f"cloud-{self.name}")

    async def stop(self) -> None:
        """Stop checking and close idle connections."""
        while self._task and not self._task.done():  # wait_for before Python 3.12 may swallow a cancellation
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=1.0)
        self._client.close()

    def status(self, now: float) -> CloudStatus:
        """What ``/status`` shows."""
        models: dict[str, CloudModelStatus] = {}
        for name, model in self.models.items():
            known = model.round_trip.measured
            expected_s, safe_s = model.round_trip.predict(now) if known else (None, None)
            models[name] = CloudModelStatus(
                remote=model.remote, usable=model.usable, reason=model.reason, expected_s=expected_s, safe_s=safe_s
            )
        return CloudStatus(url=self.url, breaker=self.breaker.state, models=models)

    def offer(self, model: str, now: float, *, natural: bool) -> There | None:
        """What the router may count on; None while the endpoint can't be used for this model and kind of input."""
        known = self.models.get(model)
        if known is None or not known.usable or not self.breaker.allows() or (natural and not known.natural):
            return None
        expected_s, safe_s = known.round_trip.predict(now)
        return There(endpoint=self.name, expected_s=expected_s, safe_s=safe_s)

    async def infer(self, decision: Cloud, request: InferenceRequest, model: str) -> Answer | None:
        """Send a request there; None when the endpoint failed it (the breaker knows)."""
        known = self.models[model]
        started = self._clock()
        timeout_s = self._settings.timeout_s
        if request.deadline_at is not None:
            timeout_s = min(timeout_s, max(request.deadline_at - started, 0.001))
        body, json_length = rewrite_request(
            request.body,
            request.json_length,
            updates=request.changed_parameters
            | ({} if request.deadline_at is None else {"timeout": max(int(timeout_s * 1e6), 1)}),
            removals=("privacy",),
        )
        headers = {"Content-Type": "application/json", **self._headers}
        if json_length is not None:
            headers = {**headers, "Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(json_length)}
        self.breaker = self.breaker.sent()
        self._audit.left(request)
        try:
            response = await self._client.request(
                "POST", f"{known.path}/infer", headers=headers, body=body, timeout_s=timeout_s
            )
        except asyncio.TimeoutError:
            if timeout_s < self._settings.timeout_s:  # the deadline's: it takes longer than that
                now = self._clock()
                known.round_trip = known.round_trip.observed(now - started, now)
            self._failed(f"no answer within {timeout_s:.3f} s")
            return None
        except RemoteError as error:
            self._failed(error.what)
            return None
        except asyncio.CancelledError:
            self.breaker = self.breaker.abandoned()
            raise
        except Exception as error:  # whatever it is, a half-open breaker must get its one place back
            log.exception("cloud %s: a request failed in an unknown way", self.name)
            self._failed(f"{type(error).__name__}: {error}")
            return None
        if response.status != 200 and response.status not in _PASSED_ON:
            self._failed(f"HTTP {response.status}: {response.body[:200].decode(errors='replace')}")
            return None
        try:
            answer = self._answer(response, decision, known, request)
        except RequestError as error:
            self._failed(f"its answer is not an inference response ({error})")
            return None
        now = self._clock()
        known.round_trip = known.round_trip.observed(now - started, now)
        before = self.breaker.state
        self.breaker = self.breaker.succeeded()
        if before != "closed" and self.breaker.state == "closed":
            self._emit("breaker_closed", endpoint=self.name)
            log.info("cloud %s answers again: breaker closed", self.name)
        return answer

    def _answer(self, response: Response, decision: Cloud, known: _Model, request: InferenceRequest) -> Answer:
        """Their answer under our model's name; raises :class:`RequestError` for nonsense."""
        if response.status != 200:
            error = _error_of(response.body)
            return Answer(status=response.status, route="error", reason=decision.reason, error=error)
        body, json_length = rewrite_response(
            response.body,
            parse_json_length(response.headers.get(JSON_LENGTH_HEADER.lower())),
            model_name=known.shape.name,
            model_version=known.shape.version,
            id=request.client_id,
            defaults=_UNTOLD,
            parameters={"route": "cloud", "reason": decision.reason.value, **request.changed_parameters},
        )
        return Answer(
            status=200, route="cloud", reason=decision.reason, remote_body=body, remote_json_length=json_length
        )

    def _failed(self, why: str) -> None:
        before = self.breaker
        self.breaker = before.failed(self._clock(), random.random())
        log.warning("cloud %s failed: %s", self.name, why)
        if self.breaker.state == "open" and self.breaker is not before:
            if before.state == "closed":
                self._emit("breaker_opened", endpoint=self.name, why=why, failures=before.failures + 1)
                log.warning("cloud %s: breaker open", self.name)
            self._client.close()
            self._wake.set()

    async def _watch(self) -> None:
        """Check what isn't usable yet, and the endpoint itself when its breaker's pause has passed."""
        pause_s = 0.5
        told = False
        while True:
            self._wake.clear()
            unchecked = [model for model in self.models.values() if not model.usable]
            if self.breaker.state == "open" and self.breaker.check_at is not None:
                await asyncio.sleep(max(self.breaker.check_at - self._clock(), 0.0))
                await self._probe()
                continue
            if not unchecked:
                await self._wake.wait()
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
                    self._emit("cloud_unreachable", endpoint=self.name, why=why)
                    log.warning("cloud %s can't be reached: %s; trying again in the background", self.name, why)
                    told = True
                pause_s = min(pause_s * 2, 30.0) if pause_s < RECHECK_MISFIT_S else 1.0
            if any(not model.usable for model in unchecked):
                await _wait(self._wake, pause_s * (0.75 + 0.5 * random.random()))

    async def _probe(self) -> None:
        """The breaker is open and its pause has passed: is anybody there?"""
        try:
            for model in [model for model in self.models.values() if model.usable]:  # the others wait their turn
                await self._check(model)
        except (RemoteError, asyncio.TimeoutError):
            self.breaker = self.breaker.failed(self._clock(), random.random())
            return
        self.breaker = self.breaker.checked()
        self._emit("breaker_half_open", endpoint=self.name)
        log.info("cloud %s is reachable: breaker half-open", self.name)

    async def _check(self, model: _Model) -> None:
        """Fetch the remote model's metadata and compare; raises RemoteError or TimeoutError if there is none."""
        started = self._clock()
        response = await self._client.request("GET", model.path, headers=self._headers, timeout_s=CHECK_TIMEOUT_S)
        took_s = self._clock() - started
        if response.status != 200:
            if response.status < 500:  # somebody is there, but without this model
                model.usable = False
            raise RemoteError(f"HTTP {response.status} for the metadata of {model.remote}", where=self.url)
        reason, model.natural = misfit(model.shape, response.body), takes_natural(model.shape, response.body)
        if reason is None:
            if not model.usable:
                self._emit("cloud_connected", endpoint=self.name, model=model.shape.name, remote=model.remote)
                log.info("cloud %s: %s is usable (%.1f ms away)", self.name, model.remote, took_s * 1e3)
            model.usable, model.reason = True, None
            model.round_trip = model.round_trip.pinged(took_s, self._clock())
            return
        if model.usable or model.reason != reason:
            self._emit("cloud_mismatch", endpoint=self.name, model=model.shape.name, why=reason)
            log.error("cloud %s can't be used for %s: %s", self.name, model.shape.name, reason)
        model.usable, model.reason = False, reason


class CloudPool:
    """All endpoints. With none, every method says so."""

    def __init__(
        self,
        endpoints: tuple[CloudEndpoint, ...],
        policy: Policy,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.audit = PayloadAudit()
        self.endpoints: Mapping[str, Endpoint] = {
            settings.name: Endpoint(settings, policy, emit, clock, self.audit) for settings in endpoints
        }

    def add(self, shape: ModelShape, *, only_mapped: bool = False) -> None:
        """Make a model known to every endpoint; ``only_mapped``: to those whose model map names it."""
        for endpoint in self.endpoints.values():
            if not only_mapped or endpoint.maps(shape.name):
                endpoint.add(shape)

    def start(self) -> None:
        """Start the background checks."""
        for endpoint in self.endpoints.values():
            endpoint.start()

    async def stop(self) -> None:
        """Stop them and close connections."""
        for endpoint in self.endpoints.values():
            await endpoint.stop()

    def best(self, model: str, now: float, *, natural: bool) -> There | None:
        """The endpoint that is predicted to answer soonest, of those that may be used now."""
        offers = [
            offer for endpoint in self.endpoints.values() if (offer := endpoint.offer(model, now, natural=natural))
        ]
        return min(offers, key=lambda offer: offer.safe_s, default=None)

    async def infer(self, decision: Cloud, request: InferenceRequest, model: str) -> Answer | None:
        """Send a request to the endpoint the router chose; None when it failed, or must not leave."""
        if not self.audit.may_leave(request):
            return None
        try:
            return await self.endpoints[decision.endpoint].infer(decision, request, model)
        except AiosEdgeError as error:
            log.warning("cloud %s: %s", decision.endpoint, error)
            return None


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except asyncio.TimeoutError:
        return


def _error_of(body: bytes) -> str:
    try:
        return f"the cloud says: {msgspec.json.decode(body)['error']}"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return "the cloud refused the request"
