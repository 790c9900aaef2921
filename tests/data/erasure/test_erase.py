"""Erasure: nothing of the person is left in any byte, everything else is, and roots still hold."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster import tracking
from cluster.clock import DAY_US
from cluster.errors import ConflictError, NotFoundError, UnavailableError
from cluster.registry import Registry, Version
from cluster.settings import Settings, load_settings
from cluster.tables import (
    arm_statistics,
    erasures,
    event_bodies,
    events,
    experiment_users,
    judged_answers,
    tombstones,
    tool_replies,
)
from data.erasure import erase as erasing
from data.erasure import files, partitions, versions
from data.erasure.erase import erase
from data.erasure.person import Person, erased_users
from data.events import Event, parse_body
from data.feedback import pseudonym, pseudonym_secret
from data.group_commit import GroupCommit
from data.importers.run import ImportOptions, import_source
from data.importers.source import file_source
from data.intake.batches import Intake
from data.intake.items import Identity
from data.log import EventLog
from data.manifest import list_datasets, read_examples
from data.partitions.partition import read_partitions
from data.publish import publish
from data.seal import seal
from data.validate import check_files
from data.verify.run import verify_log
from tests.cluster.test_registry import make_adapter, make_base
from tests.data.days import asked, at, said
from tests.datasets import write_feedback_dataset
from train.plan import resolve_base

CANARY = "canary-5f1d7c20-jane-doe"
ANN = Person("default", "u001")
SPOOL = "router-somewhere-1.jsonl"


@pytest.fixture
def settings(tmp_path: Path, database: Engine) -> Settings:
    url = database.url.render_as_string(hide_password=False)
    return load_settings(home=tmp_path / "home", database={"url": url}, seal={"page_events": 5})[0]


def label(about: str, day: int) -> Event:
    body = parse_body("label", {"reviewer": "bob", "corrected": CANARY})
    return Event(
        "label", "default", "default", body, event_id=f"l-{about}", occurred_at_us=at(day), interaction_id=about
    )


def of_ann(day: int) -> list[Event]:
    """One day of Ann: asked briefly and at length, reacted, was labelled and quoted; a click without a user."""
    brief, long = f"u001-{2 * day}", f"u001-{2 * day + 1}"
    session = f"s-{CANARY}-{day}"
    click = parse_body("behaviour", {"action": "message", "text": CANARY})
    return [
        asked(brief, day, user="u001", text=CANARY, session_id=session),
        asked(long, day, user="u001", text=f"{CANARY} " * 200, session_id=session),
        said(f"f-{brief}", day, user="u001", about=brief, text=CANARY),
        said(f"q-{brief}", day, user="u002", about=brief, text=f"she asked {CANARY}"),
        label(long, day),
        Event(
            "behaviour", "default", "default", click, event_id=f"b-{day}", occurred_at_us=at(day), session_id=session
        ),
    ]


def of_others(day: int) -> list[Event]:
    names = [f"u{number:03d}-{day}" for number in range(2, 8)]
    return [e for n in names for e in (asked(n, day, user=n[:4]), said(f"f-{n}", day, user=n[:4], about=n))]


def fill(engine: Engine, settings: Settings) -> int:
    """Day 0 is sealed and has left the database, day 1 is sealed, day 2 is open; returns Ann's events."""
    log = EventLog(engine)
    log.append(of_others(0) + of_ann(0))
    seal(engine, settings, at(1, 1))
    log.append(of_others(1) + of_ann(1))
    seal(engine, settings, at(1, 1) + 7 * DAY_US)
    log.append([*of_ann(9), *of_others(9)])
    with engine.begin() as connection:
        for user in ("u001", "u002"):
            counted = {"experiment_id": "x", "period": "p", "arm": "stable", "user_id": user}
            connection.execute(arm_statistics.insert().values(**counted, sums='{"m": [1, 1]}'))
            seen = {"arm": "stable", "bucket": 0.5, "excluded": False, "segments": {}, "covariates": {}}
            seen |= {"experiment_id": "x", "user_id": user, "first_seen_us": 1}
            connection.execute(experiment_users.insert().values(**seen))
        judged = {"grader_version": "1", "reward": 0.5, "scores": {"tone": 0.5}, "reason": f"says {CANARY}"}
        connection.execute(judged_answers.insert().values(key="k", judged_at_us=1, **judged))
        owner = {"tenant": "default", "workspace": "default", "tool": "note", "idempotency_key": "once"}
        taken = {"arguments_digest": "d", "state": "done", "reply": {"reply": CANARY}, "begun_at_us": 1}
        connection.execute(tool_replies.insert().values(**owner, **taken))
    return 18


def fill_files(settings: Settings) -> None:
    """A dead router's spool, a dataset and a cache."""
    spool = settings.home / "spool" / SPOOL
    spool.parent.mkdir(parents=True)
    spool.write_bytes(b"".join(orjson.dumps(asdict(e)) + b"\n" for e in [*of_ann(9), *of_others(9)]))
    write_feedback_dataset(Path(settings.datasets_root))
    cache = settings.home / "evaluation" / "abc.json"
    cache.parent.mkdir()
    cache.write_text(f'{{"k": "{CANARY}"}}')


def places_with_canary(engine: Engine, settings: Settings) -> set[str]:
    """Every file that holds the canary: raw, or in the values of Parquet; PostgreSQL's own files too."""
    found = set()
    for file in settings.home.rglob("*"):
        if file.is_file() and (CANARY.encode() in file.read_bytes() or _in_parquet(file)):
            found.add(str(file.relative_to(settings.home)))
    return found | set(_in_database(engine))


def _in_parquet(file: Path) -> bool:
    return file.suffix == ".parquet" and CANARY in str(pq.read_table(file).to_pylist())


def _in_database(engine: Engine) -> Iterator[str]:
    if engine.dialect.name == "sqlite":
        path = Path(str(engine.url.database))
        files = [path, path.with_name(path.name + "-wal")]
    else:
        files = _files_of_postgres(engine)
    yield from (f"database:{f.suffix or f.name}" for f in files if f.exists() and CANARY.encode() in f.read_bytes())
    with engine.connect() as connection:
        for table in sa.inspect(connection).get_table_names():
            if any(CANARY in str(tuple(row)) for row in connection.execute(sa.text(f"SELECT * FROM {table}"))):
                yield f"table {table}"


def _files_of_postgres(engine: Engine) -> list[Path]:
    """Heap, index and TOAST files of this database, written out; none where they lie on another machine."""
    with psycopg.connect(
        engine.url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
    ) as c:
        c.execute("CHECKPOINT")
        base = c.execute("SELECT current_setting('data_directory') || '/base/' || oid FROM pg_database "
                         "WHERE datname = current_database()").fetchone()  # fmt: skip
    assert base is not None
    try:
        return [f for f in Path(base[0]).iterdir() if f.is_file()]
    except OSError:
        return []


def test_no_byte_of_the_person_is_left_and_the_rest_is_as_before(database: Engine, settings: Settings) -> None:
    count = fill(database, settings)
    fill_files(settings)
    log = EventLog(database)
    others = [r for r in log.scan() if CANARY not in str(r.event) and r.event.user_id != "u001"]
    with database.connect() as connection:
        roots = [(p.name, p.root, p.num_events) for p in read_partitions(connection)]
    before = places_with_canary(database, settings)
    assert {p.rpartition("/")[0] for p in before if p.startswith("events/")} == {
        "events/dt=2024-10-04",
        "events/dt=2024-10-05",
    }
    assert {f"spool/{SPOOL}", "evaluation/abc.json"} <= before
    assert {"table event_bodies", "table judged_answers", "table tool_replies"} <= before
    if database.dialect.name == "sqlite" or _files_of_postgres(database):
        assert any(place.startswith("database:") for place in before)
    report = erase(database, settings, ANN)
    assert places_with_canary(database, settings) == set()
    assert sum(report["events"].values()) == count
    assert report["interactions"] == 6 and report["projected_rows"] == 2
    assert report["write_ahead_log"].startswith("emptied" if database.dialect.name == "sqlite" else ("ended", "left"))
    left = [r for r in log.scan() if not r.erased and r.event.kind not in ("erasure", "partition.sealed")]
    assert left == [r for r in others if r.event.kind not in ("erasure", "partition.sealed")]
    with database.connect() as connection:
        assert [(p.name, p.root, p.num_events) for p in read_partitions(connection)] == roots
        assert connection.execute(sa.select(experiment_users.c.user_id)).scalars().all() == ["u002"]
    verified = verify_log(database, settings)
    assert (verified.erased, verified.faults) == (count, [])


@pytest.mark.parametrize("database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
def test_open_transaction_that_sees_the_person_is_waited_for(database: Engine, settings: Settings) -> None:
    fill(database, settings)
    impatient = settings.model_copy(update={"erasure": settings.erasure.model_copy(update={"wait_s": 0.2})})
    with database.connect().execution_options(isolation_level="REPEATABLE READ") as reader:
        reader.execute(sa.select(experiment_users.c.user_id)).all()
        with pytest.raises(UnavailableError, match=r"open transactions .* keep deleted rows"):
            erase(database, impatient, ANN)
    erase(database, settings, ANN)
    assert not any(place.startswith("database:") for place in places_with_canary(database, settings))


def test_datasets_lose_the_persons_examples_and_say_so(database: Engine, settings: Settings) -> None:
    fill(database, settings)
    fill_files(settings)
    before = list_datasets(settings)[0]
    theirs = 0
    for kind, splits in before.counts.items():
        for split in splits:
            theirs += read_examples(before.path, kind, split)["user_id"].to_pylist().count("u001")
    assert theirs > 0
    assert erase(database, settings, ANN)["datasets"] == [before.dataset_id]
    after = list_datasets(settings)[0]
    assert (after.dataset_hash, after.erased_rows) == (before.dataset_hash, theirs)
    assert sum(s.rows for s in after.shards) == sum(s.rows for s in before.shards) - theirs
    assert after.counts != before.counts
    check = check_files(after)
    assert (check.status, f"{theirs} examples were erased" in check.detail) == ("warning", True)


def test_the_same_call_again_gives_the_same_answer(database: Engine, settings: Settings) -> None:
    fill(database, settings)
    first = erase(database, settings, ANN)
    last = EventLog(database).last_seq()
    assert erase(database, settings, ANN) == first
    assert EventLog(database).last_seq() == last


def test_somebody_unknown_is_not_found_and_leaves_no_tombstone(database: Engine, settings: Settings) -> None:
    fill(database, settings)
    for unknown in (Person("default", "nobody"), Person("other", "u001")):
        with pytest.raises(NotFoundError, match=f"no event of this user in tenant '{unknown.tenant}'"):
            erase(database, settings, unknown)
    with database.connect() as connection:
        assert connection.execute(sa.select(tombstones)).all() == []


def test_tombstone_refuses_person_interaction_and_session_but_nobody_else(database: Engine, settings: Settings) -> None:
    fill(database, settings)
    erase(database, settings, ANN)
    batch = [
        said("new-1", user="u001", about="elsewhere"),
        said("new-2", user=None, about="u001-0"),
        Event("behaviour", "default", "default", {"action": "copy"}, event_id="new-3", session_id=f"s-{CANARY}-0"),
        said("new-4", user="u002", about="u002-0"),
        Event("feedback", "other", "default", {"type": "thumbs_up"}, event_id="new-5", user_id="u001"),
    ]
    statuses = [v.status for v in EventLog(database).append(batch)]
    assert statuses == ["refused", "refused", "refused", "accepted", "accepted"]


def test_intake_and_import_say_why_they_refuse(database: Engine, settings: Settings, tmp_path: Path) -> None:
    on = {"learning": {"enabled": True}, "feedback": {"explicit": True}}
    open_settings = load_settings(home=settings.home, **on)[0]
    name = pseudonym(pseudonym_secret(open_settings), "default", "jane")
    EventLog(database).append([asked("i-jane", user=name)])
    erase(database, settings, Person("default", name))
    item = {"event_id": "again", "interaction_id": "x", "type": "thumbs_up", "user": "jane"}
    with GroupCommit(EventLog(database), open_settings.log) as commit:
        intake = Intake(commit, open_settings)
        fine = {"interaction_id": "x", "type": "thumbs_up", "user": "joe"}
        refused, taken = intake.take_in_and_wait([item, fine], "feedback", Identity("default", "default"))
    assert (refused.status, taken.status) == ("rejected", "accepted")
    error = refused.as_dict()["error"]
    assert (error["code"], error["type"], error["param"]) == ("user_erased", "permission_error", "user")
    file = tmp_path / "again.jsonl"
    file.write_bytes(orjson.dumps(item | {"kind": "feedback"}) + b"\n" + orjson.dumps(fine | {"kind": "feedback"}))
    report = import_source(file_source(file), EventLog(database), open_settings, ImportOptions())
    assert (report.imported, report.rejected) == (1, 1)
    assert "erased" in report.problems[0].rule


class Killed(BaseException):
    """Stands in for the end of the process."""


STEPS = (
    (erasing, "raise_tombstone"),
    (erasing, "erase_records"),
    (partitions, "write_file"),
    (partitions, "update_partition"),
    (partitions, "remove_file"),
    (files, "datasets_with"),
    (files, "clean_spools"),
    (files, "_clean_shard"),
    (files, "clean_datasets"),
    (files, "drop_caches"),
    (versions, "mark_versions"),
    (erasing, "remove_traces"),
    (erasing, "_finish"),
)


@contextmanager
def dying_at(fatal: int) -> Iterator[None]:
    """Die at the `fatal`-th step; the steps are the moments before and after each effect."""
    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == fatal:
            raise Killed

    def surrounded(real: Any) -> Any:
        def effect(*arguments: Any) -> Any:
            step()
            result = real(*arguments)
            step()
            return result

        return effect

    with pytest.MonkeyPatch.context() as patch:
        for module, name in STEPS:
            patch.setattr(module, name, surrounded(getattr(module, name)))
        yield


def test_killed_at_any_step_and_called_again_ends_the_same(database: Engine, settings: Settings) -> None:
    count = fill(database, settings)
    fill_files(settings)
    theirs = list_datasets(settings)[0]
    kills = 0
    for fatal in itertools.count(1):
        with dying_at(fatal):
            try:
                report = erase(database, settings, ANN)
                break
            except Killed:
                kills += 1
    assert kills >= 15
    assert places_with_canary(database, settings) == set()
    assert (sum(report["events"].values()), report["datasets"]) == (count, [theirs.dataset_id])
    assert list_datasets(settings)[0].erased_rows > 0
    assert verify_log(database, settings).faults == []
    assert len(EventLog(database).read(kinds=["erasure"])) == 1


def test_versions_trained_on_the_person_are_marked_and_go_no_further(
    sqlite_database: Engine, mlflow_settings: Settings, tmp_path: Path
) -> None:
    settings = mlflow_settings
    dataset = write_feedback_dataset(Path(settings.datasets_root))
    registry = Registry(settings)
    base = make_base(tmp_path / "base")
    registry.register_base("triage", base)
    tainted = registry.register_adapter(
        "triage", make_adapter(tmp_path / "a"), base_model=base, dataset_id=dataset.dataset_id,
        dataset_hash=dataset.dataset_hash, lineage={"rayloop.gates": "passed", "rayloop.export.gguf": "/x/a.gguf"},
    )  # fmt: skip
    clean = registry.register_adapter(
        "triage", make_adapter(tmp_path / "c", b"other"), base_model=base, dataset_id="ds"
    )
    registry.set_alias("triage", "challenger", tainted, actor="test", reason="passed")
    EventLog(sqlite_database).append([asked("u001-0", user="u001")])
    quoting = {"evaluation": "report.html", "comparison": "comparison.html"}
    runs = []
    for kind, name in quoting.items():
        with tracking.run(settings, kind, tags={"rayloop.kind": kind}) as run:
            run.log_dataset(name=dataset.dataset_id, digest=dataset.dataset_hash, uri="d", context="evaluation")
            run.log_text("what she asked", name)
        runs.append(run)
    report = erase(sqlite_database, settings, ANN)
    left = {file.path for run in runs for file in run.client.list_artifacts(run.run_id)}
    assert left == {"settings.json"}
    assert (report["versions"], report["exports"]) == ([tainted.id], ["/x/a.gguf"])
    marked = registry.get(tainted.id)
    assert marked.needs_retraining and not registry.get(clean.id).needs_retraining
    assert marked.aliases == ()
    for alias in ("champion", "challenger"):
        with pytest.raises(ConflictError, match="training data was erased"):
            registry.set_alias("triage", alias, marked, actor="test", reason="try")
    told = EventLog(sqlite_database).read(kinds=["model.updated"])
    changes = [(e.event.body["version"], e.event.body["change"], e.event.body.get("alias")) for e in told]
    assert changes == [(tainted.id, "alias_removed", "challenger"), (tainted.id, "blocked", None)]


def test_versions_trained_further_from_such_a_version_are_marked_too(
    sqlite_database: Engine, mlflow_settings: Settings, tmp_path: Path
) -> None:
    dataset = write_feedback_dataset(Path(mlflow_settings.datasets_root))
    registry, base = Registry(mlflow_settings), make_base(tmp_path / "base")
    tainted = registry.register_adapter(
        "triage", make_adapter(tmp_path / "a"), base_model=base, dataset_id=dataset.dataset_id
    )

    def trained_from(version: Version, content: bytes) -> Version:
        started = {"init_adapter": f"/elsewhere/adapters/{version.adapter_sha256}"}
        adapter = make_adapter(tmp_path / content.decode(), content)
        return registry.register_adapter("triage", adapter, base_model=base, dataset_id="ds", lineage=started)

    child = trained_from(tainted, b"child")
    grandchild = trained_from(child, b"grandchild")
    EventLog(sqlite_database).append([asked("u001-0", user="u001")])
    report = erase(sqlite_database, mlflow_settings, ANN)
    assert report["versions"] == sorted([tainted.id, child.id, grandchild.id])
    with pytest.raises(ConflictError, match="cannot be trained further: somebody in its training data was erased"):
        resolve_base(mlflow_settings, child.id, "triage")
    later = str(tmp_path / str(grandchild.adapter_sha256))
    assert versions.erased_since(mlflow_settings, "another", later) != {}


def test_a_dataset_of_before_an_erasure_gets_no_name_after_it(
    sqlite_database: Engine, settings: Settings, tmp_path: Path
) -> None:
    before = erased_users(sqlite_database, "default")
    made = write_feedback_dataset(tmp_path / "built")
    EventLog(sqlite_database).append([asked("u001-0", user="u001")])
    erase(sqlite_database, settings, ANN)
    root = Path(settings.datasets_root)
    with pytest.raises(ConflictError, match="somebody was erased while this dataset was made"):
        publish(sqlite_database, settings, before, Path(made.path), root, made)
    assert list_datasets(settings) == [] and EventLog(sqlite_database).read(kinds=["dataset.ready"]) == []
    with sqlite_database.begin() as connection:
        connection.execute(erasures.update().values(state="records_erased"))
    with pytest.raises(ConflictError, match="the erasure of u001 is not finished"):
        erased_users(sqlite_database, "default")


def test_erasure_waits_for_a_seal_and_says_so_when_it_takes_too_long(database: Engine, settings: Settings) -> None:
    from cluster.database import exclusive
    from data.seal import LOCK

    fill(database, settings)
    hurried = settings.model_copy(update={"erasure": settings.erasure.model_copy(update={"wait_s": 0.0})})
    with exclusive(database, LOCK), pytest.raises(ConflictError, match="another process holds the lock"):
        erase(database, hurried, ANN)
    assert erase(database, hurried, ANN)["interactions"] == 6


def test_partition_that_was_tampered_with_stops_the_erasure(database: Engine, settings: Settings) -> None:
    from tests.data.verify import tampers

    fill(database, settings)
    with database.connect() as connection:
        first = read_partitions(connection)[0]
    tampers.tamper_with_file(first, tampers.file_drop, 3)
    with pytest.raises(ConflictError, match=r"2024-10-04/1-18 is not as it was sealed; run `rayloop verify`"):
        erase(database, settings, ANN)


def test_reading_past_an_erased_event_gives_its_envelope_only(database: Engine, settings: Settings) -> None:
    fill(database, settings)
    erase(database, settings, ANN)
    gone = [r for r in EventLog(database).scan() if r.erased]
    assert {(r.event.user_id, r.event.session_id, tuple(r.event.body)) for r in gone} == {(None, None, ())}
    with database.connect() as connection:
        bodies = sa.select(sa.func.count()).select_from(events.join(event_bodies, events.c.seq == event_bodies.c.seq))
        assert connection.execute(bodies.where(events.c.erased.is_(True))).scalar_one() == 0


def test_version_registered_after_the_erasure_is_marked_too(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "home")[0]
    dataset = write_feedback_dataset(Path(settings.datasets_root))
    assert versions.erased_since(settings, dataset.dataset_id) == {}
    files.clean_datasets([dataset.path], "u001", set())
    assert list(versions.erased_since(settings, dataset.dataset_id)) == ["rayloop.needs_retraining"]
    assert versions.erased_since(settings, None) == {}


def test_person_known_from_a_spool_alone_is_erased_there(database: Engine, settings: Settings) -> None:
    fill_files(settings)
    assert places_with_canary(database, settings) > {f"spool/{SPOOL}"}
    assert erase(database, settings, ANN)["events"] == {}
    assert places_with_canary(database, settings) == set()
    spool = settings.home / "spool" / SPOOL
    assert len(spool.read_bytes().splitlines()) == len(of_others(9))
