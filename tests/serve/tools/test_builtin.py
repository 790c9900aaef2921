"""The built-in tools: SQL over allowed views, search, one record, feedback."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine as Database

from cluster.errors import InputError, UnavailableError
from data.events import Event
from data.log import EventLog
from serve.keys import create_key
from serve.tools.sql import ReadOnlySql
from tests.serve.tools.conftest import World

VIEW = "SELECT kind, agent, interaction_id FROM events WHERE tenant = :tenant AND workspace = :workspace"
REFUSED = [
    "DELETE FROM ev", "UPDATE ev SET kind = 'x'", "INSERT INTO ev VALUES (1)", "DROP TABLE events",
    "SELECT 1; DELETE FROM events", "SELECT * FROM api_keys", "SELECT * FROM events", "SELECT * FROM main.events",
    "SELECT * FROM public.api_keys", "SELECT digest FROM ev, api_keys", "SELECT * FROM ev JOIN api_keys ON 1 = 1",
    "SELECT (SELECT digest FROM api_keys LIMIT 1) FROM ev", "WITH ev AS (SELECT * FROM events) SELECT * FROM ev",
    "WITH x AS (SELECT * FROM api_keys) SELECT * FROM x",
    "SELECT * FROM ev UNION SELECT digest, name, name FROM api_keys",
    "SELECT name FROM api_keys UNION SELECT * FROM (WITH api_keys AS (SELECT 'x' AS name) SELECT * FROM api_keys) s",
    "SELECT (SELECT name FROM api_keys) FROM (WITH api_keys AS (SELECT 1 AS name) SELECT * FROM api_keys) AS s",
    "SELECT * FROM sqlite_master", "SELECT * FROM pg_catalog.pg_user", "SELECT pg_sleep(10)",
    "SELECT pg_read_file('x')",
    "SELECT load_extension('x')", "SELECT readfile('/etc/passwd')", "SELECT current_user", "SELECT version()",
    "PRAGMA table_info(events)", "ATTACH DATABASE 'x' AS y", "VACUUM", "EXPLAIN SELECT * FROM ev", "SET x = 1",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT * FROM r", "SELECT * INTO copied FROM ev",
    "SELECT * FROM ev FOR UPDATE", "SELECT * FROM generate_series(1, 10)", "SELECT ?", "COPY ev TO '/tmp/x'",
    "CREATE TABLE x AS SELECT * FROM ev", "SELECT randomblob(1000000000)", "", "not sql at all",
    "SELECT * FROM ev WHERE tenant = 'other' OR 1 IN (SELECT 1 FROM events)", "SELECT lo_import('/etc/passwd')",
    "SELECT set_config('x', 'y', false)", "SELECT * FROM json_each('[1]')", "VALUES (1)", "TABLE api_keys",
]  # fmt: skip


@pytest.fixture
def sql(database: Database) -> ReadOnlySql:
    """Three events of one tenant and one of another, behind one view; a table without a view."""
    bodies: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}]}
    log = EventLog(database)
    log.append([Event("interaction", "ours", "w", bodies, agent=a, interaction_id=f"i-{a}") for a in "abc"])
    log.append([Event("interaction", "theirs", "w", bodies, agent="z", interaction_id="i-z")])
    create_key(database, "k", "ours", "w", ["chat"])
    return ReadOnlySql(database, {"ev": VIEW}, max_rows=2, timeout_s=5.0)


def test_a_select_sees_its_tenant_only_and_takes_parameters(sql: ReadOnlySql) -> None:
    every = sql.run("SELECT count(*) AS n FROM ev", {}, "ours", "w")
    assert (every.columns, every.rows, every.truncated) == (["n"], [[3]], False)
    one = sql.run("SELECT agent FROM ev WHERE agent = :a AND kind LIKE 'inter%'", {"a": "b"}, "ours", "w")
    assert one.rows == [["b"]]
    text = "SELECT upper(e.agent) || ' :x 100%' AS shown FROM ev e WHERE e.agent IN (:a, :b) ORDER BY 1 DESC"
    assert sql.run(text, {"a": "a", "b": "b"}, "ours", "w").rows == [["B :x 100%"], ["A :x 100%"]]
    grouped = "WITH g AS (SELECT kind, count(*) AS n FROM ev GROUP BY kind) SELECT * FROM g"
    assert sql.run(grouped, {}, "ours", "w").rows == [["interaction", 3]]
    assert sql.run("SELECT 1 AS one", {}, "ours", "w").rows == [[1]]
    chained = "WITH a AS (SELECT agent FROM ev), b AS (SELECT a.agent FROM a WHERE a.agent > 'a') SELECT b.agent FROM b"
    assert sql.run(f"{chained} ORDER BY b.agent", {}, "ours", "w").rows == [["b"], ["c"]]


def test_more_rows_than_allowed_are_cut_and_said_so(sql: ReadOnlySql) -> None:
    found = sql.run("SELECT agent FROM ev ORDER BY agent", {}, "ours", "w")
    assert (found.rows, found.truncated) == ([["a"], ["b"]], True)


def test_everything_else_is_refused(sql: ReadOnlySql) -> None:
    let_through = []
    for query in REFUSED:
        try:
            let_through.append((query, sql.run(query, {}, "ours", "w")))
        except InputError:
            continue
    assert let_through == []


def test_a_querys_own_with_never_means_a_table(sql: ReadOnlySql) -> None:
    """SQLite finds a later WITH from an earlier one, PostgreSQL finds nothing; neither finds the table."""
    try:
        found = sql.run(
            "WITH a AS (SELECT * FROM api_keys), api_keys AS (SELECT 1 AS one) SELECT * FROM a", {}, "ours", "w"
        )
    except InputError:
        return
    assert (found.columns, found.rows) == (["one"], [[1]])


def test_parameters_are_checked(sql: ReadOnlySql) -> None:
    with pytest.raises(InputError, match=r"parameters\.tenant='theirs' is bound by the server"):
        sql.run("SELECT * FROM ev", {"tenant": "theirs"}, "ours", "w")
    with pytest.raises(InputError, match=r"parameters\.a=None is missing"):
        sql.run("SELECT * FROM ev WHERE agent = :a", {}, "ours", "w")
    injected = {"a": "b' OR '1'='1"}
    assert sql.run("SELECT * FROM ev WHERE agent = :a", injected, "ours", "w").rows == []


def test_the_connection_itself_writes_nothing(sql: ReadOnlySql, database: Database) -> None:
    """Past the parser: what it would let through by mistake fails at the database."""
    with pytest.raises(sa.exc.DBAPIError), database.connect() as connection:
        sql._read(connection, "DELETE FROM api_keys", {})
    if database.dialect.name == "sqlite":
        with pytest.raises(sa.exc.DBAPIError), database.connect() as connection:
            sql._read(connection, "SELECT digest FROM api_keys", {})
    with database.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM api_keys")).scalar() == 1


def test_a_query_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    file = tmp_path / "big.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE n (x)")
        connection.executemany("INSERT INTO n VALUES (?)", [(i,) for i in range(2_000)])
    connection.close()
    engine = sa.create_engine(f"sqlite:///{file}")
    slow = ReadOnlySql(engine, {"n_view": "SELECT x FROM n"}, max_rows=10, timeout_s=0.2)
    with pytest.raises(UnavailableError, match=r"longer than 0\.2 s"):
        slow.run("SELECT count(*) FROM n_view a, n_view b, n_view c, n_view d", {}, "t", "w")
    assert slow.run("SELECT count(*) AS n FROM n_view", {}, "t", "w").rows == [[2_000]]
    engine.dispose()


def test_search_finds_the_closest_of_its_workspace(world: World) -> None:
    world.interactions(
        ("How do I reset the VPN token?", "Open the portal and revoke it."), ("What is for lunch?", "Soup.")
    )
    world.interactions(("How do I reset the VPN token at home?", "secret"), tenant="other", first=10)
    hits = world.call("search_interactions", {"query": "reset vpn token", "limit": 3}).json()["result"]
    assert [hit["interaction_id"] for hit in hits] == ["i0"]
    assert (hits[0]["question"], hits[0]["agent"]) == ("How do I reset the VPN token?", "triage")
    assert world.call("search_interactions", {"query": "x", "limit": 99}).status_code == 400


def test_feedback_is_written_once_and_shows_in_the_record(world: World) -> None:
    world.interactions(("Is the disk full?", "Yes."), first=20)
    arguments = {"interaction_id": "i20", "type": "correction", "text": "No, 80 %.", "user": "ada"}
    first = world.call("submit_feedback", arguments, idempotency_key="fb-1")
    assert first.json()["result"]["status"] == "accepted", first.text
    assert world.call("submit_feedback", arguments, idempotency_key="fb-1").json() == first.json()
    record = world.call("get_record", {"interaction_id": "i20"}).json()["result"]
    assert record["response"]["content"] == "Yes."
    said = [a for a in record["about"] if a["kind"] == "feedback"]
    assert [(a["type"], a["text"]) for a in said] == [("correction", "No, 80 %.")]
    wrong = world.call(
        "submit_feedback", {"interaction_id": "i20", "type": "rating", "value": 9}, idempotency_key="fb-2"
    )
    assert wrong.status_code == 400, wrong.text


def test_a_message_that_is_no_text_hides_no_others(world: World) -> None:
    odd = {"messages": [{"role": "user", "content": {"a": 1}}], "response": {"role": "assistant", "content": 5}}
    event = Event("interaction", "default", "default", odd, event_id="interaction:odd", interaction_id="odd")
    world.log.append([event])
    world.interactions(("Where is Heron-12?", "In the shed."), first=60)
    hits = world.call("search_interactions", {"query": "Heron-12"}).json()["result"]
    assert hits[0]["interaction_id"] == "i60"


def test_two_workspaces_may_use_one_idempotency_key(world: World) -> None:
    arguments = {"interaction_id": "i21", "type": "thumbs_up"}
    first = world.call("submit_feedback", arguments, idempotency_key="k" * 128).json()["result"]
    second = world.call("submit_feedback", arguments, idempotency_key="k" * 128, secret=world.elsewhere).json()[
        "result"
    ]
    assert (first["status"], second["status"]) == ("accepted", "accepted")
    assert first["event_id"] != second["event_id"]


def test_a_record_of_somebody_else_is_not_found(world: World) -> None:
    world.interactions(("theirs", "theirs"), tenant="other", first=30)
    answer = world.call("get_record", {"interaction_id": "i30"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_sql_over_http_shows_the_refusal(world: World) -> None:
    good = world.call(
        "query_sql", {"query": "SELECT count(*) AS n FROM event_log WHERE kind = :k", "parameters": {"k": "none"}}
    )
    assert good.json()["result"] == {"columns": ["n"], "rows": [[0]], "truncated": False}
    bad = world.call("query_sql", {"query": "SELECT * FROM api_keys"})
    assert bad.status_code == 400 and "known views: event_log" in bad.json()["error"]["message"]


def test_values_of_a_database_are_json_and_bytes_are_the_querys_fault(world: World) -> None:
    breaker = world.settings.serve.breaker.consecutive
    for query, param in (("SELECT x'ff' AS odd", "odd"), ("SELECT 'a\0b' AS odd", "query")):
        for _ in range(breaker + 1):  # nobody else's queries suffer for it
            answer = world.call("query_sql", {"query": query})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert world.call("query_sql", {"query": "SELECT 1e999 AS n, x'41' AS t"}).json()["result"]["rows"] == [[None, "A"]]


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "postgresql+psycopg://127.0.0.1:1/none"])
def test_a_database_that_is_away_is_not_the_querys_fault(url: str) -> None:
    away = ReadOnlySql(sa.create_engine(url), {"ev": VIEW}, max_rows=2, timeout_s=5.0)
    with pytest.raises(UnavailableError, match="does not answer"):
        away.run("SELECT count(*) AS n FROM ev", {}, "ours", "w")
