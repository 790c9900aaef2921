"""One HTTP exchange of JSON with an API: a status and a document, or an error that says whether to try again."""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from cluster.errors import ConflictError, UnavailableError

JSON = "application/json"
SHOWN_BYTES = 500


@dataclass(frozen=True, slots=True)
class Api:
    """One API server."""

    url: str
    timeout_s: float
    tls: ssl.SSLContext | None = None

    def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: Any = None, content_type: str = JSON
    ) -> Any:
        """The document answered.

        Raises:
            UnavailableError: no answer, a lost connection, or 429 and 5xx: whether a write was done is unknown.
            ConflictError: 409, somebody else wrote first.
            RejectedError: any other refusal; trying again is of no use.
        """
        data = None if body is None else json.dumps(body).encode()
        sent = {"accept": JSON, "content-type": content_type, **headers}
        request = urllib.request.Request(self.url.rstrip("/") + path, data=data, headers=sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s, context=self.tls) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(method, path, error) from None
        except (OSError, HTTPException) as error:
            raise UnavailableError(f"{method} {path}: {getattr(error, 'reason', None) or error!r}") from None
        try:
            return json.loads(text) if text else {}
        except ValueError as error:
            raise UnavailableError(f"{method} {path}: the answer is no JSON ({error})") from None


class RejectedError(ConflictError):
    """The API refuses for good: no permission, no such object, or a document it does not take."""


def _refusal(method: str, path: str, error: urllib.error.HTTPError) -> Exception:
    said = error.read(SHOWN_BYTES).decode(errors="replace").strip()
    message = f"{method} {path}: HTTP {error.code}: {said}"
    if error.code == 409:
        return ConflictError(message)
    return UnavailableError(message) if error.code == 429 or error.code >= 500 else RejectedError(message)
