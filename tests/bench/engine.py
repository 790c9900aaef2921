"""The embedded engine against static batches of `transformers.generate` with peft's `adapter_names`.

Both answer the same requests greedily: a base and two adapters mixed, on a random model of the demo's size
(0.84 M parameters), one torch thread each. The engine has 32 and 64 clients that each send their next
request when the last is answered, over its Python interface and over HTTP; the peer gets the requests in
batches of as many, in the same order. Answers of 24 tokens each, then of 8 to 40 tokens. The runs take
turns; medians and ratios are printed, and how many answers differ.

Run: python -m tests.bench.engine [--rounds 3] [--requests 384]
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import orjson
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cluster.settings.engines import EngineSettings
from data.template import render
from serve.engines.generation import SamplingParams
from serve.engines.http_api import EngineApi
from serve.engines.local import LocalEngine
from serve.proxy import Limits, Upstream
from tests.serve.engines.models import build_adapter, build_base
from tests.serve.upstream import Server

MODELS = ("base", "one", "two")
SYSTEM = "You triage alerts. Answer with a verdict and an owner. Never close an alert about a payment service."
FIELDS = ("service", "level", "host", "region", "rule", "hour", "count", "change", "owner", "trend")
Answers = list[list[int]]


@dataclass(frozen=True)
class Request:
    """One request of the workload."""

    model: str
    messages: list[dict[str, str]]
    prompt: list[int]
    tokens: int


def workload(engine: LocalEngine, count: int, lengths: tuple[int, int]) -> list[Request]:
    """Alerts of ten fields, each to one of the three models."""
    draw = random.Random(7)
    requests = []
    for number in range(count):
        alert = " ".join(f"{field}={draw.randrange(10_000)}" for field in FIELDS)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": alert}]
        requests.append(Request(MODELS[number % 3], messages, engine.render(messages), draw.randint(*lengths)))
    return requests


def by_peer(model: Any, requests: Sequence[Request], batch: int) -> tuple[float, Answers]:
    """Seconds and answers of static batches."""
    began, answers = time.perf_counter(), []
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        width = max(len(r.prompt) for r in part)
        ids = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in part])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in part])
        names = ["__base__" if r.model == "base" else r.model for r in part]
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                adapter_names=names,
                max_new_tokens=max(r.tokens for r in part),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers += [row[: r.tokens] for row, r in zip(out[:, width:].tolist(), part, strict=True)]
    return time.perf_counter() - began, answers


Ask = Callable[[Request], Awaitable[list[int]]]


async def closed_loop(ask: Ask, requests: Sequence[Request], clients: int) -> tuple[float, Answers]:
    """Seconds and answers of clients that each wait for their answer before they ask again."""
    answers: Answers = [[] for _ in requests]
    todo = iter(range(len(requests)))

    async def client() -> None:
        for number in todo:
            answers[number] = await ask(requests[number])

    began = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(clients)])
    return time.perf_counter() - began, answers


def by_engine(engine: LocalEngine, requests: Sequence[Request], clients: int) -> tuple[float, Answers]:
    """The engine's Python interface; prompts are rendered as part of the work."""

    async def ask(request: Request) -> list[int]:
        prompt = render(engine.tokenizer, request.messages, add_generation_prompt=True)
        params = SamplingParams(max_tokens=request.tokens, temperature=0.0, ignore_eos=True)
        async for update in engine.generate(request.model, prompt, params):
            return update.token_ids
        raise RuntimeError("no answer")

    return asyncio.run(closed_loop(ask, requests, clients))


def by_http(url: str, requests: Sequence[Request], clients: int) -> tuple[float, Answers]:
    """The same over HTTP, log-probs and token ids included, client and server in one process."""

    async def everything() -> tuple[float, Answers]:
        upstream = Upstream(url, Limits())

        async def ask(request: Request) -> list[int]:
            body = {"model": request.model, "messages": request.messages, "max_tokens": request.tokens}
            body |= {"temperature": 0, "ignore_eos": True, "logprobs": True, "return_token_ids": True}
            reply = await upstream.post("/v1/chat/completions", orjson.dumps(body))
            answer: list[int] = orjson.loads(await reply.read())["choices"][0]["token_ids"]
            return answer

        try:
            return await closed_loop(ask, requests, clients)
        finally:
            upstream.close()

    return asyncio.run(everything())


def compare(
    engine: LocalEngine,
    url: str,
    peer: Any,
    requests: Sequence[Request],
    rounds: int,
    clients: int,
    title: str,
) -> None:
    """Run the three in turn and print a table."""
    runs: dict[str, Callable[[], tuple[float, Answers]]] = {
        "transformers.generate, static batches": lambda: by_peer(peer, requests, clients),
        "engine": lambda: by_engine(engine, requests, clients),
        "engine over HTTP": lambda: by_http(url, requests, clients),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    expected: Answers = []
    differing: dict[str, int] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds, answers = run()
            rates[name].append(len(requests) / seconds)
            expected = expected or answers
            differing[name] = sum(a != b for a, b in zip(answers, expected, strict=True))
    print(f"\n{title}, {clients} at once, {len(requests)} requests, median of {rounds}")
    first = statistics.median(next(iter(rates.values())))
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"  {name:40} {rate:7.1f} req/s  {rate / first:5.2f} x  {differing[name]} answers differ")


def main() -> int:
    """Build the models, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=384)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = build_base(Path(folder) / "base", hidden=128, layers=4, heads=4, kv_heads=4)
        adapters = {
            name: build_adapter(base, Path(folder) / name, seed=seed, rank=16) for seed, name in enumerate(MODELS[1:])
        }
        engine = LocalEngine(EngineSettings(base_model=str(base)))
        peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters["one"], "one").eval()
        peer.load_adapter(adapters["two"], "two")
        for name, path in adapters.items():
            engine.load_adapter(name, path)
        with Server(EngineApi(engine)) as url:
            for lengths, title in (((24, 24), "24 tokens each"), ((8, 40), "8 to 40 tokens")):
                requests = workload(engine, options.requests, lengths)
                print(f"prompts of about {len(requests[0].prompt)} tokens", file=sys.stderr)
                for clients in (32, 64):
                    compare(engine, url, peer, requests, options.rounds, clients, title)
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
