"""The engine where it lives: a Serve application behind Serve's own HTTP port."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from cluster.database import connect
from cluster.errors import ConfigError
from cluster.settings import Settings, load_settings
from cluster.settings.engines import EngineSettings
from serve.engines.deployment import build, changed
from serve.engines.token import engine_token
from serve.servables import reports, unwant, wait_ready, want

MESSAGES = [{"role": "user", "content": "disk full on host db-7"}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def served(ray_session: None, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Settings]]:
    """URL of the application, and the settings it runs with."""
    import ray.serve

    quick = {"base_model": str(base), "poll_interval_s": 0.1, "heartbeat_s": 0.2, "live_after_s": 3.0}
    settings, _ = load_settings(home=tmp_path_factory.mktemp("home"), engine=quick | {"unload_delay_s": 0.5})
    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    ray.serve.run(build(settings), name="engine", route_prefix="/engine")
    yield f"http://127.0.0.1:{port}/engine", settings
    ray.serve.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_engine_on_serve_answers_and_follows_servables(
    served: tuple[str, Settings], version_of, adapters: dict[str, Path], make_adapter, tmp_path: Path
) -> None:
    url, settings = served
    database = connect(settings)
    good, broken = version_of(3, adapters["red"]), version_of(4, make_adapter(tmp_path / "b", seed=4))
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"short")
    name = want(database, good, "local").model_name
    want(database, broken, "local")
    wait_ready(database, "triage/3", 30.0, live_after_s=3.0)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=engine_token(settings), max_retries=0)
    whole = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=20, seed=1)
    stream = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=20, seed=1, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole.choices[0].message.content
    assert {m.id for m in client.models.list()} == {"base", name}
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="triage-4", messages=MESSAGES)
    assert [r.state for r in reports(database, "triage/4")] == ["failed"]
    unwant(database, "triage/3")
    deadline = time.monotonic() + 20
    while reports(database, "triage/3") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {m.id for m in client.models.list()} == {"base"}
    client.close()
    database.dispose()


@pytest.mark.ray
@pytest.mark.slow
def test_disconnect_through_serve_frees_the_row(served: tuple[str, Settings]) -> None:
    url, settings = served
    headers = {"authorization": f"Bearer {engine_token(settings)}"}
    body = {"model": "base", "messages": MESSAGES, "max_tokens": 480, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30) as answer:
        next(answer.iter_bytes())
    deadline = time.monotonic() + 10
    while httpx.get(f"{url}/healthz").json()["running"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert httpx.get(f"{url}/healthz").json()["running"] == 0


def test_application_without_a_base_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.base_model=None is not set"):
        build(load_settings(home=tmp_path)[0])
    with pytest.raises(ConfigError, match=r"engine\.base_model='/no/such/model' does not exist"):
        build(load_settings(home=tmp_path, engine={"base_model": "/no/such/model"})[0])


def test_deployment_config_changes_limits_only() -> None:
    settings = EngineSettings(base_model="/m")
    assert changed(settings, None) is settings
    assert changed(settings, {"max_rank": 8, "base_model": "/m"}).max_rank == 8
    for document, reason in (
        ({"base_model": "/other"}, "cannot change while serving"),
        ({"max_rank": 0}, "greater than or equal to 1"),
        ({"colour": "red"}, "cannot change while serving"),
        ([], "must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=reason):
            changed(settings, document)


def test_importing_the_application_loads_no_torch() -> None:
    code = "import sys, serve.app, serve.engines.deployment, serve.engines.http_api, serve.servables\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
