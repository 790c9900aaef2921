"""The migrations give exactly the tables that the code uses."""

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Engine

from cluster.database import MIGRATIONS, connect, is_current, upgrade
from cluster.errors import ConfigError
from cluster.settings import Settings, load_settings
from cluster.tables import metadata
from tests.processes import rayloop


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


def test_schema_is_current_once_migrated_and_behind_before(database: Engine) -> None:
    assert is_current(database)
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0000'"))
    assert not is_current(database)


EDITS = {
    "ALTER TABLE leases DROP COLUMN holder": "no column leases.holder",
    "DROP TABLE judged_answers": "no table judged_answers",
    "ALTER TABLE routes ADD COLUMN canary TEXT": "a column routes.canary too much",
    "CREATE TABLE made_by_others (id INTEGER)": None,
}
"""What another edit of the migration may have done, and how it is told."""


@pytest.mark.parametrize(("edit", "told"), EDITS.items())
def test_database_of_another_edit_is_refused_in_one_line(database: Engine, edit: str, told: str | None) -> None:
    with database.begin() as connection:
        connection.execute(sa.text(edit))
    if told is None:
        upgrade(database)
        return
    with pytest.raises(ConfigError) as refused:
        upgrade(database)
    shown = database.url.render_as_string(hide_password=True)
    assert (refused.value.field, refused.value.value) == ("database.url", shown)
    assert told in str(refused.value) and "empty database" in str(refused.value)


def test_column_that_must_be_filled_is_another_column(database: Engine) -> None:
    with database.begin() as connection:
        connection.execute(sa.text("DROP TABLE leases"))
        connection.execute(sa.text("CREATE TABLE leases (name VARCHAR, holder VARCHAR, until_us BIGINT)"))
    with pytest.raises(ConfigError, match=r"another leases\.name"):
        upgrade(database)


def test_many_differences_are_counted(database: Engine) -> None:
    with database.begin() as connection:
        for table in ("judged_answers", "tool_replies", "training_jobs", "uploaded_files", "leases"):
            connection.execute(sa.text(f"DROP TABLE {table}"))
    with pytest.raises(ConfigError, match="and 2 more"):
        upgrade(database)


def test_unknown_revision_is_told(database: Engine) -> None:
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'f00d'"))
    with pytest.raises(ConfigError, match=r"revision that is not known here .*f00d"):
        upgrade(database)


@pytest.mark.parametrize("command", ["status", "curate"])
def test_command_on_an_old_database_says_one_line(tmp_path: Path, database_url: str, command: str) -> None:
    engine = connect(load_settings(database={"url": database_url})[0])
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE events DROP COLUMN workspace"))
    engine.dispose()
    done = rayloop(command, RAYLOOP_HOME=str(tmp_path), RAYLOOP_DATABASE__URL=database_url)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: database.url='") and database_url.rpartition("/")[2] in line
    assert "no column events.workspace" in line and "empty database" in line


def test_empty_database_is_not_current(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'empty.db'}")
    assert not is_current(engine)
    engine.dispose()


def test_files_of_migrations_are_named_for_their_revision() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    revisions = list(ScriptDirectory.from_config(config).walk_revisions())
    assert [Path(r.path).name.partition("_")[0] for r in revisions] == [r.revision for r in revisions]
    assert ScriptDirectory.from_config(config).get_current_head() == max(r.revision for r in revisions)


def test_connecting_to_a_current_database_does_not_import_alembic(settings: Settings) -> None:
    connect(settings).dispose()
    code = "import sys; from cluster.database import connect; from cluster.settings import load_settings; "
    code += f"connect(load_settings(home={str(settings.home)!r})[0]); assert 'alembic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_event_ids_have_no_rowid_on_sqlite(settings: Settings) -> None:
    engine = connect(load_settings(home=settings.home)[0])
    with engine.connect() as connection:
        sql = connection.execute(sa.text("SELECT sql FROM sqlite_master WHERE name = 'event_ids'")).scalar_one()
    engine.dispose()
    assert "WITHOUT ROWID" in sql
