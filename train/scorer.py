"""A trained reward model that scores conversations: in this process, or for others over HTTP."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import DatasetError, InputError, UnavailableError
from cluster.model_files import adapter_digest, read_adapter_config
from data.grading.reward_model import Conversation
from data.intake.messages import check_messages
from data.template import render
from train.device import resolve_device
from train.quiet import quiet_libraries

MAX_BODY_BYTES = 32 << 20
MAX_WAIT_S = 60.0  # for callers that name no deadline


class LocalScorer:
    """A reward model loaded from the folder that its training left."""

    def __init__(self, adapter: Path, base_model: str | None = None, *, device: str = "auto") -> None:
        """`base_model` is read from beside the adapter where it is not given.

        Raises:
            InputError: no reward model there, or its base is not known.
        """
        import torch
        from safetensors import safe_open

        from train.models import load_tokenizer, load_whole_model
        from train.score_batches import BatchScorer
        from train.score_card import WEIGHTS_KEY
        from train.weights import ADAPTER_WEIGHTS

        if read_adapter_config(adapter).get("task_type") != "SEQ_CLS":
            raise InputError("reward_model", str(adapter), "answers and does not score", "train one: --method reward")
        base = base_model or _base_beside(adapter)
        quiet_libraries()
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        self.adapter_sha256 = adapter_digest(adapter)
        self.tokenizer = load_tokenizer(base)
        dtype = torch.float32
        with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
            about = (file.metadata() or {}).get(WEIGHTS_KEY)
        self.weights: dict[str, float] | None = json.loads(about) if about else None
        heads = len(self.weights) if self.weights else 1
        model = load_whole_model(AutoModelForSequenceClassification, base, num_labels=heads, dtype=dtype)
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        kind = resolve_device(device, "fp32").type
        self.model: Any = PeftModel.from_pretrained(model, str(adapter)).to(kind).eval()
        self._batches = BatchScorer(self.model)

    def scores(self, conversations: Sequence[Conversation]) -> list[float]:
        """Raw scores, in order."""
        return self.scores_of([self.token_ids(c) for c in conversations])

    def token_ids(self, conversation: Conversation) -> list[int]:
        """A conversation as the model reads it.

        Raises:
            DatasetError: it cannot be rendered.
        """
        return render(self.tokenizer, [dict(message) for message in conversation])

    def scores_of(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Raw scores of conversations given as token ids; of four heads, the logit of their weighted mean."""
        from train.score_card import one_reward

        heads = self._batches.score(rows)
        return [one_reward(row, self.weights) if self.weights else row[0] for row in heads]


def _base_beside(adapter: Path) -> str:
    try:
        return str(json.loads((adapter.resolve().parent / "result.json").read_text())["base_model"])
    except (OSError, ValueError, KeyError):
        raise InputError(
            "reward_model", str(adapter), "does not say on which base it stands", "name the folder its training left"
        ) from None


def scoring_app(scorer: LocalScorer) -> Any:
    """An aiohttp application: `GET /v1/scores` says which model, `POST` scores conversations.

    What many callers ask at the same time is scored together (score_batches.py). `deadline_s` of a request says
    how long its caller waits; past it the answer is 503.
    """
    import asyncio

    from aiohttp import web

    from train.score_batches import ScoreQueue

    queue = ScoreQueue(scorer.scores_of)

    async def score_all(document: dict[str, Any]) -> list[float]:
        by = time.monotonic() + min(float(document.get("deadline_s") or MAX_WAIT_S), MAX_WAIT_S)
        rows = [scorer.token_ids(_checked(conversation)) for conversation in document["conversations"]]
        return list(await asyncio.gather(*[queue.score(ids, by) for ids in rows]))

    async def which(request: web.Request) -> web.Response:
        return web.json_response({"adapter_sha256": scorer.adapter_sha256})

    async def score(request: web.Request) -> web.Response:
        try:
            scores = await score_all(await request.json())
        except UnavailableError as error:
            late = {"message": str(error), "type": "server_error", "param": None, "code": "too_late"}
            return web.json_response({"error": late}, status=503, headers={"retry-after": "1"})
        except (ValueError, TypeError, KeyError, InputError, DatasetError) as error:
            detail = {"message": f"conversations: {error}", "type": "invalid_request_error", "param": "conversations"}
            return web.json_response({"error": {**detail, "code": "invalid_value"}}, status=400)
        return web.json_response({"adapter_sha256": scorer.adapter_sha256, "scores": scores})

    async def stop(_app: web.Application) -> None:
        await asyncio.to_thread(queue.close)

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.on_cleanup.append(stop)
    app.add_routes([web.get("/v1/scores", which), web.post("/v1/scores", score)])
    return app


def _checked(conversation: Any) -> Any:
    """The conversation. Raises `InputError` where it is no list of chat messages."""
    if not isinstance(conversation, list) or not all(isinstance(message, dict) for message in conversation):
        raise InputError("conversations", conversation, "must be lists of chat messages", "send OpenAI chat messages")
    check_messages(conversation)
    return conversation
