"""Where the client's batches go: to the router's intake, or to a file. The standard library only."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.http_post import Answer
from serve.remote import Remote, UnreachableError

OVERLOADED = {429, 503}


class RefusedError(Exception):
    """The service will never take this batch; `too_long` when a part of it may pass."""

    def __init__(self, reason: str, *, too_long: bool = False) -> None:
        super().__init__(reason)
        self.too_long = too_long


@dataclass(frozen=True, slots=True)
class Verdicts:
    """One status an item, and the first reason for a rejection."""

    statuses: Sequence[str]
    problem: str | None = None


class Delivery(Protocol):
    """Where batches go."""

    def __call__(self, path: str, payloads: Sequence[bytes]) -> Verdicts:
        """Hand a batch over.

        Raises:
            UnreachableError: try again later.
            RefusedError: do not.
        """


@dataclass(frozen=True, slots=True)
class HttpDelivery:
    """To the router's intake."""

    remote: Remote
    timeout_s: float

    def __call__(self, path: str, payloads: Sequence[bytes]) -> Verdicts:
        answer = self.remote.post(path, b'{"items":[' + b",".join(payloads) + b"]}", self.timeout_s)
        if answer.status == 200 or (answer.status == 400 and b'"data":' in answer.body):  # 400: no item was good
            return _verdicts(answer, len(payloads))
        reason = f"{answer.status} {_message(answer)}"
        if answer.status in OVERLOADED:
            raise UnreachableError(reason, retry_after_s=answer.retry_after_s)
        if answer.status >= 500 or answer.status < 400 or answer.status == 401:  # a key can be mended
            raise UnreachableError(reason)
        raise RefusedError(reason, too_long=answer.status == 413)


def _verdicts(answer: Answer, expected: int) -> Verdicts:
    try:
        rows = json.loads(answer.body)["data"]
        statuses = [str(row["status"]) for row in rows]
        problem = next((str(row["error"]["message"]) for row in rows if row["status"] == "rejected"), None)
    except (ValueError, KeyError, TypeError):
        raise UnreachableError("what answered 200 is not a Rayloop router") from None
    if len(statuses) != expected or set(statuses) - {"accepted", "duplicate", "rejected"}:
        raise UnreachableError("the answer does not fit the batch")
    return Verdicts(statuses, problem)


def _message(answer: Answer) -> str:
    try:
        return str(json.loads(answer.body)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return "without a reason"


@dataclass(frozen=True, slots=True)
class FileDelivery:
    """To a local file, one JSON line an item: what would have been sent, and where to."""

    file: Path

    def __call__(self, path: str, payloads: Sequence[bytes]) -> Verdicts:
        head = b'{"path": ' + json.dumps(path).encode() + b', "item": '
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as out:
                out.write(b"".join(head + payload + b"}\n" for payload in payloads))
        except OSError as error:
            raise UnreachableError(f"{self.file}: {error.strerror}") from None
        return Verdicts(["accepted"] * len(payloads))
