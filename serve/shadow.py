"""Copies of live requests to a version whose answers nobody sees.

A copy leaves once the live answer is over, so it cannot delay it; how many are under way is bounded, and none is
sent while the router has much to do. Nothing a copy's answer asks for is done: its tool calls are recorded with a
stub for a result. Both answers are interactions in the log, and a `shadow.pair` event says that they belong
together and how far they agree; a sample of those that disagree is marked for people to label.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from cluster import metrics
from cluster.clock import now_us
from cluster.settings import Settings
from data.events import Event
from serve.arms import Plan, opponent
from serve.capture import Capture, Record
from serve.exchange import Engines, Exchange, new_interaction_id
from serve.openai import ApiError
from serve.proxy import UpstreamError
from serve.snapshot import Snapshot, Target

log = logging.getLogger(__name__)

STUB = {"stubbed": True}


@dataclass(frozen=True, slots=True)
class Pair:
    """A live answer and a copy's."""

    live: Record
    shadow: Record
    agreement: float
    for_review: bool

    def event(self) -> Event:
        """As `data.events.ShadowPair` describes it; about the live interaction."""
        body = {
            "shadow_interaction_id": self.shadow.interaction_id,
            "live_version": self.live.served_version,
            "shadow_version": self.shadow.served_version,
            "agreement": self.agreement,
            "for_review": self.for_review,
        }
        live = self.live
        return Event(
            "shadow.pair", live.key.tenant, live.key.workspace, body, event_id=f"{self.shadow.interaction_id}-pair",
            occurred_at_us=now_us(), user_id=live.user, session_id=live.session, agent=live.plan.agent,
            interaction_id=live.interaction_id,
        )  # fmt: skip


class Shadow:
    """The copies of one router replica."""

    def __init__(
        self,
        settings: Settings,
        engines: Engines,
        capture: Capture,
        snapshot: Callable[[], Snapshot],
        busy: Callable[[], bool],
    ) -> None:
        self._settings, self._engines, self._capture = settings.shadow, engines, capture
        self._compares = settings.experiment.measures("win_rate")
        self._snapshot, self._busy = snapshot, busy
        self._tasks: set[asyncio.Task[None]] = set()

    def mirror(self, live: Exchange) -> None:
        """Send a copy of a request that is over, if its answer has an opponent and there is room; never waits."""
        version = self._opponent(live)
        if version is None or random.random() >= self._settings.share:
            return
        target = self._snapshot().targets.get(version)
        if target is None:
            _count(live, "not_served")
        elif len(self._tasks) >= self._settings.max_concurrent or self._busy():
            _count(live, "dropped")
        else:
            task = asyncio.get_running_loop().create_task(self._copy(live, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _opponent(self, live: Exchange) -> str | None:
        """Who answers over again. Where stable stood in, the assigned arm has no answer to compare."""
        route, served = live.plan.route, live.record.served_version
        if route is None or served is None or live.record.fallback is not None:
            return None
        return opponent(route, served, compares=self._compares)

    def close(self) -> None:
        """Give up the copies under way."""
        for task in self._tasks:
            task.cancel()

    async def _copy(self, live: Exchange, target: Target) -> None:
        copy = _copied(live, target)
        record, outcome = copy.record, "answered"
        metrics.SHADOW_IN_FLIGHT.inc()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._read(copy, target)
        except TimeoutError:
            record.error, record.timeout, outcome = "engine_timeout", True, "timed_out"
        except (UpstreamError, ApiError) as error:
            record.refuse(error.status, error.code)
            outcome = "failed"
        finally:
            metrics.SHADOW_IN_FLIGHT.dec()
            if copy.reply is not None:
                copy.reply.abort()
        _count(live, outcome)
        record.latency_s = time.perf_counter() - copy.began
        record.tool_calls = stubbed_calls(record.answer.message)
        self._capture.offer(record)
        if outcome == "answered" and live.record.answer.message:
            self._capture.offer(self._paired(live.record, record))

    async def _read(self, copy: Exchange, target: Target) -> None:
        await copy.ask(self._engines, target, elsewhere=True, retry_after_s=0)
        if not copy.stream:
            return
        async for _ in copy.pieces():
            pass
        if copy.rewriter is not None and copy.rewriter.error is not None:
            raise UpstreamError("the engine failed in mid-stream", code=copy.rewriter.error)

    def _paired(self, live: Record, shadow: Record) -> Pair:
        found = agreement(live.answer.message, shadow.answer.message)
        disagree = found < self._settings.disagreement_below
        return Pair(live, shadow, found, disagree and random.random() < self._settings.review_share)


def _copied(live: Exchange, target: Target) -> Exchange:
    """The same request as an exchange of its own."""
    of = live.record
    planned = Plan(of.plan.requested, of.plan.agent, target.version, target, "shadow", route=of.plan.route)
    record = Record(
        new_interaction_id(live.path), of.key, planned, of.request, of.modality, of.user, of.session,
        of.trace_id, of.user_tier, of.prompt_digest, details={"shadow_of": of.interaction_id},
    )  # fmt: skip
    return Exchange(
        live.path, live.request, record, time.perf_counter(), live.request_id, live.endpoints,
        wants_token_ids=True, rendered=live.rendered,
    )  # fmt: skip


def _count(live: Exchange, outcome: str) -> None:
    key = live.record.key
    metrics.SHADOWED.labels(key.tenant, key.workspace, live.plan.agent, outcome).inc()


def stubbed_calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of an answer as calls that were not made."""
    calls = message.get("tool_calls")
    made = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]:
            arguments = function.get("arguments")
            made.append(
                {"name": function["name"][:256], "call_id": str(call.get("id") or "")[:256], "result": STUB}
                | ({"arguments": arguments} if isinstance(arguments, str) else {})
            )
    return made


def agreement(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far two answers agree, in [0, 1].

    Tool calls agree or not, by name and arguments. Answers that are JSON objects agree by the share of equal
    fields, texts by the Dice coefficient of their words, each counted as often as it occurs.
    """
    calls, others = _calls(one), _calls(other)
    if calls or others:
        return float(calls == others)
    text, other_text = str(one.get("content") or ""), str(other.get("content") or "")
    fields, other_fields = _object(text), _object(other_text)
    if fields is not None and other_fields is not None:
        names = fields.keys() | other_fields.keys()
        equal = sum(n in fields and n in other_fields and fields[n] == other_fields[n] for n in names)
        return equal / len(names) if names else 1.0
    words, other_words = Counter(text.lower().split()), Counter(other_text.lower().split())
    total = words.total() + other_words.total()
    return 2 * (words & other_words).total() / total if total else 1.0


def _calls(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = []
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = str(function.get("arguments"))
            parsed = _object(arguments)
            found.append((str(function.get("name")), arguments if parsed is None else parsed))
    return found


def _object(text: str) -> dict[str, Any] | None:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None
