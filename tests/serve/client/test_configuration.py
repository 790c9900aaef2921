"""A client that is off, one that could not work, and what the environment says."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from serve.client import Client, ClientConfig
from serve.sender import SenderLimits
from tests.serve.client.conftest import ASK


def test_off_returns_the_very_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYLOOP_ENABLED", raising=False)
    client = Client()

    def answer(messages: list[Any]) -> str:
        return "x"

    async def later() -> None: ...

    assert client.prediction(agent="triage")(answer) is answer
    assert client.prediction()(later) is later
    assert client.tool(answer) is answer
    assert client.tool(name="t")(answer) is answer


@pytest.mark.parametrize("value", ["", "false", "0", "no", "TRUEISH"])
def test_anything_but_true_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLOOP_ENABLED", value)
    assert not Client().enabled


def test_off_every_call_is_the_normal_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYLOOP_ENABLED", raising=False)
    client, threads = Client(), threading.active_count()
    with client.trajectory("a") as steps, client.predicting("a", messages=ASK) as prediction:
        prediction.answer("yes")
    with client.using_tool("t", {}) as call:
        call.result = 1
    assert client.call_tool("add", {"a": 1, "b": 2}, local=lambda a, b: a + b) == 3
    assert client.call_tool("add", {}) is None
    assert client.grade({"type": "string_check"}, "x") is None
    assert client.feedback("i", "thumbs_up") is False
    assert (client.flush(), steps.reward, threading.active_count()) == (True, None, threads)


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = "import sys, serve.client; print(' '.join(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"ray", "torch", "pydantic", "pydantic_settings", "sqlalchemy", "pyarrow", "numpy", "orjson", "aiohttp"}
    assert not heavy & loaded
    assert "data" not in loaded


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ClientConfig(enabled=True), "RAYLOOP_URL=None is missing"),
        (ClientConfig(enabled=True, url="ftp://x"), "RAYLOOP_URL='ftp://x' must be an http or https address"),
        (ClientConfig(enabled=True, url="http://x", call_timeout_s=0), "call_timeout_s=0 must be > 0"),
        (ClientConfig(enabled=True, url="http://x", limits=SenderLimits(batch_items=0)), "limits.batch_items=0"),
    ],
)
def test_enabled_without_a_usable_configuration_is_refused_at_once(config: ClientConfig, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + message):
        Client(config)


def test_environment_configures_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"ENABLED": "true", "URL": "https://r", "API_KEY": "rl-1", "DRY_RUN": str(tmp_path / "x.jsonl")}
    for name, value in given.items():
        monkeypatch.setenv(f"RAYLOOP_{name}", value)
    config = ClientConfig.from_environment()
    assert (config.enabled, config.url, config.dry_run) == (True, "https://r", tmp_path / "x.jsonl")
    assert "rl-1" not in repr(config)
