"""One ``[[cloud]]``: a server of the Open Inference Protocol v2 over HTTP(S), and what becomes of a request there.

It is usable for a model once its metadata was seen to fit ours (names, datatypes, and label order where the server
tells it) and while its breaker allows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from aios_edge.errors import RemoteError, RequestError
from aios_edge.oip.envelope import JSON_LENGTH_HEADER, Parameters, rewrite_request
from device_agent.answer import Answer
from device_agent.breaker import Breaker, BreakerRule
from device_agent.budget_book import BudgetBook
from device_agent.cloud_account import CloudAccount
from device_agent.cloud_answer import NOT_THERE, PASSED_ON, answered_version, cloud_answer, pause_s
from device_agent.cloud_fit import ModelShape
from device_agent.cloud_health import Emit, Health
from device_agent.cloud_model import CloudModel
from device_agent.cloud_sample import sample_request
from device_agent.cloud_settings import CloudEndpoint
from device_agent.cloud_watch import CHECK_TIMEOUT_S, CloudWatch
from device_agent.compression import gzipped
from device_agent.http1 import MAX_RESPONSE_BYTES, AnswerSize, HttpClient
from device_agent.payload_audit import PayloadAudit
from device_agent.router import There
from device_agent.settings import Policy, read_secret
from device_agent.status import CloudStatus
from device_agent.under_way import UnderWay
from device_agent.values import Cloud, InferenceRequest, Reason

log = logging.getLogger("device_agent.cloud")

ASIDE_BYTES = 256 * 1024  # compressing more takes milliseconds
LEAST_PATIENCE_S = 0.05  # with an endpoint that used to be quicker: a first request on a new connection takes longer
SAMPLE_PAUSE_S = 0.5  # before a sample that was refused is asked again
_AWAY = (502, 503, 504)  # nobody is there for anybody; any other status may be due to what we made up


class _Refused(NamedTuple):
    """By which status a sample was."""

    status: int


class Endpoint:
    """Its connections, breaker, and what it knows of our models."""

    def __init__(
        self,
        settings: CloudEndpoint,
        policy: Policy,
        book: BudgetBook,
        emit: Emit,
        clock: Callable[[], float],
        audit: PayloadAudit,
    ) -> None:
        self.name = settings.name
        self.url = settings.url
        self.weight = settings.weight
        self.hedges = 0  # requests that were sent here because another endpoint took long
        self.models: dict[str, CloudModel] = {}
        self.health = Health(self.name, _rule(policy), emit, clock, self._opened)
        self.account = CloudAccount(settings, book, emit, clock)
        self._settings = settings
        self._clock = clock
        self._audit = audit
        self._compresses = settings.compression == "gzip"
        self._client = HttpClient(
            settings.url, ca=settings.ca, client_cert=settings.client_cert, client_key=settings.client_key
        )
        self._asked_again_at = 0.0  # after a 429
        self._headers: dict[str, str] = {}
        if settings.bearer_file:
            self._headers["Authorization"] = f"Bearer {read_secret(settings.bearer_file)}"
        self.watch = CloudWatch(
            self.name, self._client, self._headers, self.models, self.health, emit, clock, self._answers
        )
        self._failed: CloudModel | None = None  # the one whose request failed last
        self._under_way = UnderWay()
        self._openings = 0  # of the breaker

    @property
    def breaker(self) -> Breaker:
        """Whether it may be asked."""
        return self.health.breaker

    def add(self, shape: ModelShape) -> None:
        """A model of ours that may go there, under the name of the model map. What is known of it stays, where only its
        version is new."""
        known = self.models.get(shape.name)
        if known is not None and msgspec.structs.replace(known.shape, version=shape.version) == shape:
            known.shape = shape
            return
        self.models[shape.name] = CloudModel.at(self._settings.model_map.get(shape.name, shape.name), shape)
        self.watch.wake.set()

    def follow(self, settings: CloudEndpoint, policy: Policy) -> None:
        """Go on with another weight and timeout, and other rules for the breaker."""
        self._settings = settings
        self.weight = settings.weight
        self.health.follow(_rule(policy))

    def maps(self, model: str) -> bool:
        """Whether the model map names it."""
        return model in self._settings.model_map

    async def stop(self) -> None:
        """Stop checking and close idle connections."""
        await self.watch.stop()
        self._client.close()

    def status(self, now: float) -> CloudStatus:
        """What ``/status`` shows."""
        models = {name: model.status(now) for name, model in self.models.items()}
        return CloudStatus(
            url=self.url,
            breaker=self.breaker.state,
            models=models,
            hedges=self.hedges,
            spent=self.account.spent(),
            budgets=self.account.budgets(),
        )

    def offer(self, model: str, now: float, *, natural: bool) -> There | None:
        """What the router may count on, budgets aside; None while the endpoint can't be used for this model and kind of
        input."""
        known = self.models.get(model)
        if known is None or not known.usable or not self.breaker.allows() or (natural and not known.natural):
            return None
        if now < self._asked_again_at:
            return None
        if not self._trusted(now):
            self._failed = known
            self.watch.doubt()
            return None
        expected_s, safe_s = known.round_trip.predict(now)
        return There(endpoint=self.name, expected_s=expected_s, safe_s=safe_s)

    def _trusted(self, now: float) -> bool:
        """Whether one more may be sent: from the first sign of trouble no more than open the breaker."""
        breaker, under_way = self.breaker, self._under_way
        if breaker.failures + len(under_way) < breaker.rule.failures:
            return True
        return not (breaker.failures or under_way.silent(now))

    def p95_s(self, model: str) -> float | None:
        """What nineteen of twenty answers of that model took at most; None while nobody knows."""
        return self.models[model].round_trip.p95_s()

    async def infer(self, decision: Cloud, request: InferenceRequest, model: str) -> Answer | Reason:
        """Send a request there. The answer, or why there is none: ``cloud_failed``, ``budget``, ``cloud_unavailable``
        (others were sent since it was decided, and now the endpoint is in doubt)."""
        known, now = self.models[model], self._clock()
        if not (self.breaker.allows() and self._trusted(now)):  # others were sent since it was decided
            return Reason.CLOUD_UNAVAILABLE
        number, answer = self._under_way.sent(now, known.round_trip.predict(now)[1]), None
        try:
            answer = await self._pay_and_send(decision, request, known)
            return answer
        finally:
            self._under_way.ended(number, answered=isinstance(answer, Answer))

    async def _pay_and_send(self, decision: Cloud, request: InferenceRequest, known: CloudModel) -> Answer | Reason:
        body, headers = self._outgoing(request)
        self.health.sent()
        try:
            if self._compresses:
                body, headers = await _packed(body, headers)
            posting = await self.account.pay(len(body))
        except BaseException:
            self.health.abandoned()
            raise
        if posting is None:
            self.health.abandoned()
            return Reason.BUDGET
        self.hedges += decision.reason is Reason.HEDGED
        try:
            return await self._send(decision, request, known, headers, body, posting.answer)
        finally:
            self.account.settle(posting)

    def _outgoing(self, request: InferenceRequest) -> tuple[bytes, dict[str, str]]:
        """Body and headers: the client's parameters with the time that is left, and our key."""
        left: Parameters = (
            {} if request.deadline_at is None else {"timeout": max(int(self._timeout_s(request) * 1e6), 1)}
        )
        body, json_length = rewrite_request(
            request.body, request.json_length, updates=request.changed_parameters | left, removals=("privacy",)
        )
        if json_length is None:
            return body, {"Content-Type": "application/json", **self._headers}
        binary = {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(json_length)}
        return body, {**binary, **self._headers}

    def _timeout_s(self, request: InferenceRequest) -> float:
        if request.deadline_at is None:
            return self._settings.timeout_s
        return min(self._settings.timeout_s, request.deadline_at - self._clock())

    async def _send(
        self,
        decision: Cloud,
        request: InferenceRequest,
        known: CloudModel,
        headers: dict[str, str],
        body: bytes,
        size: AnswerSize,
    ) -> Answer | Reason:
        openings = self._openings

        def failed(why: str) -> Reason:
            self._failed = known
            if openings == self._openings:  # else it is a straggler, and others have found out since
                self.health.failed(why)
            return Reason.CLOUD_FAILED

        started, timeout_s = self._clock(), self._timeout_s(request)
        if timeout_s <= 0:  # what was spent had to be written down first
            self.health.abandoned()
            return Reason.CLOUD_FAILED
        self._audit.left(request)
        try:
            response = await self._client.request(
                "POST", f"{known.path}/infer", headers=headers, body=body, timeout_s=timeout_s, size=size
            )
        except asyncio.TimeoutError:
            if timeout_s < self._settings.timeout_s:  # the deadline's: it takes longer than that
                now = self._clock()
                known.round_trip = known.round_trip.observed(now - started, now)
            return failed(f"no answer within {timeout_s:.3f} s")
        except RemoteError as error:
            if size.cut_off and size.limit_bytes < MAX_RESPONSE_BYTES:  # it answers, we can't afford to read it
                log.warning("cloud %s: an answer is longer than bytes_per_day has room for", self.name)
                self.health.abandoned()
                return Reason.BUDGET
            return failed(error.what)
        except asyncio.CancelledError:
            now = self._clock()
            if now - started > known.round_trip.predict(now)[0]:  # it would have taken longer still
                known.round_trip = known.round_trip.observed(now - started, now)
            self.health.abandoned()
            raise
        except Exception as error:  # whatever it is, a half-open breaker must get its one place back
            log.exception("cloud %s: a request failed in an unknown way", self.name)
            return failed(f"{type(error).__name__}: {error}")
        if response.status == 415 and "Content-Encoding" in headers:
            log.warning("cloud %s takes no gzip: it is sent bodies as they are, until the next start", self.name)
            self._compresses = False
        if response.status in NOT_THERE:
            log.warning("cloud %s takes no such request now: HTTP %d", self.name, response.status)
            self._asked_again_at = self._clock() + pause_s(response)
            self.health.abandoned()
            return Reason.CLOUD_FAILED
        if response.status != 200 and response.status not in PASSED_ON:
            return failed(f"HTTP {response.status}: {response.body[:200].decode(errors='replace')}")
        try:
            answer = cloud_answer(response, decision.reason, known.shape, request)
        except RequestError as error:
            return failed(f"its answer is not an inference response ({error})")
        now = self._clock()
        known.round_trip = known.round_trip.observed(now - started, now)
        self.health.succeeded()
        if answer.status == 200 and not await self.watch.still_fits(
            known, answered_version(response), self._timeout_s(request)
        ):
            log.warning("cloud %s: an answer isn't used, it is another version's", self.name)
            return Reason.CLOUD_FAILED
        return answer

    async def _answers(self) -> bool | None:
        """Whether it answers a request of our own about the model that failed last, and about as soon as it used to. It
        is paid for as any other; None where that can't be, or none can be made: then a client's has to find out."""
        said = await self._ask_sample()
        if not isinstance(said, _Refused):
            return said
        await asyncio.sleep(SAMPLE_PAUSE_S)  # it may be the sample's own fault: whoever means that says it again
        again = await self._ask_sample()
        return again == said if isinstance(again, _Refused) else again

    async def _ask_sample(self) -> bool | _Refused | None:
        known = self._failed
        if known is None or not known.usable:
            return None
        sample = sample_request(known.shape, self._clock(), natural=known.natural)
        if sample is None or (posting := await self.account.pay(len(sample.body))) is None:
            return None
        headers = {"Content-Type": "application/json", **self._headers}
        started = self._clock()
        _, safe_s = known.round_trip.predict(known.round_trip.seen_at)  # what was learnt, however long ago
        timeout_s = max(CHECK_TIMEOUT_S, min(2 * safe_s, self._settings.timeout_s))
        path, size = f"{known.path}/infer", posting.answer
        number, answered = self._under_way.sent(started, safe_s), False
        try:
            response = await self._client.request(
                "POST", path, headers=headers, body=sample.body, timeout_s=timeout_s, size=size
            )
            if response.status == 200:
                cloud_answer(response, Reason.CLOUD_FAILED, known.shape, sample)
                answered = True
        except asyncio.TimeoutError:
            now = self._clock()
            known.round_trip = known.round_trip.observed(now - started, now)
            return False
        except (RemoteError, RequestError) as error:
            log.info("cloud %s still gives no answers: %s", self.name, error)
            return False
        except Exception:  # without the task that asks, no endpoint ever comes back
            log.exception("cloud %s: a sample failed in an unknown way", self.name)
            return False
        finally:
            self._under_way.ended(number, answered=answered)
            self.account.settle(posting)
        now = self._clock()
        if response.status == 200:  # one that has become slower for good is let in again when that is learnt
            known.round_trip = known.round_trip.observed(now - started, now)
        if response.status in _AWAY or now - started > max(safe_s, LEAST_PATIENCE_S):
            return False
        return response.status == 200 or _Refused(response.status)

    def _opened(self) -> None:
        self._openings += 1
        self._client.close()
        self.watch.wake.set()


def _rule(policy: Policy) -> BreakerRule:
    return BreakerRule(
        failures=policy.breaker_failures,
        backoff_s=policy.breaker_backoff_s,
        backoff_max_s=policy.breaker_backoff_max_s,
    )


async def _packed(body: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    """The body compressed, where that pays; a long one beside the loop, which zlib leaves to others meanwhile."""
    packed = await asyncio.to_thread(gzipped, body) if len(body) > ASIDE_BYTES else gzipped(body)
    return (body, headers) if packed is None else (packed, {**headers, "Content-Encoding": "gzip"})
