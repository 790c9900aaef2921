"""Importing from databases, BigQuery, MLflow and damaged files; auditing databases."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import InputError, UnavailableError
from cluster.settings import Settings
from data.importers.audit import audit_sources, to_markdown
from data.importers.open import open_source, open_sources
from data.importers.run import ImportOptions, ImportReport, import_source
from data.importers.source import file_source
from data.log import EventLog
from tests.data.importers.test_run import THUMB, jsonl

FAKE_CLOUD = Path(__file__).parent / "fake_cloud"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def shop(database_url: str) -> Engine:
    """Somebody's own tables and no others: answers, votes on them, and one that is empty."""
    url = sa.make_url(database_url)
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    found = sa.MetaData()
    found.reflect(engine)
    found.drop_all(engine)
    with engine.begin() as connection:
        for statement in (
            "CREATE TABLE answers (id INTEGER PRIMARY KEY, asked TEXT, said TEXT, at TIMESTAMP, cost NUMERIC(8,3))",
            "CREATE TABLE votes (id INTEGER PRIMARY KEY, answer_id INTEGER REFERENCES answers(id), stars INTEGER)",
            "CREATE TABLE notes (id INTEGER PRIMARY KEY)",
        ):
            connection.execute(sa.text(statement))
        for number in range(1, 31):
            connection.execute(
                sa.text("INSERT INTO answers VALUES (:n, :asked, :said, '2026-01-02 03:04:05', 1.5)"),
                {"n": number, "asked": f"q{number}: 10% off?", "said": f"{'good' if number % 3 else 'bad'} {number}"},
            )
            connection.execute(
                sa.text("INSERT INTO votes VALUES (:n, :n, :stars)"), {"n": number, "stars": 5 if number % 3 else 1}
            )
    return engine


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


VOTES = """
description: votes
requires: [answer_id, stars]
events:
  - kind: feedback
    fields: {event_id: "vote-{id}", interaction_id: "answer-{answer_id}", type: rating, value: $stars}
"""
EVENTS_QUERY = """
SELECT 'interaction' AS kind, 'answer-' || id AS interaction_id, at AS occurred_at,
       '[{"role": "user", "content": "' || asked || '"}]' AS messages
FROM answers WHERE asked LIKE '%: 10%'
"""


def run(source: Any, engine: Engine, settings: Settings, **options: Any) -> ImportReport:
    return import_source(source, EventLog(engine), settings, ImportOptions(**options))


def test_table_is_imported_through_a_mapping_and_again_adds_nothing(
    shop: Engine, sqlite_database: Engine, settings: Settings, tmp_path: Path
) -> None:
    mapping = tmp_path / "votes.yaml"
    mapping.write_text(VOTES)
    with shop.begin() as connection:
        connection.execute(sa.text("INSERT INTO votes VALUES (31, 1, 9)"))
    source = open_source(url_of(shop), settings, table="votes")
    assert (source.name, source.total()) == ("votes", 31)
    report = run(source, sqlite_database, settings, mapping=mapping)
    assert (report.rows, report.imported, report.rejected) == (31, 30, 1)
    assert (report.problems[0].line, report.problems[0].field) == (31, "value")
    again = run(source, sqlite_database, settings, mapping=mapping)
    assert (again.imported, again.duplicates) == (0, 30)
    event = EventLog(sqlite_database).read()[0].event
    assert (event.event_id, event.interaction_id, event.body["reward"]) == ("vote-1", "answer-1", 1.0)


def test_query_may_hold_colons_and_percent_signs_and_give_events(
    shop: Engine, sqlite_database: Engine, settings: Settings
) -> None:
    report = run(open_source(url_of(shop), settings, query=EVENTS_QUERY), sqlite_database, settings)
    assert (report.format, report.imported, report.rejected) == ("events", 30, 0)
    event = EventLog(sqlite_database).read(1)[0].event
    assert event.body["messages"][0]["content"].endswith(": 10% off?")
    assert event.occurred_at_us == 1_767_323_045_000_000  # 2026-01-02T03:04:05Z


def test_audit_describes_every_table_with_relations_and_baselines(shop: Engine, settings: Settings) -> None:
    report = audit_sources(open_sources(url_of(shop), settings), settings)
    assert {s["name"]: s["rows"] for s in report["sources"]} == {"answers": 30, "notes": 0, "votes": 30}
    assert report["empty"] == ["notes"]
    assert {"from": "votes:answer_id", "to": "answers:id", "declared": True} in report["relations"]
    stars = next(label for s in report["sources"] if s["name"] == "votes" for label in s["labels"])
    assert (stars["name"], stars["balance"]) == ("stars", {"5": 0.6667, "1": 0.3333})
    text = to_markdown(report)
    assert "| notes | 0 | 0 | 0 | none |" in text
    assert "`votes:answer_id` refers to `answers:id` (declared)" in text


def test_reading_changes_nothing(shop: Engine, settings: Settings) -> None:
    with pytest.raises(InputError, match="query="):
        list(open_source(url_of(shop), settings, query="DELETE FROM votes").rows())
    with shop.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM votes")).scalar() == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": "nothing"}, "does not exist; there are: answers, notes, votes"),
        ({}, "must be given; there are: answers, notes, votes"),
        ({"query": "SELEC 1"}, "mend the query"),
        ({"table": "votes", "query": "SELECT 1"}, "does not go with a table"),
    ],
)
def test_wrong_table_or_query_is_one_clear_error(
    shop: Engine, settings: Settings, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        list(open_source(url_of(shop), settings, **arguments).rows())
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("nosuch://x/y", {}, "is no URL of a database"),
        ("file.jsonl", {"table": "t"}, "has no tables"),
        ("bigquery://", {"query": "SELECT 1"}, "names no project"),
        ("bigquery://p", {}, "must be DATASET.TABLE"),
    ],
)
def test_source_that_is_none_is_one_clear_error(
    settings: Settings, text: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_source(text, settings, **options)


def test_database_that_is_away_is_unavailable_and_keeps_its_password(settings: Settings) -> None:
    with pytest.raises(UnavailableError) as away:
        open_source("postgresql://ann:hunter2@127.0.0.1:9/x", settings, table="t")
    assert "hunter2" not in str(away.value)


def test_row_in_another_encoding_is_rejected_alone(sqlite_database: Engine, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "old.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE feedback (kind TEXT, interaction_id TEXT, type TEXT, reason TEXT)")
        rows = [b"fine", "caf\u00e9".encode("latin-1"), "caf\u00e9".encode()]
        for reason in rows:
            connection.execute(
                "INSERT INTO feedback VALUES ('feedback', 'i1', 'thumbs_up', CAST(? AS TEXT))", (reason,)
            )
    connection.close()
    report = run(open_source(f"sqlite:///{file}", settings, table="feedback"), sqlite_database, settings)
    assert (report.rows, report.imported, report.rejected) == (3, 2, 1)
    assert (report.problems[0].line, report.problems[0].field) == (2, "reason")


# files


def test_byte_order_mark_is_no_error_and_other_encodings_are_one(
    sqlite_database: Engine, settings: Settings, tmp_path: Path
) -> None:
    file = jsonl(tmp_path / "f.jsonl", THUMB)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert run(file_source(file), sqlite_database, settings).imported == 1
    file.write_text(json.dumps(THUMB), encoding="utf-16")
    with pytest.raises(InputError, match="UTF-16"):
        run(file_source(file), sqlite_database, settings)
    file.write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(InputError, match="compressed"):
        run(file_source(file), sqlite_database, settings)


def test_latin_1_line_is_rejected_alone(sqlite_database: Engine, settings: Settings, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "f.jsonl", THUMB)
    file.write_bytes(
        file.read_bytes() + '{"kind": "caf\u00e9"}\n'.encode("latin-1") + json.dumps(THUMB).encode() + b"\n"
    )
    report = run(file_source(file), sqlite_database, settings)
    assert (report.imported, report.rejected, report.problems[0].line) == (2, 1, 2)


def parquet(path: Path, columns: dict[str, pa.Array], group: int = 10) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group, compression="none", use_dictionary=False)
    return path


def test_damaged_row_group_is_named_and_the_others_are_read(
    sqlite_database: Engine, settings: Settings, tmp_path: Path
) -> None:
    columns = {name: pa.array([value] * 30) for name, value in THUMB.items()}
    file = parquet(tmp_path / "f.parquet", columns | {"event_id": pa.array([f"e{n}" for n in range(30)])})
    place = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[place : place + 20] = b"\xff" * 20  # the page's header
    file.write_bytes(content)
    report = run(file_source(file), sqlite_database, settings)
    assert (report.imported, report.rejected) == (20, 1)
    assert (report.problems[0].field, report.problems[0].value) == ("rows", "'11 to 20'")


def test_truncated_parquet_is_one_clear_error(sqlite_database: Engine, settings: Settings, tmp_path: Path) -> None:
    file = parquet(tmp_path / "f.parquet", {"kind": pa.array(["feedback"] * 100)})
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match="no whole Parquet file"):
        run(file_source(file), sqlite_database, settings)


def test_parquet_text_that_is_not_utf_8_rejects_its_row_alone(
    sqlite_database: Engine, settings: Settings, tmp_path: Path
) -> None:
    raw = pa.array([b"fine", b"caf\xe9", b"good"]).view(pa.string())
    columns = {name: pa.array([value] * 3) for name, value in THUMB.items()} | {"reason": raw}
    report = run(file_source(parquet(tmp_path / "f.parquet", columns)), sqlite_database, settings)
    assert (report.imported, report.rejected, report.problems[0].line) == (2, 1, 2)


# MLflow


@pytest.mark.filterwarnings("default")  # MLflow takes a warning that is an error for a reason not to trace
def test_mlflow_traces_become_interactions_tool_calls_and_feedback(
    mlflow_settings: Settings, sqlite_database: Engine
) -> None:
    import mlflow
    from mlflow.entities import AssessmentSource

    mlflow.set_tracking_uri(mlflow_settings.tracking_uri)
    mlflow.set_experiment("orders")
    with mlflow.start_span("helper", span_type="AGENT") as agent:
        agent.set_inputs({"messages": [{"role": "user", "content": "Is order 7 on its way?"}]})
        with mlflow.start_span("find_order", span_type="TOOL") as tool:
            tool.set_inputs({"order": 7})
            tool.set_outputs({"status": "shipped"})
        with mlflow.start_span("chat", span_type="CHAT_MODEL") as chat:
            chat.set_inputs({"messages": [{"role": "user", "content": "Is order 7 on its way?"}]})
            message = {"role": "assistant", "content": "Yes."}
            chat.set_outputs({"id": "resp-9", "choices": [{"message": message, "finish_reason": "stop"}]})
        mlflow.update_current_trace(metadata={"mlflow.trace.user": "ada", "mlflow.trace.session": "s1"})
    person = AssessmentSource(source_type="HUMAN", source_id="rita")
    trace_id = agent.trace_id
    mlflow.flush_trace_async_logging()
    mlflow.log_feedback(trace_id=trace_id, name="helpful", value=True, source=person, rationale="quick")
    mlflow.log_feedback(trace_id=trace_id, name="mood", value="meh", source=person)
    mlflow.log_expectation(trace_id=trace_id, name="expected", value="Yes, it was shipped.", source=person)
    source = open_source("mlflow:orders", mlflow_settings)
    report = run(source, sqlite_database, mlflow_settings)
    assert (report.rejected, [p.field for p in report.problems]) == (1, ["mood"])
    assert report.events == {"trajectory": 1, "tool_call": 1, "interaction": 1, "feedback": 2}
    events = {(e.kind, e.body.get("type")): e for e in (r.event for r in EventLog(sqlite_database).scan())}
    asked = events["interaction", None]
    assert (asked.interaction_id, asked.agent, asked.session_id) == ("resp-9", "orders", "s1")
    assert asked.body["response"] == {"role": "assistant", "content": "Yes."}
    assert events["feedback", "thumbs_up"].interaction_id == "resp-9"
    assert events["feedback", "thumbs_up"].user_id != asked.user_id  # the reviewer, not the user
    assert events["feedback", "correction"].body["text"] == "Yes, it was shipped."
    assert events["tool_call", None].body["result"] == {"status": "shipped"}
    assert len(events["trajectory", None].body["messages"]) == 2
    assert run(source, sqlite_database, mlflow_settings).imported == 0
    with pytest.raises(InputError, match="is no experiment; there are"):
        open_source("mlflow:none", mlflow_settings)


# BigQuery


@pytest.mark.ray
def test_bigquery_is_read_through_ray_data(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "RAYLOOP_HOME": str(tmp_path),
        "PYTHONPATH": str(FAKE_CLOUD),
        "RAY_AUTH_MODE": "disabled",
    }

    def rayloop(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "data", *arguments]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    done = rayloop("import", "bigquery://proj", "--table", "logs.feedback", "--json")
    report = json.loads(done.stdout)
    assert (report["rows"], report["imported"], report["rejected"]) == (40, 39, 1), done.stderr
    assert report["problems"][0]["field"] == "type"
    missing = rayloop("audit", "bigquery://proj", "--table", "logs.none")
    assert (missing.returncode, "is not found" in missing.stderr) == (2, True)
