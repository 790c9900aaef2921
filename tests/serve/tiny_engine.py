"""An engine application without a model: answers with the base model it was deployed for."""

from typing import Any

import orjson
import ray.serve


class Answers:
    """The ASGI callable."""

    def __init__(self, base_model: str) -> None:
        self.base_model = base_model

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive()).get("more_body"):
            body += message.get("body", b"")
        asked = orjson.loads(body + message.get("body", b""))
        said = {"role": "assistant", "content": self.base_model}
        answer = {
            "id": "tiny", "object": "chat.completion", "created": 1, "model": asked["model"],
            "choices": [{"index": 0, "message": said, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        raw = orjson.dumps(answer)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": raw})


@ray.serve.deployment(name="Engine", ray_actor_options={"num_cpus": 0.1})
@ray.serve.ingress()
class Tiny:
    """The replica."""

    def __init__(self, base_model: str) -> None:
        self._answers = Answers(base_model)

    async def __serve_build_asgi_app__(self) -> Answers:
        return self._answers


def build(arguments: dict[str, str]) -> Any:
    """The application; `base_model` as the driver gives it."""
    return Tiny.bind(arguments.get("base_model", "stable"))  # type: ignore[attr-defined]
