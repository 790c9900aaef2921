"""Sealing: what lies in Parquet afterwards, and that nothing changes who is killed when."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US
from cluster.errors import ConfigError, ConflictError, UnavailableError
from cluster.settings import Settings, load_settings
from cluster.tables import event_bodies, event_ids, events, partitions
from data import seal as sealing
from data.log import EventLog
from data.partitions.merkle import merkle_root
from data.partitions.partition import Partition, read_partitions
from data.seal import seal
from tests.data.days import AFTER_US, DAY0, asked, at, said, three_days


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", seal={"page_events": 7})[0]


def registered(engine: Engine) -> list[Partition]:
    with engine.connect() as connection:
        return read_partitions(connection, state=None)


def files(settings: Settings) -> dict[str, bytes]:
    root = Path(settings.events_root)
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def count(engine: Engine, table: sa.Table) -> int:
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def test_finished_days_lie_in_parquet_with_their_count_hash_and_root(database: Engine, settings: Settings) -> None:
    three_days(database)
    EventLog(database).append([asked("today", 3)])
    before = list(EventLog(database).scan())
    report = seal(database, settings, AFTER_US)
    assert [p.day for p in report.partitions] == [DAY0, "2024-10-05", "2024-10-06"]
    assert (report.events, report.sealed_upto, report.waiting) == (60, 60, 4)  # and three `partition.sealed`
    for partition in report.partitions:
        table = pq.read_table(f"{partition.location}/{partition.path}")
        assert partition.path.startswith(f"dt={partition.day}/")
        assert len(table) == partition.num_events == 20
        assert merkle_root(table["digest"].to_pylist()).hex() == partition.root
    assert list(EventLog(database).scan())[:61] == before


def test_sealing_again_changes_nothing(database: Engine, settings: Settings) -> None:
    three_days(database)
    seal(database, settings, AFTER_US)
    first = files(settings), registered(database), EventLog(database).last_seq()
    assert seal(database, settings, AFTER_US).partitions == []
    assert (files(settings), registered(database), EventLog(database).last_seq()) == first


def test_late_event_of_a_sealed_day_goes_to_a_further_file(database: Engine, settings: Settings) -> None:
    three_days(database)
    seal(database, settings, AFTER_US)
    before = files(settings)
    EventLog(database).append([said("late", 1)])
    report = seal(database, settings, AFTER_US + DAY_US)
    assert [(p.day, p.num_events) for p in report.partitions] == [("2024-10-05", 1), ("2024-10-07", 3)]
    assert before.items() < files(settings).items()


def test_bodies_leave_after_their_days_and_are_read_from_parquet(database: Engine, settings: Settings) -> None:
    three_days(database)
    log = EventLog(database)
    before = list(log.scan())
    assert seal(database, settings, AFTER_US).bodies_left == 0
    assert seal(database, settings, AFTER_US + 7 * DAY_US - 1).bodies_left == 0
    assert seal(database, settings, AFTER_US + 7 * DAY_US).bodies_left == 60
    assert count(database, event_bodies) == log.last_seq() - 60
    assert list(log.scan(page=11))[:60] == before
    assert [r.event.body for r in log.about("default", ["1-3"], kinds=["interaction"])] == [before[26].event.body]


def test_bodies_stay_while_their_file_is_not_as_sealed(database: Engine, settings: Settings) -> None:
    three_days(database)
    partition = seal(database, settings, AFTER_US).partitions[1]
    Path(partition.location, partition.path).write_bytes(b"PAR1")
    with pytest.raises(UnavailableError, match=r"2024-10-05/1-60 is not as it was sealed"):
        seal(database, settings, AFTER_US + 8 * DAY_US)
    with database.connect() as connection:
        kept = sa.select(sa.func.count()).select_from(events.join(event_bodies, events.c.seq == event_bodies.c.seq))
        assert connection.execute(kept.where(partition.holds())).scalar_one() == 20


def test_event_ids_are_forgotten_after_their_window(database: Engine, settings: Settings) -> None:
    names = three_days(database)
    with database.begin() as connection:
        old = event_ids.c.event_id.in_(names[:25])
        connection.execute(event_ids.update().where(old).values(recorded_at_us=at(0)))
        connection.execute(events.update().where(events.c.seq <= 25).values(recorded_at_us=at(0)))
    now_us = at(30, 1)
    assert seal(database, settings, now_us).ids_forgotten == 25
    assert count(database, event_ids) == EventLog(database).last_seq() - 25


class Killed(BaseException):
    """Stands in for the end of the process."""


@contextmanager
def dying_at(fatal: int) -> Iterator[None]:
    """Die at the `fatal`-th step of a seal; the steps are the moments before and after each effect."""
    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == fatal:
            raise Killed

    def surrounded(name: str) -> Any:
        real = getattr(sealing, name)

        def effect(*arguments: Any) -> Any:
            step()
            result = real(*arguments)
            step()
            return result

        return effect

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_plan", "write_file", "_register", "_delete_bodies"):
            patch.setattr(sealing, name, surrounded(name))
        yield


def test_killed_at_any_step_and_run_again_gives_the_same(database: Engine, tmp_path: Path) -> None:
    three_days(database)
    at_once = load_settings(home=tmp_path / "home", seal={"page_events": 7, "keep_days": 0, "partition_events": 25})[0]
    kills = 0
    for fatal in itertools.count(1):
        with dying_at(fatal):
            try:
                seal(database, at_once, AFTER_US)
                break
            except Killed:
                kills += 1
    assert kills >= 4
    assert [(p.name, p.num_events, p.state) for p in registered(database)] == [
        (f"{DAY0}/1-25", 20, "sealed"),
        ("2024-10-05/1-25", 5, "sealed"),
        ("2024-10-05/26-50", 15, "sealed"),
        ("2024-10-06/26-50", 10, "sealed"),
        ("2024-10-06/51-60", 10, "sealed"),
    ]
    assert set(files(at_once)) == {p.path for p in registered(database)}
    assert len(EventLog(database).read(kinds=["partition.sealed"])) == 5
    assert count(database, event_bodies) == 5


def test_location_that_is_none_is_refused_before_anything_happens(database: Engine, settings: Settings) -> None:
    three_days(database)
    wrong = settings.model_copy(update={"storage": settings.storage.model_copy(update={"events": "s4://nowhere/x"})})
    with pytest.raises(ConfigError, match=r"storage\.events='s4://nowhere/x' is no location"):
        seal(database, wrong, AFTER_US)
    assert registered(database) == []


def test_location_that_cannot_be_written_says_so(database: Engine, settings: Settings, tmp_path: Path) -> None:
    three_days(database)
    (tmp_path / "file").write_text("in the way")
    wrong = settings.model_copy(
        update={"storage": settings.storage.model_copy(update={"events": str(tmp_path / "file")})}
    )
    with pytest.raises(UnavailableError, match=r"cannot be written .* set `storage\.events`"):
        seal(database, wrong, AFTER_US)


def test_second_seal_at_the_same_time_is_refused(database: Engine, settings: Settings) -> None:
    from cluster.database import exclusive

    with exclusive(database, sealing.LOCK), pytest.raises(ConflictError, match="another process holds the lock"):
        seal(database, settings, AFTER_US)
    assert seal(database, settings, AFTER_US).partitions == []


def test_damaged_body_is_sealed_without_it(database: Engine, settings: Settings) -> None:
    EventLog(database).append([asked("i1", text="x" * 2000)])
    with database.begin() as connection:
        connection.execute(event_bodies.update().values(body=b"no zlib"))
    (partition,) = seal(database, settings, AFTER_US).partitions
    assert pq.read_table(f"{partition.location}/{partition.path}")["body"].to_pylist() == [None]


def test_partitions_of_another_generation_have_another_path() -> None:
    from data.partitions.partition import next_path, path_of

    first = Partition(0, DAY0, 9, "sealed", "/x", path_of(DAY0, 0, 9), 9)
    second = replace(first, path=next_path(first))
    assert (first.path, second.path) == (
        f"dt={DAY0}/000000000001-000000000009.r0.parquet",
        f"dt={DAY0}/000000000001-000000000009.r1.parquet",
    )
    assert next_path(second).endswith(".r2.parquet")


def test_partitions_table_is_empty_before_the_first_seal(database: Engine) -> None:
    assert count(database, partitions) == 0
