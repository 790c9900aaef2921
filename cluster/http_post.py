"""One HTTP POST with the standard library alone, for code that runs inside other people's processes too."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import UnavailableError

MAX_ANSWER_BYTES = 4_000_000
IDLE_CONNECTION_S = 4.0
"""How long clients that keep connections keep one for the next request: Uvicorn and Node close theirs after 5 s, and a
request that is written just then is lost."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a service answered, whatever the status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after_s(self) -> float | None:
        """Seconds from `Retry-After`; `None` where it is absent or a date."""
        try:
            return max(0.0, float(self.headers.get("retry-after", "")))
        except ValueError:
            return None


def post(url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> Answer:
    """Send JSON, take the answer. No redirect is followed: keys and signatures are for this address alone.

    `timeout_s` bounds each wait on the connection, not their sum.

    Raises:
        UnavailableError: nothing there, or it fell silent, broke off or answered far too much.
    """
    import http.client
    import urllib.error
    import urllib.request

    given = {"content-type": "application/json", **headers}
    request = urllib.request.Request(url, data=body, headers=given, method="POST")
    opener = urllib.request.build_opener(_no_redirect())
    try:
        try:
            reply = opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            content: bytes = reply.read(MAX_ANSWER_BYTES + 1)
            names = {name.lower(): value for name, value in reply.headers.items()}
            status = int(reply.status)
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(_cause(error)) from None
    if len(content) > MAX_ANSWER_BYTES:
        raise UnavailableError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return Answer(status, names, content)


def _no_redirect() -> type:
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:
            return None

    return NoRedirect


def _cause(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error) or type(error).__name__
