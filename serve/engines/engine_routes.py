"""What the HTTP sides of all engines share: the router's token, models, adapters, health.

Adapters are loaded and unloaded by vLLM's own calls, so the router and people speak to every engine in one way.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable

from serve.asgi import HttpApplication, send_json
from serve.engines.adapter_source import AdapterError
from serve.engines.host import AdapterHost
from serve.engines.protocol import Json
from serve.openai import ApiError, Receive, Scope, Send, header, parse_object, read_body

Route = Callable[[Scope, Receive, Send], Awaitable[None]]
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class EngineRoutes(HttpApplication):
    """What the HTTP sides of all engines share: the token, models, adapters, health.

    With a token, everything but `/healthz` asks for it.
    """

    def __init__(self, engine: AdapterHost, token: str | None = None) -> None:
        self.host = engine
        self._bearer = f"Bearer {token}".encode() if token is not None else None
        self._routes: dict[tuple[str, str], Route] = {
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/load_lora_adapter"): self._load,
            ("POST", "/v1/unload_lora_adapter"): self._unload,
            ("GET", "/healthz"): self._health,
        }

    async def respond(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = self._routes.get((scope["method"], path))
        if route is None:
            raise _no_route(scope["method"], path, {p for _, p in self._routes})
        if path != "/healthz":
            self._authorise(scope)
        await route(scope, receive, send)

    def _authorise(self, scope: Scope) -> None:
        given = header(scope, b"authorization") or b""
        if self._bearer is not None and not hmac.compare_digest(given, self._bearer):
            message = "The engine answers its router only; send the request there."
            raise ApiError(401, message, code="invalid_api_key")

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def _models(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        data = [
            {
                "id": m.name,
                "object": "model",
                "created": m.loaded_at,
                "owned_by": "rayloop",
                "root": m.adapter_path,
            }
            for m in self.host.models()
        ]
        await send_json(send, {"object": "list", "data": data})

    async def _load(self, scope: Scope, receive: Receive, send: Send) -> None:
        document = await self._document(scope, receive)
        name, path = _text(document, "lora_name"), _text(document, "lora_path")
        try:
            adapter = await asyncio.to_thread(self.host.load_adapter, name, path)
        except AdapterError as error:
            raise ApiError(400, f"adapter {name!r}: {error}", param="lora_path", code="adapter_refused") from None
        body = {"status": "loaded", "lora_name": name, "sha256": adapter.sha256, "rank": adapter.rank}
        await send_json(send, body)

    async def _unload(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = _text(await self._document(scope, receive), "lora_name")
        if not await asyncio.to_thread(self.host.unload_adapter, name):
            raise ApiError(404, f"no adapter {name!r} is loaded", param="lora_name", code="model_not_found")
        await send_json(send, {"status": "unloaded", "lora_name": name})

    async def _document(self, scope: Scope, receive: Receive) -> Json:
        settings = self.host.settings
        return parse_object(await read_body(scope, receive, settings.max_body_bytes, settings.body_timeout_s))


def _text(document: Json, field: str) -> str:
    value = document.get(field)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{field} must be a text that is not empty", param=field, code="invalid_value")
    return value


def _no_route(method: str, path: str, known: set[str]) -> ApiError:
    if path in known:
        return ApiError(405, f"{path} does not answer {method}", code="method_not_allowed")
    return ApiError(404, f"there is no {path} here; known are {', '.join(sorted(known))}", code="not_found")


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
