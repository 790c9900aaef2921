"""The grader: turns answers into rewards over HTTP, in the shapes of OpenAI's grader API.

`POST /v1/graders/run` grades one answer (`model_sample`, `item`) or a batch (`items`), `/v1/graders/validate`
checks a configuration; both also answer under OpenAI's own path `/v1/fine_tuning/alpha/graders/…`. What is
not graded by the deadline, and whatever a grader cannot judge, is an abstention: reward null, never 0.
"""

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import ray.serve

from cluster import metrics
from cluster.database import connect
from cluster.errors import InputError, UnavailableError
from cluster.logs import configure_logging
from cluster.metrics_files import publish_metrics
from cluster.settings import Settings
from cluster.settings.engines import GraderSettings
from data.feedback import pseudonym_secret
from data.grading.types import Grader, GradeResult
from serve.abstentions import AbstentionAlerts
from serve.asgi import HttpApplication, require_method, send_json
from serve.grading import Grading, Spend, asks_judges
from serve.judged import JudgedAnswers
from serve.keys import Key
from serve.known_keys import KnownKeys
from serve.online_grading import OnlineGrading
from serve.openai import ApiError, Receive, Scope, Send, parse_object, read_body
from serve.places import SPARE_REQUESTS, Places

log = logging.getLogger(__name__)

Json = dict[str, Any]
SCOPE = "grade"
ACTIONS = ("run", "validate")
PREFIXES = ("/v1/graders/", "/v1/fine_tuning/alpha/graders/")
ERRORS: dict[str, Any] = {
    "formula_parse_error": False,
    "sample_parse_error": False,
    "truncated_observation_error": False,
    "unresponsive_reward_error": False,
    "invalid_variable_error": False,
    "other_error": False,
    "python_grader_server_error": False,
    "python_grader_server_error_type": None,
    "python_grader_runtime_error": False,
    "python_grader_runtime_error_details": None,
    "model_grader_server_error": False,
    "model_grader_refusal_error": False,
    "model_grader_parse_error": False,
    "model_grader_server_error_details": None,
}
"""OpenAI's error flags of one grade, none of them raised."""


class GraderApi(HttpApplication):
    """The ASGI callable."""

    def __init__(
        self,
        settings: GraderSettings,
        keys: KnownKeys,
        judged: JudgedAnswers | None = None,
        online: OnlineGrading | None = None,
        alerts: AbstentionAlerts | None = None,
    ) -> None:
        self._settings, self._keys = settings, keys
        self.grading = Grading(settings, judged)
        self.online, self._alerts = online, alerts
        self._places = Places(settings.max_queued, settings.retry_after_s)
        self.waiting = 0
        """Answers that are being graded."""
        self.abstained = 0

    async def respond(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if path == "/metrics":
            await self._keys.send_metrics(scope, send)
        else:
            await send_json(send, await self._answer(path, scope, receive))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The processes that grade, and the sampling of live traffic."""
        await self.grading.start()
        if self.online is not None:
            self.online.start(self.grading)
        if self._alerts is not None:
            self._alerts.start(self.grading.abstentions)
        yield
        if self._alerts is not None:
            await self._alerts.close()
        if self.online is not None:
            await self.online.close()
        await self.grading.close()
        self._keys.close()

    async def _answer(self, path: str, scope: Scope, receive: Receive) -> Json:
        if path == "/healthz":
            replaced = self.grading.pool.replaced
            return {"status": "ok", "waiting": self.waiting, "replaced": replaced, "abstained": self.abstained}
        action = next((path.removeprefix(p) for p in PREFIXES if path.startswith(p)), None)
        if action not in ACTIONS:
            raise ApiError(404, f"There is no {path} here; known is {PREFIXES[0]}run and validate.", code="not_found")
        require_method(scope, path, "POST")
        key = await self._keys.admit(scope, SCOPE)
        with self._places.one():
            return await self._graded(action, scope, receive, key)

    async def _graded(self, action: str, scope: Scope, receive: Receive, key: Key) -> Json:
        limit, timeout_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        document = parse_object(await read_body(scope, receive, limit, timeout_s))
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s  # however long a client takes to ask
        grader = document.get("grader")
        if not isinstance(grader, dict):
            raise ApiError(400, "grader must be an object with a type.", param="grader", code="invalid_value")
        _require_plain(grader, "grader")
        return await (self._validate(grader) if action == "validate" else self._run(grader, document, deadline, key))

    async def _validate(self, config: Json) -> Json:
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s
        grader = await self._grader(config, deadline)
        return {"grader": config, "name": grader.name, "version": grader.version}

    async def _run(self, config: Json, document: Json, deadline: float, key: Key) -> Json:
        batch = "items" in document
        entries = document["items"] if batch else [document]
        if not isinstance(entries, list) or not 0 < len(entries) <= self._settings.max_batch:
            message = f"items must be a list of 1 to {self._settings.max_batch} answers."
            raise ApiError(400, message, param="items", code="invalid_value")
        tasks = [_task(entry, f"items.{i}." if batch else "") for i, entry in enumerate(entries)]
        if self.waiting + len(tasks) > self._settings.max_queued:
            raise self._busy("Too many answers wait to be graded.", 429)
        grader = await self._grader(config, deadline)
        if asks_judges(grader):
            self._keys.limits.require_budget(key)
        results = await self._grade_all(grader, tasks, deadline, functools.partial(self._keys.limits.spend, key))
        grades = [_grade_document(config, grader.name, result, seconds) for result, seconds in results]
        return {"object": "list", "data": grades} if batch else grades[0]

    async def _grader(self, config: Json, deadline: float) -> Grader:
        try:
            async with asyncio.timeout_at(deadline):
                return await self.grading.grader(config)
        except InputError as error:
            raise ApiError(400, str(error), param=error.field, code="invalid_grader") from None
        except (TimeoutError, UnavailableError):
            raise self._busy("The grader could not be made in time.", 503) from None

    async def _grade_all(
        self, grader: Grader, tasks: Sequence[tuple[Json, Json]], deadline: float, spend: Spend
    ) -> list[tuple[GradeResult, float]]:
        """Each task's grade and seconds, in order; equal tasks are graded once."""
        groups: dict[bytes, list[int]] = {}
        for place, task in enumerate(tasks):
            groups.setdefault(orjson.dumps(task, option=orjson.OPT_SORT_KEYS), []).append(place)
        self.waiting += len(tasks)
        metrics.GRADES_WAITING.set(self.waiting)
        try:
            async with asyncio.TaskGroup() as group:
                grades = [
                    group.create_task(self._timed(grader, tasks[places[0]], deadline, spend))
                    for places in groups.values()
                ]
        finally:
            self.waiting -= len(tasks)
            metrics.GRADES_WAITING.set(self.waiting)
        graded = {
            place: grade.result() for places, grade in zip(groups.values(), grades, strict=True) for place in places
        }
        self.abstained += sum(result.reward is None for result, _ in graded.values())
        return [graded[place] for place in range(len(tasks))]

    async def _timed(
        self, grader: Grader, task: tuple[Json, Json], deadline: float, spend: Spend
    ) -> tuple[GradeResult, float]:
        began = time.perf_counter()
        result = await self.grading.grade(grader, *task, deadline, spend)
        return result, time.perf_counter() - began

    def _busy(self, message: str, status: int) -> ApiError:
        return ApiError(status, message, code="grader_overloaded", retry_after_s=self._settings.retry_after_s)


def _task(entry: Any, where: str) -> tuple[Json, Json]:
    """Item and sample of one answer: `sample` from `model_sample`, with its JSON where it is JSON.

    Raises:
        ApiError: 400 with the name of the field.
    """
    if not isinstance(entry, dict):
        raise ApiError(400, "must be an object", param=where.rstrip("."), code="invalid_value")
    item, text = entry.get("item") or {}, entry.get("model_sample")
    if not isinstance(text, str):
        raise ApiError(400, "model_sample must be a text.", param=f"{where}model_sample", code="invalid_value")
    if not isinstance(item, dict):
        raise ApiError(400, "item must be an object.", param=f"{where}item", code="invalid_value")
    sample: Json = {"output_text": text}
    with contextlib.suppress(ValueError, RecursionError, orjson.JSONEncodeError):
        document = json.loads(text, parse_constant=_no_constant)
        orjson.dumps(document)  # what cannot be passed on, a number of 30 digits for one, is a text alone
        sample["output_json"] = document
    if isinstance(entry.get("output_tools"), list):
        sample["output_tools"] = entry["output_tools"]
        _require_plain(sample["output_tools"], f"{where}output_tools")
    _require_plain(item, f"{where}item")
    return item, sample


def _require_plain(value: Any, param: str) -> None:
    """Raise `ApiError` 400 for what was read as JSON and cannot be written again."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise ApiError(400, f"{param} cannot be passed on ({error}).", param=param, code="invalid_value") from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _grade_document(config: Json, name: str, result: GradeResult, seconds: float) -> Json:
    raised: Json = {result.error: True} if result.error in ERRORS else {}
    if f"{result.error}_details" in ERRORS:
        raised[f"{result.error}_details"] = result.reason
    metadata = {
        "name": name,
        "type": config.get("type"),
        "errors": ERRORS | raised,
        "execution_time": seconds,
        "scores": result.score_card,
        "token_usage": None,
        "sampled_model_name": config.get("model"),
        "grader_version": result.grader_version,
        "abstained": result.reward is None,
        "reason": result.reason,
    }
    return {
        "reward": result.reward,
        "metadata": metadata,
        "sub_rewards": result.score_card,
        "model_grader_token_usage_per_model": {},
    }


@ray.serve.deployment(name="Grader")
@ray.serve.ingress()
class GraderReplica:
    """One replica of the grader."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.logging)
        publish_metrics(settings.metrics)
        self._settings = settings

    async def __serve_build_asgi_app__(self) -> GraderApi:
        """The application of this replica."""
        settings, grader = self._settings, self._settings.grader
        judged = online = alerts = None
        try:
            database = await asyncio.to_thread(connect, settings)
            judged = JudgedAnswers(database, pseudonym_secret(settings), grader.judged_days)
            online, alerts = OnlineGrading(settings, database), AbstentionAlerts(settings, database)
        except UnavailableError as error:
            log.warning("judges' grades are not kept and live traffic is not sampled: %s", error)
        keys = KnownKeys(settings, grader.keys_refresh_s, grader.replicas)
        return GraderApi(grader, keys, judged, online, alerts)


def build(settings: Settings) -> Any:
    """The application, at `/grader`."""
    deployment: Any = GraderReplica  # the decorator made a deployment of the class
    return deployment.options(
        num_replicas=settings.grader.replicas,
        max_ongoing_requests=settings.grader.max_queued + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": settings.grader.cpus},
        graceful_shutdown_wait_loop_s=0.2,
    ).bind(settings)
