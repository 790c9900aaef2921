"""One bad row among good ones, through every importer: it is named with field, value and rule; the others are kept."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import InputError
from cluster.settings import Settings
from data.importers.open import open_source
from data.importers.run import ImportOptions, ImportReport, import_source
from data.importers.source import Source, file_source
from data.log import EventLog

FAKE_CLOUD = Path(__file__).parent / "fake_cloud"
ROOT = Path(__file__).parents[3]
Row = dict[str, Any]
THUMB = {"kind": "feedback", "interaction_id": "i1", "type": "thumbs_up"}
CHAT = {"kind": "interaction", "interaction_id": "i2", "messages": [{"role": "user", "content": "hi"}]}
RUN = {"kind": "trajectory", "messages": [{"role": "user", "content": "go"}], "reward": 1.0}
TOMORROW = (datetime.now(UTC) + timedelta(days=1)).isoformat()
BAD: dict[str, tuple[Row, str, str]] = {
    "wrong type": (RUN | {"outcome": 7}, "outcome", "string"),
    "outside its range": (THUMB | {"type": "rating", "value": 9.0}, "value", "from 1 to 5"),
    "unknown field": (THUMB | {"colour": "red"}, "colour", "unknown field"),
    "unknown kind": (THUMB | {"kind": "rumour"}, "kind", "must be one of"),
    "nothing it is about": ({"kind": "feedback", "type": "thumbs_up"}, "interaction_id", "missing"),
    "a blank in an id": (THUMB | {"interaction_id": "i 1"}, "interaction_id", "pattern"),
    "a time to come": (THUMB | {"occurred_at": TOMORROW}, "occurred_at", "future"),
    "no time": (THUMB | {"occurred_at": "yesterday"}, "occurred_at", "RFC 3339"),
    "over-long text": (THUMB | {"type": "correction", "text": "x" * 100_001}, "text", "100000"),
    "over-long message": (CHAT | {"messages": [{"role": "user", "content": "x" * 100_001}]}, "messages", "100000"),
    "no message": (CHAT | {"messages": []}, "messages", "empty"),
    "a message without a role": (CHAT | {"messages": [{"content": "hi"}]}, "messages.0.role", "string"),
    "a reward above one": (RUN | {"reward": 1.5}, "reward", "less than or equal to 1"),
    "a reward of our own": (THUMB | {"reward": 1.0}, "reward", "set by the server"),
}


def json_lines(rows: list[Row], folder: Path, settings: Settings) -> Source:
    file = folder / "f.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file_source(file)


def columns(rows: list[Row]) -> list[Row]:
    """The same rows as a table holds them: nested values as JSON text."""
    return [{k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows]


def parquet(rows: list[Row], folder: Path, settings: Settings) -> Source:
    return file_source(parquet_file(rows, folder / "f.parquet"))


def parquet_file(rows: list[Row], file: Path) -> Path:
    flat = columns(rows)
    names = sorted({name for row in flat for name in row})
    kinds = {n: pa.infer_type([row[n] for row in flat if n in row]) for n in names}
    pq.write_table(pa.Table.from_pylist(flat, pa.schema(kinds)), file)
    return file


def table(rows: list[Row], folder: Path, settings: Settings) -> Source:
    flat, url = columns(rows), f"sqlite:///{folder / 'shop.db'}"
    engine, meta = sa.create_engine(url), sa.MetaData()
    types = {name: type(row[name]) for row in flat for name in row}
    made = [sa.Column(n, {float: sa.Float, int: sa.Integer}.get(types[n], sa.Text)) for n in sorted(types)]
    rumours = sa.Table("rumours", meta, *made)
    meta.create_all(engine)
    with engine.begin() as connection:
        for row in flat:
            connection.execute(rumours.insert().values(row))
    engine.dispose()
    return open_source(url, settings, table="rumours")


WAYS: dict[str, Callable[[list[Row], Path, Settings], Source]] = {
    "JSON lines": json_lines,
    "Parquet": parquet,
    "SQL table": table,
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """For each way in: the report of a file in which every second row is bad."""
    from cluster.database import connect
    from cluster.settings import load_settings

    found: dict[str, dict[str, Any]] = {}
    names = list(BAD)
    rows = [row for n, name in enumerate(names) for row in (THUMB | {"event_id": f"good-{n}"}, BAD[name][0])]
    for way, make in WAYS.items():
        folder = tmp_path_factory.mktemp("bad")
        settings = load_settings(home=folder / "home", intake={"shown_problems": 100})[0]
        engine: Engine = connect(settings)
        options = ImportOptions(format="events")
        report = import_source(make(rows, folder, settings), EventLog(engine), settings, options)
        kept = [r.event.event_id for r in EventLog(engine).scan()]
        engine.dispose()
        found[way] = {"report": report, "kept": kept, "problems": {p.line: p for p in report.problems}}
    return found


@pytest.mark.parametrize("way", WAYS)
def test_good_rows_beside_bad_ones_are_kept(verdicts: dict[str, dict[str, Any]], way: str) -> None:
    report: ImportReport = verdicts[way]["report"]
    assert (report.rows, report.imported, report.rejected) == (2 * len(BAD), len(BAD), len(BAD))
    assert verdicts[way]["kept"] == [f"good-{n}" for n in range(len(BAD))]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("way", WAYS)
def test_bad_row_is_named(verdicts: dict[str, dict[str, Any]], way: str, name: str) -> None:
    _, field, rule = BAD[name]
    problem = verdicts[way]["problems"][2 * list(BAD).index(name) + 2]
    assert problem.field == field or problem.field.startswith(f"{field}.")
    assert rule in problem.rule and problem.as_dict()["value"] is not None
    assert len(str(problem.as_dict()["value"])) < 200


@pytest.mark.ray
def test_bad_rows_of_bigquery_are_named_and_the_good_ones_kept(tmp_path: Path) -> None:
    not_a_number = THUMB | {"type": "rating", "value": float("nan")}
    bad = [row for row, _, _ in BAD.values()] + [not_a_number]
    rows = [row for n, wrong in enumerate(bad) for row in (THUMB | {"event_id": f"good-{n}"}, wrong)]
    environment = {
        **os.environ,
        "RAYLOOP_HOME": str(tmp_path / "home"),
        "RAYLOOP_INTAKE__SHOWN_PROBLEMS": "100",
        "FAKE_BIGQUERY_ROWS": str(parquet_file(rows, tmp_path / "rows.parquet")),
        "PYTHONPATH": str(FAKE_CLOUD),
        "RAY_AUTH_MODE": "disabled",
    }
    command = [sys.executable, "-m", "data", "import", "bigquery://proj", "--table", "logs.feedback", "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    report = json.loads(done.stdout)
    twenty = 20  # good rows of the other stream
    counts = report["rows"], report["imported"], report["rejected"]
    assert counts == (twenty + 2 * len(bad), twenty + len(bad), len(bad)), done.stderr
    problems = report["problems"]
    expected = [*BAD.values(), (not_a_number, "value", "finite")]
    for _, field, rule in expected:
        named = [p for p in problems if p["field"] == field or p["field"].startswith(f"{field}.")]
        assert any(rule in problem["rule"] for problem in named), (field, rule, named)


@pytest.mark.parametrize("cut", [0.2, 0.6, 0.95])
def test_truncated_parquet_is_one_clear_error(
    sqlite_database: Engine, settings: Settings, tmp_path: Path, cut: float
) -> None:
    source = parquet([THUMB] * 50, tmp_path, settings)
    content = (tmp_path / "f.parquet").read_bytes()
    (tmp_path / "f.parquet").write_bytes(content[: int(cut * len(content))])
    with pytest.raises(InputError, match="no whole Parquet file"):
        import_source(source, EventLog(sqlite_database), settings, ImportOptions())


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "cp1252"])
def test_other_encodings_are_told(sqlite_database: Engine, settings: Settings, tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "f.jsonl"
    row = json.dumps(THUMB | {"type": "correction", "text": "Größe"}, ensure_ascii=False)
    file.write_bytes(f"{json.dumps(THUMB)}\n{row}\n".encode(encoding))
    log = EventLog(sqlite_database)
    try:
        report = import_source(file_source(file), log, settings, ImportOptions(format="events"))
    except InputError as error:
        assert "UTF-16" in str(error) and log.last_seq() == 0
        return
    assert report.rejected >= 1 and report.imported == log.last_seq() == 2 - report.rejected
    assert all(problem.field == "line" for problem in report.problems)
