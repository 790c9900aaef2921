"""The embedded engine over HTTP, as a plain ASGI application.

`POST /v1/chat/completions`, `/v1/completions`, `GET /v1/models`, `POST /v1/load_lora_adapter`,
`/v1/unload_lora_adapter` and `GET /healthz`, in the shapes of OpenAI and of vLLM's adapter calls, so the router
speaks to this engine and to a vLLM server in the same way. It sits behind the router, which shows a token
(token.py); people's keys are the router's business.
"""

from typing import TYPE_CHECKING

from serve.asgi import send_json
from serve.engines.chat_answer import ChatAnswer
from serve.engines.engine_routes import EngineRoutes
from serve.engines.protocol import parse_chat
from serve.engines.text import TextAnswer
from serve.openai import Receive, Scope, Send

if TYPE_CHECKING:
    from serve.engines.local import LocalEngine


class EngineApi(EngineRoutes):
    """The ASGI callable around the embedded engine."""

    def __init__(self, engine: "LocalEngine", token: str | None = None) -> None:
        super().__init__(engine, token)
        self.engine = engine
        self._routes |= {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._text,
        }

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = parse_chat(await self._document(scope, receive), self.engine.settings)
        await ChatAnswer(self.engine, request).answer(receive, send)

    async def _text(self, scope: Scope, receive: Receive, send: Send) -> None:
        await TextAnswer(self.engine, await self._document(scope, receive)).answer(receive, send)

    async def _health(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        scheduler = self.engine.scheduler
        status = "ok" if scheduler.alive else "dead"
        body = {
            "status": status,
            "running": scheduler.running,
            "queued": scheduler.queued,
            "models": len(self.engine.models()),
            "steps": scheduler.steps,
            "generated_tokens": scheduler.generated_tokens,
            "prompt_tokens": scheduler.prefixes.asked_tokens,
            "reused_prompt_tokens": scheduler.prefixes.hit_tokens,
        }
        await send_json(send, body, 200 if scheduler.alive else 503)
