"""Traces that MLflow holds, as rows that are items: the spans of agents, and what people said of them.

MLflow's span types stand for the operations of the GenAI conventions, so `data.traces.genai` reads both.
"""

from collections.abc import Iterator
from typing import Any

from cluster.clock import SECOND_US
from cluster.errors import InputError
from cluster.settings import Settings
from cluster.tracking import client
from data.importers.source import Source
from data.intake.plain import to_plain
from data.rows import Row
from data.traces.genai import interaction_id, items_of
from data.traces.otlp import Attributes, Span

PAGE_TRACES = 100
OPERATIONS = {
    "CHAT_MODEL": "chat",
    "LLM": "chat",
    "TOOL": "execute_tool",
    "AGENT": "invoke_agent",
    "RETRIEVER": "retrieval",
}
USER, SESSION = "mlflow.trace.user", "mlflow.trace.session"


def mlflow_source(experiment: str, settings: Settings) -> Source:
    """The traces of an experiment.

    Raises:
        InputError: there is no such experiment.
        UnavailableError: MLflow does not answer.
    """
    mlflow = client(settings)
    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        known = ", ".join(e.name for e in mlflow.search_experiments()) or "none"
        raise InputError("source", f"mlflow:{experiment}", f"is no experiment; there are: {known}", "name one of them")
    return Source(experiment, lambda: _rows(mlflow, found.experiment_id, experiment), lambda: 0)


def _rows(mlflow: Any, experiment_id: str, experiment: str) -> Iterator[Row]:
    number, token = 0, None
    while True:
        page = mlflow.search_traces([experiment_id], max_results=PAGE_TRACES, page_token=token)
        for trace in page:
            for item, error in trace_items(trace, experiment):
                number += 1
                yield Row(number, item, number, error)
        if not (token := page.token):
            return


def trace_items(trace: Any, experiment: str) -> Iterator[tuple[dict[str, Any], InputError | None]]:
    """The items of one trace, each with its `kind`; or what is wrong with it."""
    spans = []
    for span in trace.data.spans:
        try:
            spans.append(_span(span, trace.info, experiment))
        except InputError as error:
            yield {"span": span.name}, error
    found = items_of(spans)
    for each in found:
        yield {"kind": each.kind, **each.item}, each.error
    chats = {f.span.span_id: interaction_id(f.span) for f in found if f.kind == "interaction" and f.error is None}
    for assessment in trace.info.assessments or ():
        about = chats.get(assessment.span_id or "", next(reversed(chats.values()), None))
        try:
            yield _said(assessment, about), None
        except InputError as error:
            yield {"kind": "feedback", "assessment": assessment.name}, error


def _span(span: Any, info: Any, experiment: str) -> Span:
    trace_id = info.trace_id.removeprefix("tr-")
    kind = str(span.span_type)
    attributes: Attributes = {"rayloop.agent": (info.tags or {}).get("rayloop.agent", experiment)}
    if kind in OPERATIONS:
        attributes["gen_ai.operation.name"] = OPERATIONS[kind]
        attributes |= _content(kind, span.name, to_plain(span.inputs, "inputs"), to_plain(span.outputs, "outputs"))
    for name, key in (("user.id", USER), ("gen_ai.conversation.id", SESSION)):
        if value := (info.trace_metadata or {}).get(key):
            attributes[name] = value
    if model := span.get_attribute("mlflow.llm.model"):
        attributes["gen_ai.request.model"] = str(model)
    failed = str(span.status.status_code).endswith("ERROR")
    return Span(
        trace_id=trace_id,
        span_id=span.span_id,
        parent_id=span.parent_id,
        name=span.name,
        start_ns=span.start_time_ns,
        end_ns=span.end_time_ns or span.start_time_ns,
        attributes=attributes,
        resource={},
        error=(span.status.description or "error") if failed else None,
    )


def _content(kind: str, name: str, inputs: Any, outputs: Any) -> Attributes:
    if kind == "TOOL":
        return {"gen_ai.tool.name": name, "gen_ai.tool.call.arguments": inputs, "gen_ai.tool.call.result": outputs}
    if kind == "RETRIEVER":
        passages = outputs if isinstance(outputs, list) else []
        texts = [p.get("page_content", p.get("content")) if isinstance(p, dict) else p for p in passages]
        return {"gen_ai.retrieval.documents": [{"content": text} for text in texts]}
    answer, reason, answer_id = _answer(outputs)
    given = {
        "gen_ai.input.messages": _asked(inputs),
        "gen_ai.output.messages": answer,
        "gen_ai.response.id": answer_id,
        "gen_ai.tool.definitions": inputs.get("tools") if isinstance(inputs, dict) else None,
    }
    if reason:
        given["gen_ai.response.finish_reasons"] = [reason]
    return {name: value for name, value in given.items() if value is not None}


def _asked(inputs: Any) -> list[Any]:
    """The messages of a span's inputs: a field of that name, a list, or the one text there is."""
    if isinstance(inputs, dict):
        inputs = inputs.get("messages", inputs.get("input", next(iter(inputs.values()), None)))
    if isinstance(inputs, list):
        return inputs
    return [] if inputs is None else [{"role": "user", "content": str(inputs)}]


def _answer(outputs: Any) -> tuple[list[Any] | None, str | None, str | None]:
    """The answer, why it ended and its id: of a chat completion, a message, or a text."""
    if isinstance(outputs, dict) and isinstance(outputs.get("choices"), list) and outputs["choices"]:
        choice = outputs["choices"][0]
        if not isinstance(choice, dict):
            raise InputError("outputs.choices.0", choice, "must be an object", "log the answer as the API gave it")
        return [choice.get("message")], choice.get("finish_reason"), outputs.get("id")
    if isinstance(outputs, dict) and isinstance(outputs.get("messages"), list):
        outputs = outputs["messages"][-1:]
    if isinstance(outputs, dict) and "role" in outputs:
        outputs = [outputs]
    if isinstance(outputs, list):
        return outputs[-1:], None, None
    return (None, None, None) if outputs is None else ([{"role": "assistant", "content": str(outputs)}], None, None)


def _said(assessment: Any, about: str | None) -> dict[str, Any]:
    """A person's assessment as feedback, a judge's as a grade, an expected answer as a correction."""
    if about is None:
        raise InputError("assessment", assessment.name, "is about a trace without a chat span", "trace the model call")
    shared = {"event_id": f"mlflow-{assessment.assessment_id}", "interaction_id": about}
    source = assessment.source
    at = {"occurred_at": assessment.create_time_ms * 1000 / SECOND_US} if assessment.create_time_ms else {}
    if assessment.expectation is not None:
        return {"kind": "feedback", **shared, **at, "user": source.source_id, "type": "correction",
                "text": _expected(assessment)}  # fmt: skip
    value = assessment.feedback.value if assessment.feedback is not None else None
    if str(source.source_type) != "HUMAN":
        return {"kind": "grade", **shared, **at, "grader": assessment.name, "grader_version": source.source_id,
                "reward": _share(assessment.name, value), "reason": assessment.rationale or ""}  # fmt: skip
    said = {"kind": "feedback", **shared, **at, "user": source.source_id}
    if assessment.rationale:
        said["reason"] = assessment.rationale
    if isinstance(value, bool):
        return said | {"type": "thumbs_up" if value else "thumbs_down"}
    if isinstance(value, int | float) and 1 <= value <= 5:
        return said | {"type": "rating", "value": value}
    raise InputError(assessment.name, value, "is neither true, false nor a rating from 1 to 5", "import it by hand")


def _expected(assessment: Any) -> str:
    if isinstance(assessment.expectation.value, str):
        return assessment.expectation.value
    raise InputError(assessment.name, assessment.expectation.value, "is no text", "import it by hand")


def _share(name: str, value: Any) -> float:
    if isinstance(value, int | float) and 0 <= value <= 1:  # True and False count as 1 and 0
        return float(value)
    if value in ("yes", "no"):
        return float(value == "yes")
    raise InputError(name, value, "is no number from 0 to 1, true, false, yes or no", "import it by hand")
