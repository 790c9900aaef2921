"""Runs one call of a tool: breaker, arguments, idempotency, deadline, size of the result, record, metrics."""

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import orjson
import sqlalchemy as sa
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from cluster import metrics
from cluster.errors import ConflictError, InputError, NotFoundError, RayloopError, UnavailableError
from cluster.settings.tools import ToolSettings
from data.intake.items import Identity
from data.intake.plain import check_plain
from serve.breaker import Breaker, BreakerLimits
from serve.keys import Key
from serve.openai import ApiError
from serve.tools.call import Call
from serve.tools.registry import Caller, Services, Tool
from serve.tools.replies import Owner, Replies

log = logging.getLogger(__name__)

PURGE_EVERY = 100  # writes between two looks for replies that are too old
SHOWN_CHARS = 200  # of why the log would not keep a result


class ResultError(ApiError):
    """The tool did its work, and what it gave cannot be passed on."""


class ToolRunner:
    """The tools of one replica. Belongs to one event loop."""

    def __init__(
        self, tools: Mapping[str, Tool], services: Services, settings: ToolSettings, breaker: BreakerLimits
    ) -> None:
        self.tools, self._services, self._settings = dict(tools), services, settings
        self._breakers = {name: Breaker(breaker) for name in tools}
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="tool")
        self._running: dict[str, int] = dict.fromkeys(tools, 0)
        taken_s = 2 * max([settings.deadline_s, *(t.deadline_s or 0.0 for t in tools.values())])
        self.replies = Replies(services.database, taken_s=taken_s, keep_days=settings.replies_days)
        self._writes = 0
        self._records: set[asyncio.Future[Any]] = set()

    async def close(self) -> None:
        """Let the records of finished calls be written, and stop."""
        await asyncio.gather(*self._records, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, name: str, call: Call, key: Key) -> Any:
        """The result of a call, as JSON.

        Raises:
            ApiError: it was refused, failed, took too long or gave too much.
        """
        found = self._find(name)
        self._require_plain(call.arguments)
        began, result = time.perf_counter(), None
        failure: ApiError | None = ApiError(499, "The caller went away.", code="cancelled")
        try:
            with _in_api_shape():
                arguments = found.parse(call.arguments)
            result = await self._through_breaker(found, call, arguments, key)
            failure = None
            return result
        except ApiError as error:
            failure = error
            raise
        except Exception as error:
            log.exception("a call of tool %s failed", found.name)
            failure = ApiError(500, f"The call of {found.name} failed ({type(error).__name__}).", code="tool_failed")
            raise failure from None
        finally:
            seconds = time.perf_counter() - began
            metrics.TOOL_CALLS.labels(found.name, "ok" if failure is None else failure.code or "failed").inc()
            metrics.TOOL_SECONDS.labels(found.name).observe(seconds)
            self._record(name, call, key, result, failure, seconds)

    def _find(self, name: str) -> Tool:
        found = self.tools.get(name)
        if found is None:
            known = ", ".join(sorted(self.tools))
            raise ApiError(404, f"There is no tool {name!r:.80}; known are {known}.", code="tool_not_found")
        return found

    def _require_plain(self, arguments: Any) -> None:
        """Refuse, before it counts as a call, what the log could not keep."""
        with _in_api_shape():
            check_plain(arguments, "arguments", self._services.settings.intake.max_text_chars)

    async def _through_breaker(self, found: Tool, call: Call, arguments: dict[str, Any], key: Key) -> Any:
        breaker = self._breakers[found.name]
        is_full = self._running[found.name] >= self._settings.max_running
        if is_full or (permit := breaker.allow(time.monotonic())) is None:
            message = f"The tool {found.name} is left alone for a while; try again later."
            raise ApiError(503, message, code="tool_unavailable", retry_after_s=self._settings.retry_after_s)
        try:
            result = await self._written_once(found, call, arguments, key)
        except ApiError as error:
            breaker.record(permit, error.status < 500, time.monotonic())
            raise
        except BaseException:
            breaker.forget(permit)
            raise
        finally:
            metrics.BREAKER_OPEN.labels(f"tool:{found.name}").set(breaker.is_open)
        breaker.record(permit, True, time.monotonic())
        return result

    async def _written_once(self, found: Tool, call: Call, arguments: dict[str, Any], key: Key) -> Any:
        """The result; a write under a known key gives the reply it gave before."""
        caller = Caller(key.tenant, key.workspace, self._services, key.user_tier)
        if not found.writes:
            return await self._bounded(found, caller, arguments)
        idempotency_key = call.idempotency_key or call.call_id
        if not idempotency_key:
            message = f"{found.name} writes: send an Idempotency-Key, so that a retry writes nothing twice."
            raise ApiError(400, message, param="idempotency_key", code="missing_idempotency_key")
        owner = (key.tenant, key.workspace, found.name)
        known = await self._begin(found, owner, idempotency_key, call.arguments)
        if known is not None:
            return _replied(known)
        try:
            result = await self._bounded(found, replace(caller, idempotency_key=idempotency_key), arguments)
        except ResultError as error:  # it was written: a retry is told the same, and writes nothing
            await self._keep(self.replies.finish, owner, idempotency_key, _failed(error))
            raise
        except ApiError as error:
            if error.code != "tool_timeout":  # a write that went on may yet have happened: the key stays taken
                await self._keep(self.replies.release, owner, idempotency_key)
            raise
        await self._keep(self.replies.finish, owner, idempotency_key, {"result": result})
        self._writes += 1
        if self._writes % PURGE_EVERY == 1:
            await self._keep(self.replies.forget_old)
        return result

    async def _begin(self, found: Tool, owner: Owner, key: str, arguments: Any) -> dict[str, Any] | None:
        """Take an idempotency key, or give the reply that it stands for.

        Raises:
            ApiError: it stands for another call, one under way, or nobody can say.
        """
        retry_after_s = self._settings.retry_after_s
        try:
            return await asyncio.to_thread(self.replies.begin, owner, key, arguments)
        except InputError as error:
            raise ApiError(422, str(error), param=error.field, code="idempotency_key_reused") from None
        except ConflictError as error:
            raise ApiError(409, str(error), code="in_progress", retry_after_s=retry_after_s) from None
        except (sa.exc.SQLAlchemyError, UnavailableError) as error:
            log.warning("idempotency keys of %s cannot be read (%s)", found.name, error)
            message = f"The tool {found.name} cannot write now: the database does not answer."
            raise ApiError(503, message, code="tool_unavailable", retry_after_s=retry_after_s) from None

    async def _keep(self, change: Callable[..., Any], *what: Any) -> None:
        """Note what became of a write that is over; the answer does not depend on it."""
        try:
            await asyncio.to_thread(change, *what)
        except (sa.exc.SQLAlchemyError, UnavailableError) as error:
            log.warning("what became of a write was not kept (%s); its key stays taken for a while", error)

    async def _bounded(self, found: Tool, caller: Caller, arguments: dict[str, Any]) -> Any:
        deadline_s = found.deadline_s or self._settings.deadline_s
        self._running[found.name] += 1
        work = asyncio.ensure_future(self._work(found, caller, arguments))
        # A thread cannot be ended: until it ends by itself it counts against `tools.max_running`.
        work.add_done_callback(functools.partial(self._ended, found.name))
        done, _ = await asyncio.wait([work], timeout=deadline_s)
        if not done:
            if inspect.iscoroutinefunction(found.function):
                work.cancel()
            message = f"The tool {found.name} did not answer within {deadline_s:g} s."
            raise ApiError(504, message, code="tool_timeout")
        return self._as_json(found, self._outcome(found, work))

    async def _work(self, found: Tool, caller: Caller, arguments: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(found.function):
            return await found.function(caller, **arguments)
        call = functools.partial(found.function, caller, **arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _ended(self, name: str, work: "asyncio.Future[Any]") -> None:
        self._running[name] -= 1
        if not work.cancelled():
            work.exception()  # of a call that nobody waits for any more

    def _outcome(self, found: Tool, work: "asyncio.Future[Any]") -> Any:
        """What the function gave.

        Raises:
            ApiError: what it raised, in words for the caller.
        """
        try:
            return work.result()
        except InputError as error:
            raise ApiError(400, str(error), param=error.field, code="invalid_value") from None
        except NotFoundError as error:
            raise ApiError(404, str(error), code="not_found") from None
        except ConflictError as error:
            raise ApiError(409, str(error), code="conflict", retry=False) from None
        except RayloopError as error:
            retry_after_s = self._settings.retry_after_s
            raise ApiError(503, str(error), code="tool_unavailable", retry_after_s=retry_after_s) from None
        except Exception as error:
            log.error("tool %s failed", found.name, exc_info=error)
            raise ApiError(500, f"The tool {found.name} failed ({type(error).__name__}).", code="tool_failed") from None

    def _as_json(self, found: Tool, given: Any) -> Any:
        """A result by the tool's type, within its size.

        Raises:
            ResultError: it is of another type, no JSON, or too long.
        """
        try:
            written = orjson.dumps(found.result.dump_python(found.result.validate_python(given), mode="json"))
        except (ValidationError, PydanticSerializationError, orjson.JSONEncodeError) as error:
            log.error("tool %s broke its own type: %s", found.name, error)
            message = f"The tool {found.name} gave what its type does not allow."
            raise ResultError(500, message, code="tool_failed") from None
        limit = found.max_result_bytes or self._settings.max_result_bytes
        if len(written) > limit:
            message = f"The result has {len(written)} bytes, more than {limit}; ask for less."
            raise ResultError(422, message, code="result_too_large")
        return orjson.loads(written)  # as the caller reads it: JSON has no infinity

    def _record(self, name: str, call: Call, key: Key, result: Any, failure: ApiError | None, seconds: float) -> None:
        """Put the call into its trajectory, after the answer left; a record that fails is counted, never raised."""
        settings = self._services.settings
        if not (settings.learning.enabled and settings.capture.enabled):
            return
        item: dict[str, Any] = call.about | {"name": name, "latency_s": seconds}
        item |= {"arguments": call.arguments} if isinstance(call.arguments, dict | str) else {}
        item |= {"result": result} if failure is None else {"error": f"{failure.code}: {failure.message}"[:2_000]}
        task = asyncio.ensure_future(self._write(item, Identity(key.tenant, key.workspace, key.user_tier)))
        self._records.add(task)
        task.add_done_callback(self._records.discard)

    async def _write(self, item: dict[str, Any], identity: Identity) -> None:
        try:
            take_in = self._services.intake.take_in
            (written,) = await take_in([item], "tool_call", identity)
            if written.error is not None and "result" in item:  # too long a text: the call is recorded without it
                left_out = {"result_left_out": str(written.error)[:SHOWN_CHARS]}
                (written,) = await take_in([item | {"result": None, "metadata": left_out}], "tool_call", identity)
            status = written.status
            if written.error is not None:
                log.warning("a tool call was not recorded: %s", written.error)
        except RayloopError as error:
            status = "lost"
            log.warning("a tool call was not recorded: %s", error)
        metrics.INTAKE.labels("tool_call", status).inc()


def _failed(error: ApiError) -> dict[str, Any]:
    """A failure as a reply that is kept."""
    return {"error": {"status": error.status, "message": error.message, "code": error.code}}


def _replied(reply: dict[str, Any]) -> Any:
    """The result in a reply that was kept.

    Raises:
        ApiError: the first call ended with one.
    """
    if (error := reply.get("error")) is not None:
        raise ApiError(error["status"], error["message"], code=error["code"], retry=False)
    return reply["result"]


@contextmanager
def _in_api_shape() -> Iterator[None]:
    """Wrong values, as callers expect to be told."""
    try:
        yield
    except InputError as error:
        raise ApiError(400, str(error), param=error.field, code="invalid_value") from None
