"""Tools and grader as an agent process calls them: within a deadline, and left alone while they fail."""

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import InputError
from cluster.http_post import Answer
from serve.breaker import Breaker, Permit
from serve.client_config import ClientConfig
from serve.remote import DeadlineCalls, Remote, UnreachableError
from serve.sender import encode

log = logging.getLogger("serve.client")

HANGING_CALLS = 8  # calls of tools and grader that may hang at a time before further ones are refused at once


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader said of one answer."""

    reward: float | None
    """In [0, 1]; `None` when it abstained."""
    scores: Mapping[str, float]
    reason: str
    version: str | None


class ServiceCalls:
    """Tools or grader: calls within a deadline, left alone by a breaker while it fails."""

    def __init__(self, name: str, remote: Remote | None, config: ClientConfig) -> None:
        self.name, self._remote, self._timeout_s = name, remote, config.call_timeout_s
        self._limits = config.limits
        self.unanswered = 0
        self._begin()

    def _begin(self) -> None:
        """As new, also in a child that was forked while a lock was held."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._breaker = Breaker(self._limits)
        self._calls: DeadlineCalls[Answer] = DeadlineCalls(HANGING_CALLS)
        self._warned = False

    def ask(self, path: str, document: Mapping[str, Any]) -> Any | None:
        """The answer's JSON, or `None`: switched off, unreachable, too slow, failing or left alone."""
        remote = self._remote
        if remote is None:
            return None
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            permit = self._breaker.allow(time.monotonic())
            if permit is None:
                self.unanswered += 1
                return None
        try:
            body = encode(dict(document))
            answer = self._calls.run(lambda: remote.post(path, body, self._timeout_s), self._timeout_s)
            found = _document(answer)
        except UnreachableError as error:
            self._failed(permit, str(error))
            return None
        with self._lock:
            self._breaker.record(permit, True, time.monotonic())
            self._warned = False
        if answer.status >= 400:
            raise _refusal(found, answer.status)
        return found

    def _failed(self, permit: Permit, reason: str) -> None:
        with self._lock:
            self._breaker.record(permit, False, time.monotonic())
            self.unanswered += 1
            first, self._warned = not self._warned, True
        if first:
            log.warning("the %s does not answer (%s); the agent goes on without it", self.name, reason)


def _document(answer: Answer) -> Any:
    if answer.status >= 500 or answer.status in (401, 429) or 300 <= answer.status < 400:
        raise UnreachableError(f"status {answer.status}")
    try:
        return json.loads(answer.body)
    except ValueError:
        raise UnreachableError(f"status {answer.status} without JSON") from None


def _refusal(document: Any, status: int) -> InputError:
    """The service's own words for what is wrong with the call."""
    error = document.get("error") if isinstance(document, dict) else None
    error = error if isinstance(error, dict) else {}
    message = str(error.get("message") or "refused without a reason")
    return InputError(str(error.get("param") or "call"), status, message, "mend the call")
