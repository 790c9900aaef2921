"""The router on a real port with a database, and the files that clients send it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.settings import Settings, load_settings
from serve.keys import create_key
from serve.router import RouterApp
from tests.databases import place_database
from tests.serve.upstream import Server
from tests.toys import toy_answer, toy_examples

Json = dict[str, Any]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat_rows(count: int, seed: int = 0) -> list[Json]:
    return [{"messages": messages} for messages in toy_examples(count, seed)]


def pair_rows(count: int, seed: int = 0) -> list[Json]:
    rows = []
    for prompt, right in toy_examples(count, seed):
        wrong = {"role": "assistant", "content": toy_answer("nobody", "high")}
        rows.append({"input": {"messages": [prompt]}, "preferred_output": [right], "non_preferred_output": [wrong]})
    return rows


def item_rows(count: int, seed: int = 0) -> list[Json]:
    """Prompts with the right answer as a field for the grader."""
    return [{"messages": [asked], "answer": right["content"]} for asked, right in toy_examples(count, seed)]


@dataclass
class Api:
    """A router that speaks the fine-tuning API, and its client."""

    url: str
    client: openai.OpenAI
    database: Engine
    settings: Settings
    app: RouterApp

    def client_of(self, tenant: str, scopes: tuple[str, ...] = ("train",)) -> openai.OpenAI:
        secret = create_key(self.database, f"key-{tenant}", tenant, "default", list(scopes))
        self.app.watcher.refresh()
        return self.client.with_options(api_key=secret)

    def upload(self, rows: list[Any], client: openai.OpenAI | None = None) -> str:
        sent = ("examples.jsonl", lines(rows))
        return (client or self.client).files.create(file=sent, purpose="fine-tune").id


def live_api(settings: Settings, engine_url: str = "http://127.0.0.1:9") -> Iterator[Api]:
    place_database(settings)
    database = connect(settings)
    secret = create_key(database, "test", "default", "default", ["train", "chat"])
    app = RouterApp(settings, default_engine_url=engine_url)
    app.watcher.refresh()
    with Server(app, lifespan="on") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0, timeout=30)
        yield Api(url, client, database, settings, app)
        client.close()
    database.dispose()


@pytest.fixture
def api(tmp_path: Path, database_url: str) -> Iterator[Api]:
    """On SQLite, then on PostgreSQL; nothing starts the jobs."""
    limits = {"max_active_jobs": 3, "max_file_mb": 0.5, "max_files": 6}
    yield from live_api(api_settings(tmp_path / "home", database={"url": database_url}, finetuning=limits))


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One for all requests that are refused and leave nothing."""
    yield from live_api(api_settings(tmp_path_factory.mktemp("home"), training={"limits": {"max_steps": 1000}}))


def api_settings(home: Path, *, finetuning: Json | None = None, **more: Any) -> Settings:
    toy = {"base_models": {"toy": "/models/toy"}}
    return load_settings(home=home, serve={"poll_ms": 20}, finetuning=toy | (finetuning or {}), **more)[0]
