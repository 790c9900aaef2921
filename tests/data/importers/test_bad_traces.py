"""Traces of MLflow with bad spans among good ones: each is named with field and rule, the others are kept."""

import time
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.settings import Settings
from data.importers.open import open_source
from data.importers.run import ImportOptions, import_source
from data.log import EventLog

ASKED = {"messages": [{"role": "user", "content": "hi"}]}
SAID = {"role": "assistant", "content": "yes"}
NAN = float("nan")
DAY_NS = 86_400 * 10**9


def nested(levels: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(levels):
        made = [made]
    return made


BAD: dict[str, tuple[Any, Any, str, str]] = {
    "a message that is a number": ({"messages": [7]}, SAID, "gen_ai.input.messages", "must hold messages"),
    "no message": ({"messages": []}, SAID, "gen_ai.input.messages", "missing"),
    "nothing at all": (None, None, "gen_ai.input.messages", "missing"),
    "no number": ({"messages": [{"role": "user", "content": NAN}]}, SAID, "messages.0.content", "finite"),
    "an unknown field of no number": (
        {"messages": [{"role": "user", "content": "hi", "colour": NAN}]}, SAID, "messages.0.colour", "finite",
    ),
    "an over-long text": (
        {"messages": [{"role": "user", "content": "x" * 100_001}]}, SAID, "messages.0.content", "100000",
    ),
    "a choice that is a text": (ASKED, {"choices": ["yes"]}, "outputs.choices.0", "object"),
    "an answer that is a text": (ASKED, {"choices": [{"message": "yes"}]}, "gen_ai.output.messages", "messages"),
    "a blank in an id": (ASKED, {"id": "a b", "choices": [{"message": SAID}]}, "interaction_id", "pattern"),
    "too deep": (ASKED, nested(150), "outputs.", "nested deeper"),
}  # fmt: skip


@pytest.mark.filterwarnings("default")  # MLflow takes a warning that is an error for a reason not to trace
def test_bad_spans_are_named_and_the_good_ones_kept(mlflow_settings: Settings, sqlite_database: Engine) -> None:
    import mlflow

    mlflow.set_tracking_uri(mlflow_settings.tracking_uri)
    mlflow.set_experiment("damaged")

    def trace(inputs: Any, outputs: Any, start_ns: int | None = None) -> None:
        span = mlflow.start_span_no_context("chat", span_type="CHAT_MODEL", inputs=inputs, start_time_ns=start_ns)
        span.set_outputs(outputs)
        span.end(end_time_ns=None if start_ns is None else start_ns + 1)

    for inputs, outputs, _, _ in BAD.values():
        trace(ASKED, SAID)
        trace(inputs, outputs)
    trace(ASKED, SAID, time.time_ns() + DAY_NS)
    mlflow.flush_trace_async_logging()
    settings = mlflow_settings.model_copy(
        update={"intake": mlflow_settings.intake.model_copy(update={"shown_problems": 100})}
    )
    source, log = open_source("mlflow:damaged", settings), EventLog(sqlite_database)
    report = import_source(source, log, settings, ImportOptions())
    assert (report.rows, report.imported, report.rejected) == (2 * len(BAD) + 1, len(BAD), len(BAD) + 1)
    assert [r.event.body["response"]["content"] for r in log.scan()] == ["yes"] * len(BAD)
    for _, _, field, rule in [*BAD.values(), (None, None, "occurred_at", "future")]:
        assert any(p.field.startswith(field) and rule in p.rule for p in report.problems), (field, rule)
    assert import_source(source, log, settings, ImportOptions()).imported == 0
