"""Fixtures that every folder's tests share: databases, settings, one Ray session."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psycopg
import pytest
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.settings import Settings, load_settings
from tests.databases import PostgresCopies, place_database, place_sqlite

hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")
POSTGRES = os.environ.get("RAYLOOP_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/postgres")
SHARED_DATA = Path(os.environ.get("RAYLOOP_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


PARTS = ("ray", "serve", "rest")
"""Parts of the tests that may run beside each other: only the first has a Ray cluster."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=PARTS, help="only what needs Ray, what serves, or the rest")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file without a test of this part is not even imported, with all that it imports in turn."""
    part = config.getoption("part")
    if part is None or collection_path.suffix != ".py":
        return None
    is_ours = _own_part(collection_path) == part or (part == "ray" and _says_ray(collection_path))
    return None if is_ours else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("part")
    if part is None:
        return
    config.hook.pytest_deselected(items=[item for item in items if _part_of(item) != part])
    items[:] = [item for item in items if _part_of(item) == part]


def _part_of(item: pytest.Item) -> str:
    if item.get_closest_marker("ray") is None:
        return _own_part(item.path)
    if not _says_ray(item.path):  # no part would find it
        raise pytest.UsageError(f"{item.nodeid} must have its marker `ray` in its own file")
    return "ray"


def _own_part(file: Path) -> str:
    """Of the tests in a file that need no Ray."""
    return "serve" if Path(__file__).with_name("serve") in file.parents else "rest"


def _says_ray(file: Path) -> bool:
    return "mark.ray" in file.read_text(encoding="utf-8")


def skip_or_fail(reason: str) -> None:
    """Skip where a server may be missing; in CI (`RAYLOOP_TEST_STRICT=1`) that is a failure."""
    if os.environ.get("RAYLOOP_TEST_STRICT") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; its location is `RAYLOOP_TEST_DATA`."""
    if not SHARED_DATA.is_dir():
        skip_or_fail(f"no data at {SHARED_DATA}; set RAYLOOP_TEST_DATA to the folder that holds it")
    return SHARED_DATA


@pytest.fixture(scope="session")
def postgres_copies() -> Iterator[PostgresCopies]:
    """Migrated databases of the PostgreSQL server."""
    try:
        copies = PostgresCopies(POSTGRES)
    except psycopg.OperationalError as error:
        cause = str(error).splitlines()[0]
        skip_or_fail(f"no PostgreSQL at {POSTGRES} ({cause}); start one or set RAYLOOP_TEST_POSTGRES")
    yield copies
    copies.close()


@pytest.fixture
def postgres_url(postgres_copies: PostgresCopies) -> Iterator[str]:
    """URL of a PostgreSQL database with the newest schema and no row, dropped afterwards."""
    name = postgres_copies.take()
    yield postgres_copies.url(name)
    postgres_copies.drop(name)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with the newest schema and no row; each test that asks for it runs on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        place_sqlite(tmp_path / "test.db")
        return f"sqlite:///{tmp_path / 'test.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Defaults with `home` in a temporary folder: embedded SQLite and MLflow."""
    return load_settings(home=tmp_path / "home")[0]


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised MLflow database; MLflow takes seconds to make one, so tests copy this."""
    from cluster import tracking

    home = tmp_path_factory.mktemp("mlflow")
    tracking.client(load_settings(home=home)[0])
    return home / "mlflow.db"


@pytest.fixture
def mlflow_settings(settings: Settings, empty_mlflow: Path) -> Settings:
    """`settings` with an empty MLflow database in place."""
    settings.home.mkdir(parents=True)
    shutil.copy(empty_mlflow, settings.home / "mlflow.db")
    return settings


@pytest.fixture
def database(database_url: str, tmp_path: Path) -> Iterator[Engine]:
    """An engine on SQLite, then on PostgreSQL, with the newest schema."""
    engine = connect(load_settings(home=tmp_path / "home", database={"url": database_url})[0])
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_database(settings: Settings) -> Iterator[Engine]:
    """An engine on SQLite with the newest schema, for tests whose point is not the database."""
    place_database(settings)
    engine = connect(settings)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray cluster for the whole test session."""
    from cluster.runtime import ray_session as started_here

    os.environ.pop("RAY_ADDRESS", None)
    with started_here(load_settings(ray={"num_cpus": 6, "object_store_mb": 256})[0]):
        yield


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers directory with a tiny model that answers `toy_examples` in JSON, right about two
    times in three; trained once a session, in seconds."""
    from cluster.settings.training import ToySettings
    from tests.toys import toy_examples
    from train.toy import build_toy_base

    out = tmp_path_factory.mktemp("toy") / "base"
    shape = ToySettings(
        hidden=64, layers=2, heads=2, intermediate=160, vocab=340, epochs=12, batch_size=32, learning_rate=3e-3
    )
    build_toy_base(out, toy_examples(600, seed=1, outdated=0.8), shape)
    return out
