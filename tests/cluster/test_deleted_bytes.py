"""Nothing deleted is left in PostgreSQL's write-ahead log, also where the server has put it aside."""

import uuid
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.deleted_bytes import remove_traces
from cluster.settings import load_settings

CANARY = "canary-" + "5f1d7c20" * 8
SEGMENT = 16 * 2**20
pytestmark = pytest.mark.postgres


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Engine]:
    engine = connect(load_settings(database={"url": postgres_url})[0])
    yield engine
    engine.dispose()


def run(engine: Engine, *statements: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def segments_with_canary(engine: Engine) -> list[str]:
    query = "SELECT name FROM pg_ls_waldir() WHERE position(:canary in pg_read_binary_file('pg_wal/' || name)) > 0"
    with engine.connect() as connection:
        return list(connection.execute(sa.text(query), {"canary": CANARY.encode()}).scalars())


def delete_over_segments(engine: Engine) -> None:
    """Rows with the canary in three segments of the log, deleted again."""
    run(engine, "CREATE TABLE told (x text)")
    for _ in range(3):
        run(engine, f"INSERT INTO told SELECT '{CANARY}' FROM generate_series(1, 1000)", "SELECT pg_switch_wal()")
    run(engine, "TRUNCATE told")


def test_segments_that_the_server_put_aside_are_written_over(postgres: Engine) -> None:
    delete_over_segments(postgres)
    assert len(segments_with_canary(postgres)) >= 3
    said = remove_traces(postgres, (), 10.0, 64 * SEGMENT)
    assert segments_with_canary(postgres) == []
    assert said.startswith("ended, and ") and "more wait" not in said and "held" not in said


def test_what_is_left_aside_is_said(postgres: Engine) -> None:
    delete_over_segments(postgres)
    said = remove_traces(postgres, (), 10.0, 0)
    assert said.startswith("ended, and 0 segments") and "beyond erasure.overwrite_wal_mb" in said
    assert segments_with_canary(postgres) != []


def test_segments_that_a_slot_holds_are_said(postgres: Engine) -> None:
    run(postgres, "SELECT pg_create_physical_replication_slot('told', true)")
    try:
        delete_over_segments(postgres)
        said = remove_traces(postgres, (), 10.0, 64 * SEGMENT)
    finally:
        run(postgres, "SELECT pg_drop_replication_slot('told')")
    assert "from before are held by the server" in said


def test_a_role_without_the_rights_leaves_the_log_and_says_why(postgres: Engine, postgres_url: str) -> None:
    role = f"rayloop_{uuid.uuid4().hex[:8]}"
    run(postgres, f"CREATE ROLE {role} LOGIN")
    try:
        plain = sa.create_engine(sa.make_url(postgres_url).set(drivername="postgresql+psycopg", username=role))
        said = remove_traces(plain, (), 10.0, SEGMENT)
        plain.dispose()
    finally:
        run(postgres, f"DROP ROLE {role}")
    assert said.startswith("left to the server") and "permission denied for function pg_switch_wal" in said
