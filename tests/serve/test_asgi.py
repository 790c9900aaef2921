"""What every application does around its own routes when one of them fails."""

import httpx
import pytest

from serve.asgi import HttpApplication, send_json
from serve.openai import Receive, Scope, Send
from tests.serve.upstream import Server


class Failing(HttpApplication):
    """Fails before or after it has begun to answer."""

    async def respond(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
        if path == "/well":
            await send_json(send, {})
        raise KeyError("with hunter2")


def test_a_defect_is_a_500_in_openais_shape_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with Server(Failing()) as url:
        answer = httpx.get(f"{url}/early")
        assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "true")
        assert answer.json()["error"] == {
            "message": "The server failed; its log says why.", "type": "server_error", "param": None,
            "code": "internal_error",
        }  # fmt: skip
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{url}/late")
    assert "GET /early failed" in caplog.text
