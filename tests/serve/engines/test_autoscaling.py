"""Engines without a replica: what is said of their versions, who wakes them, and that the first request is answered."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy.engine import Engine as Database

from cluster.database import connect
from cluster.errors import ConfigError
from cluster.registry import Version
from cluster.settings import Settings, load_settings
from cluster.settings.engines import AutoscalingSettings, EngineSettings
from serve.engine_waking import EngineWaker
from serve.engines.autoscaling import scale
from serve.engines.deployment import build
from serve.engines.local import LocalEngine
from serve.engines.reconciler import Reconciler
from serve.engines.token import engine_token
from serve.servables import asleep, ready, reports, wait_ready, want
from tests.serve.engines.test_deployment import MESSAGES, free_port
from tests.serve.upstream import Server


def engine(name: str = "local", replicas: int = 1, **autoscaling: Any) -> EngineSettings:
    return EngineSettings(name=name, replicas=replicas, autoscaling=AutoscalingSettings(**autoscaling))


def test_replicas_are_fixed_or_follow_the_requests(tmp_path: Path) -> None:
    assert scale(engine(replicas=2)) == {"num_replicas": 2}
    growing = scale(engine(max_replicas=3, target_requests=8))["autoscaling_config"]
    assert (growing["min_replicas"], growing["max_replicas"], growing["target_ongoing_requests"]) == (1, 3, 8.0)
    with pytest.raises(ConfigError, match="must not be below"):
        load_settings(home=tmp_path, engine={"replicas": 4, "autoscaling": {"max_replicas": 3}})


@pytest.mark.parametrize(
    ("name", "allowed", "least"),
    [
        ("local", "never", None),
        ("local", "candidates", None),
        ("local", "always", 0),
        ("engine-0123456789ab", "never", None),
        ("engine-0123456789ab", "candidates", 0),
        ("engine-0123456789ab", "always", 0),
    ],
)
def test_only_engines_that_may_idle_go_to_zero_and_they_start_loaded(
    name: str, allowed: str, least: int | None
) -> None:
    found = scale(engine(name, replicas=2, scale_to_zero=allowed))
    if least is None:
        assert found == {"num_replicas": 2}
    else:
        config = found["autoscaling_config"]
        assert (config["min_replicas"], config["initial_replicas"], config["max_replicas"]) == (0, 2, 2)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = connect(load_settings(home=tmp_path)[0])
    yield found
    found.dispose()


class Holder:
    """An engine that takes every adapter."""

    template_digest = "t"

    def __init__(self, settings: EngineSettings, base: Any) -> None:
        self.settings, self.base = settings, base

    def models(self) -> list[Any]:
        return []

    def load_adapter(self, name: str, path: Path | str, *, expected_sha256: str | None = None) -> Any:
        return None

    def unload_adapter(self, name: str) -> bool:
        return True


def replica(database: Database, base: Any, name: str, **autoscaling: Any) -> Reconciler:
    return Reconciler(Holder(engine(**autoscaling), base), database, name)


def test_versions_of_an_idle_engine_stay_servable_and_newly_wanted_ones_wake_it(
    database: Database, engine: LocalEngine, version_of: Callable[..., Version], adapters: dict[str, Path]
) -> None:
    known, later = version_of(3, adapters["red"]), version_of(4, adapters["blue"])
    want(database, known, "local")
    first = replica(database, engine.base, "first", scale_to_zero="always")
    first.tick()
    first.beat()
    assert ready(database, "triage/3")
    first.close()
    assert [r.state for r in reports(database, "triage/3")] == ["idle"]
    assert ready(database, "triage/3", live_after_s=1e-6)  # however long ago it went
    assert asleep(database) == set()
    want(database, later, "local")
    assert (ready(database, "triage/4"), asleep(database)) == (False, {"local"})
    second = replica(database, engine.base, "second", scale_to_zero="always")
    second.start()
    assert (ready(database, "triage/3"), ready(database, "triage/4"), asleep(database)) == (True, True, set())
    assert {r.replica_id for r in reports(database)} == {"second"}
    second.close()


def test_versions_of_an_engine_that_may_not_idle_go_with_its_last_replica(
    database: Database, engine: LocalEngine, version_of: Callable[..., Version], adapters: dict[str, Path]
) -> None:
    want(database, version_of(3, adapters["red"]), "local")
    only = replica(database, engine.base, "only")
    only.tick()
    only.beat()
    only.close()
    assert (ready(database, "triage/3"), reports(database), asleep(database)) == (False, [], set())


def test_waker_asks_a_sleeping_engine_for_its_health(
    tmp_path: Path,
    database: Database,
    engine: LocalEngine,
    version_of: Callable[..., Version],
    adapters: dict[str, Path],
) -> None:
    asked: list[str] = []

    async def health(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    idle = replica(database, engine.base, "first", scale_to_zero="always")
    idle.beat()
    idle.close()
    want(database, version_of(3, adapters["red"]), "local")
    settings, _ = load_settings(home=tmp_path, engine={"autoscaling": {"scale_to_zero": "always"}})
    with Server(health) as url:
        waker = EngineWaker(settings, lambda name: f"{url}/{name}")
        assert waker.wake(database) == {"local"}
        for thread in list(waker._asking.values()):
            thread.join()
    assert asked == ["/local/healthz"]
    never, _ = load_settings(home=tmp_path)
    assert EngineWaker(never, lambda name: name).wake(database) == set()


@pytest.fixture(scope="module")
def idling(ray_session: None, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Settings]]:
    """An engine on Serve that goes when nobody asks for a second."""
    import ray.serve

    quick = {"base_model": str(base), "poll_interval_s": 0.1, "heartbeat_s": 0.2, "live_after_s": 3.0}
    idle = {
        "scale_to_zero": "always",
        "idle_s": 1.0,
        "look_back_s": 11.0,
        "downscale_delay_s": 0.5,
        "upscale_delay_s": 0.0,
    }
    settings, _ = load_settings(home=tmp_path_factory.mktemp("home"), engine=quick | {"autoscaling": idle})
    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    ray.serve.run(build(settings), name="engine", route_prefix="/engine")
    yield f"http://127.0.0.1:{port}/engine", settings
    ray.serve.shutdown()


def wait_for_no_replica() -> None:
    import ray.serve

    deadline = time.monotonic() + 120
    while ray.serve.status().applications["engine"].deployments["Engine"].replica_states:
        assert time.monotonic() < deadline, ray.serve.status()
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
def test_first_request_to_an_engine_without_a_replica_is_answered(
    idling: tuple[str, Settings], version_of: Callable[..., Version], adapters: dict[str, Path]
) -> None:
    url, settings = idling
    database = connect(settings)
    name = want(database, version_of(3, adapters["red"]), "local").model_name
    waiting = {"timeout": 120.0, "max_retries": 0, "api_key": engine_token(settings)}
    with openai.OpenAI(base_url=f"{url}/v1", **waiting) as client:  # type: ignore[arg-type]
        client.models.list()  # it may have gone before it saw the version
        wait_ready(database, "triage/3", 60.0, live_after_s=3.0)
        wait_for_no_replica()
        assert ready(database, "triage/3")
        answer = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=4, seed=1)  # type: ignore[arg-type]
        assert answer.choices[0].message.content is not None
        assert {m.id for m in client.models.list()} == {"base", name}
    database.dispose()
