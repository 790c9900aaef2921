"""Rows between the stages, for tests: defaults with a few columns changed."""

from typing import Any

import pyarrow as pa

from data.join import ROWS, to_json

DEFAULT = {
    "interaction_id": "i1",
    "user_id": "ada",
    "session_id": "s1",
    "agent": "triage",
    "at_us": 1,
    "logged_us": 1,
    "messages": to_json([{"role": "user", "content": "What is it?"}]),
    "context": "[]",
    "response": to_json({"role": "assistant", "content": "It is a thing of some kind."}),
    "finish_reason": "stop",
    "answer_tokens": 12,
    "flags": "{}",
    "latency_s": 0.5,
    "session_key": "session:s1",
    "behaviours": "[]",
    "signals": "[]",
    "labels": "[]",
    "grades": "[]",
}


def rows(*changes: dict[str, Any]) -> pa.Table:
    """Rows of `data.join.ROWS`; values that are not text or numbers are written as JSON."""
    plain = [
        DEFAULT | {k: to_json(v) if isinstance(v, list | dict) else v for k, v in change.items()} for change in changes
    ]
    return pa.Table.from_pylist(plain, ROWS)


def signal(kind: str, reward: float, user: str = "ada", at_us: int = 1, **more: Any) -> dict[str, Any]:
    """One signal as the join makes it."""
    base = {"type": kind, "source": "explicit", "reward": reward, "user": user, "at_us": at_us, "logged_us": at_us}
    return base | more
