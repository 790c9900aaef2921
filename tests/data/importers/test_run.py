import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from cluster.errors import InputError
from cluster.settings import Settings
from data.importers.mapping import EventRule, Mapping, load_mapping, look_up, shipped_mappings
from data.importers.run import ImportOptions, ImportReport, Problem, import_source
from data.importers.source import file_source
from data.log import EventLog


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(path: Path, engine: Engine, settings: Settings, **options: Any) -> ImportReport:
    return import_source(file_source(path), EventLog(engine), settings, ImportOptions(**options))


THUMB = {"kind": "feedback", "interaction_id": "i1", "type": "thumbs_up"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def test_gsm8k_solutions_become_interactions_with_feedback(
    database: Engine, settings: Settings, shared_data: Path
) -> None:
    file = shared_data / "gsm8k_model_solutions.jsonl"
    report = run(file, database, settings)
    assert (report.format, report.rows, report.imported, report.rejected) == ("gsm8k", 660, 660, 0)
    # 660 questions with four solutions; 1008 are right, 1632 wrong: a thumb each, a correction each wrong one
    assert report.events == {"interaction": 2640, "feedback": 2640 + 1632}
    again = run(file, database, settings)
    assert (again.imported, again.duplicates, again.events) == (0, 660, {})
    events = [r.event for r in EventLog(database).scan()]
    assert len({e.user_id for e in events}) == 660
    answers = {e.interaction_id: e for e in events if e.kind == "interaction"}
    corrected = [e for e in events if e.body.get("type") == "correction"]
    assert all(answers[e.interaction_id].user_id == e.user_id for e in corrected)
    assert {e.body["reward"] for e in corrected} == {-0.5}


def test_tool_call_trajectories_keep_calls_and_reward(database: Engine, settings: Settings, shared_data: Path) -> None:
    file = shared_data / "tool_call_trajectories.jsonl"
    report = run(file, database, settings)
    assert (report.format, report.events, report.rejected) == ("tau_bench", {"trajectory": 100}, 0)
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    body = EventLog(database).read(limit=1)[0].event.body
    assert body["messages"] == first["traj"]
    assert (body["reward"], body["metadata"]) == (first["reward"], {"task_id": 0, "trial": 0})


def test_bad_rows_are_named_and_the_rest_is_kept(sqlite_database: Engine, settings: Settings, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "f.jsonl", THUMB, {**THUMB, "type": "rating", "value": 9}, [1], {**THUMB, "typ": 1})
    with file.open("a") as out:
        out.write('{"kind": NaN}\n\n' + json.dumps({**THUMB, "kind": "nonsense"}) + "\n")
    problems: list[Problem] = []
    report = run(file, sqlite_database, settings, on_problem=problems.append)
    assert (report.rows, report.imported, report.rejected) == (6, 1, 5)
    assert [(p.line, p.field) for p in problems] == [
        (2, "value"),
        (3, "row"),
        (4, "typ"),
        (5, "line"),
        (7, "kind"),
    ]
    assert problems == report.problems
    assert problems[0].as_dict()["value"] == "9.0"


def test_row_of_several_events_is_taken_whole_or_not(
    sqlite_database: Engine, settings: Settings, tmp_path: Path
) -> None:
    solution = {"is_correct": False, "solution": "7"}
    rows = [{"question": "q1", "ground_truth": "8", "a_finetuning": solution}]
    rows.append({"question": "q2", "ground_truth": 8, "a_finetuning": solution})  # type: ignore[dict-item]
    report = run(jsonl(tmp_path / "f.jsonl", *rows), sqlite_database, settings, format="gsm8k")
    assert (report.imported, report.rejected, report.problems[0].field) == (1, 1, "text")
    assert report.events == {"interaction": 1, "feedback": 2}


def test_truncated_file_is_told_and_what_was_whole_is_kept(
    sqlite_database: Engine, settings: Settings, tmp_path: Path
) -> None:
    file = jsonl(tmp_path / "f.jsonl", THUMB, THUMB)
    file.write_bytes(file.read_bytes()[:-9])
    report = run(file, sqlite_database, settings)
    assert (report.imported, report.rejected) == (1, 1)
    assert report.problems[0].line == 2
    assert "truncated" in report.problems[0].rule


def test_format_is_told_although_the_first_line_is_broken(
    sqlite_database: Engine, settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text("{oops\n" + json.dumps(THUMB) + "\n")
    report = run(file, sqlite_database, settings)
    assert (report.format, report.imported, report.rejected) == ("events", 1, 1)


def test_longer_version_of_a_file_adds_only_what_is_new(database: Engine, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    assert run(jsonl(file, THUMB, THUMB), database, settings).imported == 2  # two people may say the same
    again = run(jsonl(file, THUMB, THUMB, {**THUMB, "type": "thumbs_down"}), database, settings)
    assert (again.imported, again.duplicates) == (1, 2)


def test_parquet_reads_like_json_lines(database: Engine, settings: Settings, tmp_path: Path) -> None:
    rows = [
        {**THUMB, "event_id": "e1", "value": None},
        {
            "kind": "interaction",
            "event_id": "i1",
            "messages": json.dumps(CHAT["messages"]),
            "agent": "triage",
        },
        {**THUMB, "event_id": "e2", "type": "rating", "value": float("nan")},
    ]
    file = tmp_path / "f.parquet"
    pq.write_table(
        pa.Table.from_pylist(
            rows,
            pa.schema({n: pa.string() for n in (*rows[1], "interaction_id", "type")} | {"value": pa.float64()}),
        ),
        file,
    )
    report = run(file, database, settings)
    assert (report.format, report.imported, report.rejected) == ("events", 2, 1)
    assert (report.problems[0].line, report.problems[0].field) == (3, "value")
    recorded = EventLog(database).read(1)[0].event
    assert (recorded.interaction_id, recorded.agent, recorded.body["messages"]) == (
        "i1",
        "triage",
        CHAT["messages"],
    )


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "cannot be read"),
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b"PAR1 and no more", "no whole Parquet file"),
    ],
)
def test_unusable_file_is_one_clear_error(
    sqlite_database: Engine, settings: Settings, tmp_path: Path, content: bytes | None, rule: str
) -> None:
    file = tmp_path / "f"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=rule):
        run(file, sqlite_database, settings)


def test_openai_files_are_told_apart(sqlite_database: Engine, settings: Settings, tmp_path: Path) -> None:
    log = {
        "request": {"model": "triage", "messages": CHAT["messages"][:1], "user": "ada"},
        "response": {
            "id": "chatcmpl-1",
            "created": 1_700_000_000,
            "model": "triage/3",
            "choices": [{"message": CHAT["messages"][1], "finish_reason": "stop"}],
        },
    }
    pair = {
        "input": {"messages": CHAT["messages"][:1]},
        "preferred_output": CHAT["messages"][1:],
        "non_preferred_output": [{"role": "assistant", "content": "what"}],
    }
    rows: dict[str, dict[str, Any]] = {"openai_chat": CHAT, "openai_log": log, "openai_preference": pair}
    for name, row in rows.items():
        for format in ("auto", "openai"):
            report = run(jsonl(tmp_path / "f.jsonl", row), sqlite_database, settings, format=format, agent="triage")
            assert (report.format, report.rejected) == (name, 0)
    interactions = [r.event for r in EventLog(sqlite_database).scan(kinds=["interaction"])]
    assert [e.body["response"]["content"] for e in interactions] == ["hello", "hello", "hello", "what"]
    assert all(e.body["messages"] == CHAT["messages"][:1] and e.agent == "triage" for e in interactions)
    assert interactions[1].occurred_at_us == 1_700_000_000_000_000
    assert interactions[1].body["served_version"] == "triage/3"


def test_unknown_format_is_refused_with_the_known_ones(
    sqlite_database: Engine, settings: Settings, tmp_path: Path
) -> None:
    file = jsonl(tmp_path / "f.jsonl", {"a": 1})
    with pytest.raises(InputError, match="gsm8k"):
        run(file, sqlite_database, settings)
    with pytest.raises(InputError, match="must be one of auto, events, openai"):
        run(file, sqlite_database, settings, format="csv")


def test_own_mapping_file(sqlite_database: Engine, settings: Settings, tmp_path: Path) -> None:
    mapping = tmp_path / "tickets.yaml"
    mapping.write_text(
        "description: tickets\nrequires: [id]\nevents:\n"
        "- kind: outcome\n  fields: {event_id: 't-{id}', interaction_id: $ref, name: solved, value: $ok}\n"
    )
    file = jsonl(tmp_path / "f.jsonl", {"id": 1, "ref": "i1", "ok": 1.0}, {"id": 2})
    report = run(file, sqlite_database, settings, mapping=mapping)
    assert (report.format, report.imported, report.problems[0].field) == ("tickets", 1, "ref")
    mapping.write_text("description: x\nrequires: [id]\nevents: [{kind: rumour, fields: {}}]\n")
    with pytest.raises(InputError, match="is no kind of event"):
        load_mapping(mapping)
    mapping.write_text("events: [")
    with pytest.raises(InputError, match="cannot be read"):
        load_mapping(mapping)


def test_shipped_mappings_parse() -> None:
    assert {"gsm8k", "tau_bench", "openai_chat"} <= set(shipped_mappings())


def test_templates_keep_types_and_leave_out_what_is_missing() -> None:
    fields = {"a": "$x.0", "b": "$y?", "c": "{x.1}!", "d": {"e": "$z?", "f": 7}, "g": "$x.:-1"}
    mapping = Mapping(description="", requires=["x"], events=[EventRule(kind="outcome", fields=fields)])
    row = {"x": [1.5, "two", None], "z": None}
    assert list(mapping.items(row)) == [("outcome", {"a": 1.5, "c": "two!", "d": {"f": 7}, "g": [1.5, "two"]})]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)


@given(json_values, st.text(max_size=12))
def test_any_path_is_found_or_refused(row: Any, path: str) -> None:
    try:
        look_up(row, path)
    except InputError as error:
        assert error.field == path


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_any_file_gives_a_report_or_one_error(
    sqlite_database: Engine, settings: Settings, tmp_path: Path, lines: list[bytes]
) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"\n".join(lines))
    try:
        report = run(file, sqlite_database, settings, format="events")
    except InputError as error:
        assert str(error)
        return
    assert report.rejected + report.imported + report.duplicates == report.rows
