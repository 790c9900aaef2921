"""Fixtures that every folder's tests share: databases, settings, one Ray session."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.settings import Settings, load_settings

hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")
POSTGRES = os.environ.get("RAYLOOP_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/postgres")
SHARED_DATA = Path(os.environ.get("RAYLOOP_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


PARTS = ("ray", "rest")
"""Halves of the tests that may run beside each other: at most one of them has a Ray cluster."""
TRAINING = ("train", "tune")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=PARTS, help="only the tests that need Ray or train something, or only the rest")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("part")
    if part is None:
        return
    others = [item for item in items if (part == "ray") != _is_heavy(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def _is_heavy(item: pytest.Item) -> bool:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return folder in TRAINING or item.get_closest_marker("ray") is not None


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


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """URL of a fresh PostgreSQL database, dropped afterwards."""
    with fresh_postgres() as url:
        yield url


@contextmanager
def fresh_postgres() -> Iterator[str]:
    """The same for fixtures of a wider scope."""
    name = f"rayloop_test_{uuid.uuid4().hex[:12]}"
    try:
        admin = psycopg.connect(POSTGRES, autocommit=True, connect_timeout=3)
    except psycopg.OperationalError as error:
        cause = str(error).splitlines()[0]
        skip_or_fail(f"no PostgreSQL at {POSTGRES} ({cause}); start one or set RAYLOOP_TEST_POSTGRES")
    with admin:
        admin.execute(f"CREATE DATABASE {name}")
        yield sa.make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database; each test that asks for it runs on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
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
    """A migrated engine on SQLite, then on PostgreSQL."""
    engine = connect(load_settings(home=tmp_path / "home", database={"url": database_url})[0])
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_database(settings: Settings) -> Iterator[Engine]:
    """A migrated engine on SQLite, for tests whose point is not the database."""
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
