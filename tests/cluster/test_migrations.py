"""The migrations give exactly the tables that the code uses."""

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.engine import Engine

from cluster.database import connect, upgrade
from cluster.settings import Settings, load_settings
from cluster.tables import metadata


def differences(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))


def test_migrated_schema_equals_the_tables(database: Engine) -> None:
    assert differences(database) == []


def test_comparison_sees_a_difference(database: Engine) -> None:
    with database.begin() as connection:
        connection.execute(sa.text("ALTER TABLE leases ADD COLUMN surprise TEXT"))
        connection.execute(sa.text("DROP INDEX events_by_kind"))
    assert len(differences(database)) == 2


def test_keys_and_defaults_are_the_same(database: Engine) -> None:
    """What `compare_metadata` does not look at."""
    found = sa.MetaData()
    found.reflect(database)
    for table in metadata.sorted_tables:
        migrated = found.tables[table.name]
        assert [c.name for c in migrated.primary_key] == [c.name for c in table.primary_key], table.name
        assert [c.name for c in migrated.columns] == [c.name for c in table.columns], table.name
        assert not any(c.server_default for c in migrated.columns if not c.primary_key), table.name


def test_upgrade_twice_changes_nothing(database: Engine) -> None:
    upgrade(database)
    assert differences(database) == []


def test_event_ids_have_no_rowid_on_sqlite(settings: Settings) -> None:
    engine = connect(load_settings(home=settings.home)[0])
    with engine.connect() as connection:
        sql = connection.execute(sa.text("SELECT sql FROM sqlite_master WHERE name = 'event_ids'")).scalar_one()
    engine.dispose()
    assert "WITHOUT ROWID" in sql
