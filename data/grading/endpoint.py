"""An OpenAI-compatible endpoint that judges stand behind, asked by the standard library.

The grader service asks the same questions on its event loop (serve/grading_models.py); what both have in
common is here: which request is made, and which replies are no answer.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.grading.types import AbstainError, Question

SERVER_ERROR = "model_grader_server_error"
MAX_REPLY_BYTES = 1_000_000  # a verdict is a hundred bytes; more is no verdict


@dataclass(frozen=True, slots=True)
class JudgeEndpoint:
    """Where judges and embeddings are."""

    url: str
    """Address in front of `/v1`."""
    api_key: str | None = None
    structured: bool = True
    """The server takes `response_format`; without, the judge is only told the form."""
    timeout_s: float = 30.0

    def body(self, question: Question) -> dict[str, Any]:
        """The request's document as this server takes it."""
        kept = self.structured or "response_format" not in question.body
        return question.body if kept else {k: v for k, v in question.body.items() if k != "response_format"}

    def headers(self) -> dict[str, str]:
        """The request's headers."""
        bearer = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"content-type": "application/json"} | bearer

    def ask(self, question: Question) -> Any:
        """The reply's document, waiting for it at most `timeout_s` a read.

        Raises:
            AbstainError: nothing usable came back.
        """
        data = json.dumps(self.body(question)).encode()
        request = urllib.request.Request(self.url.rstrip("/") + question.path, data, self.headers(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                return parse_reply(200, reply.read(MAX_REPLY_BYTES + 1))
        except urllib.error.HTTPError as error:
            with error:
                return parse_reply(error.code, error.read(MAX_REPLY_BYTES + 1))
        except OSError as error:
            raise AbstainError(f"the judge does not answer ({error})", SERVER_ERROR) from None


def parse_reply(status: int, body: bytes) -> Any:
    """The document of a reply.

    Raises:
        AbstainError: an error status, too long, or not JSON.
    """
    if status != 200:
        raise AbstainError(f"the judge's server answered {status}: {_said(body)}", SERVER_ERROR)
    if len(body) > MAX_REPLY_BYTES:
        raise AbstainError(f"the judge's reply is longer than {MAX_REPLY_BYTES} bytes", SERVER_ERROR)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise AbstainError("the judge's reply is not JSON", SERVER_ERROR) from None


def judge_endpoint(url: str | None, api_key_env: str | None, **options: Any) -> JudgeEndpoint | None:
    """The endpoint that the settings name, with its key from the environment; `None` where they name none."""
    if url is None:
        return None
    return JudgeEndpoint(url, os.environ.get(api_key_env) if api_key_env else None, **options)


def _said(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        message = error["message"] if isinstance(error, Mapping) else error
    except (ValueError, KeyError, TypeError, RecursionError):
        message = body[:200].decode(errors="replace")
    return str(message)[:200]
