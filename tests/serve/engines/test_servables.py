"""What engines are asked to hold, and what they say of it, on both databases."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, InputError, NotFoundError, UnavailableError
from cluster.registry import Version
from cluster.settings.engines import EngineSettings
from cluster.tables import servable_replicas
from serve.engines.local import LocalEngine
from serve.engines.reconciler import Reconciler
from serve.servables import list_servables, ready, reports, unwant, wait_ready, want
from tests.serve.engines import models


@pytest.fixture(autouse=True)
def quick_settings(engine: LocalEngine, engine_settings: EngineSettings) -> Iterator[None]:
    """Short intervals; the shared engine gets its own settings back."""
    quick = {"poll_interval_s": 0.02, "heartbeat_s": 0.05, "live_after_s": 2.0, "unload_delay_s": 5.0}
    engine.apply(engine_settings.model_copy(update=quick))
    yield
    engine.apply(engine_settings)


class Clock:
    """A clock that stands until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reconciler(engine: LocalEngine, database: Engine, clock: Clock) -> Iterator[Reconciler]:
    reconciler = Reconciler(engine, database, "replica-1", clock=clock)
    yield reconciler
    reconciler.close()


def test_wanted_version_is_loaded_checked_and_ready(
    reconciler: Reconciler, engine: LocalEngine, database: Engine, version_of, adapters: dict[str, Path]
) -> None:
    version = version_of(3, adapters["red"])
    servable = want(database, version, "local")
    assert servable.tenant == "acme"
    assert servable.model_name == f"triage-3-{version.adapter_sha256[:12]}"
    assert not ready(database, "triage/3")
    reconciler.tick()
    assert not ready(database, "triage/3")  # it has not said that it lives
    reconciler.beat()
    assert ready(database, "triage/3")
    wait_ready(database, "triage/3", 0.0)
    assert servable.model_name in [m.name for m in engine.models()]
    want(database, version_of(1, None), "local")
    reconciler.tick()
    assert ready(database, "triage/1")
    assert {s.version for s in list_servables(database)} == {"triage/1", "triage/3"}


def damage_nothing(_folder: Path) -> None:
    """The version's description is what is wrong."""


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def swap_bytes(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


BAD: list[tuple[Callable[[Path], None], dict[str, object], str]] = [
    (truncate, {}, "is truncated"),
    (shutil.rmtree, {}, "does not exist"),
    (swap_bytes, {}, "its digest is"),
    (damage_nothing, {"tags": {"base_revision": "sha256:other"}}, "made for another base model"),
    (
        damage_nothing,
        {"tags": {}, "base_model": "meta-llama/Llama-3.2-1B"},
        "made for another base model: meta-llama",
    ),
    (damage_nothing, {"tags": {"template_digest": "f" * 64}}, "trained with the chat template ffff"),
]


@pytest.mark.parametrize(("damage", "changes", "reason"), BAD)
def test_bad_version_fails_with_its_reason_while_others_serve(
    reconciler: Reconciler, database: Engine, version_of, adapters: dict[str, Path], tmp_path: Path,
    damage: Callable[[Path], None], changes: dict[str, object], reason: str,
) -> None:  # fmt: skip
    folder = tmp_path / "bad"
    shutil.copytree(adapters["red"], folder)
    bad = version_of(4, folder, **changes)
    damage(folder)
    want(database, bad, "local")
    want(database, version_of(3, adapters["blue"]), "local")
    reconciler.tick()
    reconciler.beat()
    assert ready(database, "triage/3")
    assert not ready(database, "triage/4")
    with pytest.raises(ConflictError, match=f"version triage/4 cannot be served: .*{reason}"):
        wait_ready(database, "triage/4", 1.0)
    assert [r.state for r in reports(database, "triage/4")] == ["failed"]


def test_over_rank_and_other_base_of_one_shape_fail(
    reconciler: Reconciler, database: Engine, version_of, make_adapter, base: Path, tmp_path: Path
) -> None:
    want(database, version_of(5, make_adapter(tmp_path / "wide", seed=1, rank=65)), "local")
    other = models.build_base(tmp_path / "other", seed=9)
    want(database, version_of(6, models.build_adapter(other, tmp_path / "foreign", seed=1), tags={}), "local")
    reconciler.tick()
    states = reconciler.states()
    assert "rank 65 is over the engine's 64" in (states["triage/5"][1] or "")
    assert "made for another base model" in (states["triage/6"][1] or "")


def test_failed_version_is_tried_again_when_asked_or_after_a_while(
    reconciler: Reconciler,
    database: Engine,
    version_of,
    adapters: dict[str, Path],
    tmp_path: Path,
    clock: Clock,
) -> None:
    folder = tmp_path / "late"
    version = version_of(7, adapters["blue"], adapter_path=folder)
    want(database, version, "local")
    reconciler.tick()
    reconciler.beat()
    assert reconciler.states()["triage/7"][0] == "failed"
    shutil.copytree(adapters["blue"], folder)
    reconciler.tick()
    assert reconciler.states()["triage/7"][0] == "failed"
    want(database, version, "local")
    assert reports(database, "triage/7") == []
    reconciler.tick()
    assert reconciler.states()["triage/7"] == ("ready", None)
    reconciler.beat()
    assert ready(database, "triage/7")

    late = version_of(8, adapters["red"], adapter_path=tmp_path / "later")
    want(database, late, "local")
    reconciler.tick()
    shutil.copytree(adapters["red"], tmp_path / "later")
    clock.now += 31
    reconciler.tick()
    assert reconciler.states()["triage/8"][0] == "ready"


def test_unwanted_version_stays_for_its_delay_and_its_files_for_ever(
    reconciler: Reconciler,
    engine: LocalEngine,
    database: Engine,
    version_of,
    make_adapter,
    tmp_path: Path,
    clock: Clock,
) -> None:
    folder = make_adapter(tmp_path / "short", seed=12)
    name = want(database, version_of(9, folder), "local").model_name
    reconciler.tick()
    unwant(database, "triage/9")
    reconciler.tick()
    clock.now += 4.9
    reconciler.tick()
    assert name in [m.name for m in engine.models()]
    clock.now += 0.2
    reconciler.tick()
    let_go(reconciler)
    assert name not in [m.name for m in engine.models()]
    assert reports(database, "triage/9") == []
    assert (folder / "adapter_model.safetensors").is_file()
    with pytest.raises(NotFoundError, match="no engine is asked to hold"):
        ready(database, "triage/9")


def let_go(reconciler: Reconciler) -> None:
    """Wait for the unloads under way."""
    for left in list(reconciler._leaving.values()):
        left.result(5)


def test_same_weights_asked_for_from_another_place_stay_loaded(
    reconciler: Reconciler, engine: LocalEngine, database: Engine, version_of, adapters: dict[str, Path], tmp_path: Path
) -> None:
    version = version_of(3, adapters["red"])
    want(database, version, "local")
    reconciler.tick()
    with unloads_held_up(engine) as (unloaded, _):
        want(database, version, "local", adapter_location="s3://adapters/triage-3")
        reconciler.tick()
        assert reconciler.states()["triage/3"] == ("ready", None)
        assert unloaded == []


def test_unload_that_waits_holds_up_no_other_version(
    reconciler: Reconciler, engine: LocalEngine, database: Engine, version_of, adapters: dict[str, Path], clock: Clock
) -> None:
    name = want(database, version_of(3, adapters["red"]), "local").model_name
    reconciler.tick()
    with unloads_held_up(engine) as (unloaded, go_on):
        unwant(database, "triage/3")
        reconciler.tick()
        clock.now += 6
        want(database, version_of(4, adapters["blue"]), "local")
        reconciler.tick()
        assert reconciler.states() == {"triage/4": ("ready", None)}
        want(database, version_of(3, adapters["red"]), "local")  # again, while it is on its way out
        reconciler.tick()
        assert reconciler.states()["triage/3"] == ("loading", None)
        go_on.set()
        let_go(reconciler)
    assert unloaded == [name]
    reconciler.tick()
    assert reconciler.states()["triage/3"] == ("ready", None)


@contextmanager
def unloads_held_up(engine: LocalEngine) -> Iterator[tuple[list[str], threading.Event]]:
    """Names that were to be unloaded, and what lets them go."""
    unloaded, go_on, real = list[str](), threading.Event(), engine.unload_adapter

    def unload(name: str) -> bool:
        unloaded.append(name)
        assert go_on.wait(10)
        return real(name)

    engine.unload_adapter = unload  # type: ignore[method-assign]
    try:
        yield unloaded, go_on
    finally:
        go_on.set()
        del engine.unload_adapter


def test_readiness_needs_every_live_replica_and_no_dead_one(
    reconciler: Reconciler, engine: LocalEngine, database: Engine, version_of,
    adapters: dict[str, Path],
) -> None:  # fmt: skip
    want(database, version_of(3, adapters["red"]), "local")
    reconciler.tick()
    reconciler.beat()
    other = Reconciler(engine, database, "replica-2")
    other.beat()
    assert not ready(database, "triage/3")
    with pytest.raises(UnavailableError, match=r"was not ready after 0\.1 s \(local/replica-1 ready\)"):
        wait_ready(database, "triage/3", 0.1, poll_s=0.02)
    other.tick()
    assert ready(database, "triage/3")
    with database.begin() as connection:
        r = servable_replicas
        dead = sa.update(r).where(r.c.replica_id == "replica-2").values(heartbeat_us=1, state="failed")
        connection.execute(dead)
    assert ready(database, "triage/3")
    reconciler.beat()  # forgets what died long ago
    assert {r.replica_id for r in reports(database)} == {"replica-1"}


def test_threads_follow_the_table_and_leave_it_clean(
    engine: LocalEngine, database: Engine, version_of, adapters: dict[str, Path]
) -> None:
    reconciler = Reconciler(engine, database, "replica-3")
    reconciler.start()
    want(database, version_of(3, adapters["red"]), "local")
    began = time.monotonic()
    wait_ready(database, "triage/3", 10.0, poll_s=0.02)
    assert time.monotonic() - began < 5
    reconciler.close()
    with database.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(servable_replicas)).scalar() == 0


def test_database_away_leaves_the_engine_serving(
    engine: LocalEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = sa.create_engine(f"sqlite:///{tmp_path / 'empty.db'}")
    reconciler = Reconciler(engine, away, "replica-4")
    reconciler.start()
    time.sleep(0.1)
    reconciler.close()
    away.dispose()
    assert "serving what is loaded" in caplog.text
    assert engine.scheduler.alive


def test_version_without_its_adapter_here_is_refused(database: Engine, version_of, adapters: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="has an adapter that is not on this machine"):
        want(database, version_of(3, adapters["red"], adapter_path=None), "local")


@pytest.mark.parametrize(
    ("tags", "behind"),
    [
        ({}, None),  # a base as it comes
        ({"rayloop.method": "sft"}, ""),  # a whole model that was trained behind no prompt
        ({"rayloop.method": "sft", "prompt_digest": "d" * 64}, "d" * 64),
    ],
)
def test_an_engine_is_told_behind_which_prompt_a_whole_model_was_trained(
    tags: dict[str, str], behind: str | None, database: Engine, version_of: Callable[..., Version]
) -> None:
    assert want(database, version_of(3, None, tags=tags), "local").prompt_digest == behind
    assert [servable.prompt_digest for servable in list_servables(database, "local")] == [behind]
