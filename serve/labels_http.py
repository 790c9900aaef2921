"""`GET /v1/labels/queue` and `POST /v1/labels`: what people are to judge, and what they say.

Tenant and workspace come from the key, and so does the reviewer's name unless an item gives one.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Engine

from cluster import metrics
from cluster.errors import ConflictError, InputError, UnavailableError
from cluster.settings import Settings
from data.events import Event
from data.group_commit import GroupCommit
from data.intake.batches import ItemResult, Prepared, items_in, read_document
from data.intake.items import Identity
from data.labelling.content import shown_items
from data.labelling.queue import LabelQueue
from data.labelling.submission import LabelParser
from data.log import EventLog, Verdict
from serve.asgi import send_json
from serve.intake_http import in_api_shape
from serve.keys import Key
from serve.openai import Headers, Receive, Scope, Send, read_body
from serve.query import Query

QUEUE, LABELS = "/v1/labels/queue", "/v1/labels"
SCOPE = "label"
MOST_SHOWN = 200


@dataclass(slots=True)
class LabelsHandler:
    """The two routes. `reach` is called once the database has answered for the first time."""

    settings: Settings
    _log: EventLog | None = None
    _commit: GroupCommit | None = None
    _queue: LabelQueue | None = None

    def reach(self, engine: Engine, commit: GroupCommit) -> None:
        """Work on this database."""
        self._log, self._commit = EventLog(engine), commit
        self._queue = LabelQueue(engine, self.settings.labelling)

    async def handle(self, path: str, scope: Scope, receive: Receive, send: Send, key: Key, headers: Headers) -> int:
        """Answer one request; returns the status sent.

        Raises:
            ApiError: the whole request is refused; otherwise each item has its own answer.
        """
        with in_api_shape(self.settings.serve):
            if not self.settings.learning.enabled:
                raise ConflictError("learning.enabled=false: nothing is labelled; set `learning.enabled: true`")
            if path == QUEUE:
                query = Query(scope)
                limit = query.number("limit", self.settings.labelling.shown_items, MOST_SHOWN)
                answer = await asyncio.to_thread(self._waiting, key, query.text("reviewer") or key.name, limit)
            else:
                answer = await self._take_in(scope, receive, key)
        await send_json(send, answer, headers=headers)
        return 200

    def _waiting(self, key: Key, reviewer: str, limit: int) -> dict[str, Any]:
        queue, log = self._reached()
        waiting = queue.waiting(key.tenant, key.workspace, reviewer=reviewer)
        data = shown_items(log, waiting[:limit], self.settings)
        return {"object": "list", "data": data, "waiting": len(waiting)}

    async def _take_in(self, scope: Scope, receive: Receive, key: Key) -> dict[str, Any]:
        serve = self.settings.serve
        body = await read_body(scope, receive, serve.max_batch_bytes, serve.body_timeout_s)
        items = items_in(read_document(body), self.settings)
        submissions = await asyncio.to_thread(self._parsed, items, key)
        assert self._commit is not None, "_parsed has looked"
        events = [event for submission in submissions if not isinstance(submission, ItemResult) for event in submission]
        verdicts = await asyncio.wait_for(asyncio.wrap_future(self._commit.submit(events)), serve.feedback_timeout_s)
        results = _results(submissions, verdicts)
        for result in results:
            metrics.INTAKE.labels("label", result.status).inc()
        return {"object": "list", "data": [result.as_dict() for result in results]}

    def _parsed(self, items: Sequence[Any], key: Key) -> list[list[Event] | ItemResult]:
        """The events of each item, or why it has none."""
        queue, _ = self._reached()
        parser = LabelParser(queue, self.settings.intake.max_text_chars)
        identity = Identity(key.tenant, key.workspace)
        parsed: list[list[Event] | ItemResult] = []
        for item in items:
            try:
                parsed.append(parser.parse(item, identity, key.name))
            except InputError as error:
                given = item.get("event_id") if isinstance(item, dict) else None
                parsed.append(ItemResult(given if isinstance(given, str) else None, "rejected", error))
        return parsed

    def _reached(self) -> tuple[LabelQueue, EventLog]:
        if self._queue is None or self._log is None:
            raise UnavailableError("the event log has not been reached yet; send it again")
        return self._queue, self._log


def _results(submissions: Sequence[list[Event] | ItemResult], verdicts: Sequence[Verdict]) -> list[ItemResult]:
    """One result a submission: what became of its first event, which has its id."""
    firsts, at = [], 0
    for submission in submissions:
        if not isinstance(submission, ItemResult):
            firsts.append(verdicts[at])
            at += len(submission)
    results = [submission if isinstance(submission, ItemResult) else None for submission in submissions]
    return Prepared([], results).finish(firsts)
