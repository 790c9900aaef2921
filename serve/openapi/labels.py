"""What waits for people's judgement, and what they send."""

from data.labelling.content import LETTERS
from data.labelling.queue import ORDER
from data.labelling.submission import LabelItem
from serve.labels_http import LABELS, MOST_SHOWN, QUEUE
from serve.openapi.shapes import (
    OBJECT,
    TEXT,
    WHOLE,
    Schema,
    answered,
    as_json,
    closed,
    in_query,
    many,
    maybe,
    of_model,
    operation,
    ref,
)


def paths(shared: Schema) -> Schema:
    """The two routes."""
    shared["label"] = of_model(LabelItem, shared)
    shared["LabelQueue"] = _queue()
    return {QUEUE: {"get": _waiting()}, LABELS: {"post": _submission()}}


def _waiting() -> Schema:
    number = {"type": "integer", "minimum": 1, "maximum": MOST_SHOWN}
    parameters = [in_query("limit", number, "So many at most."), in_query("reviewer", TEXT, "Who judges.")]
    answer = answered("What waits.", ref("LabelQueue"))
    return operation("labels_queue", "See what waits to be judged.", answer, refused=("400",), parameters=parameters)


def _submission() -> Schema:
    taken = as_json({"anyOf": [ref("label"), many(ref("label"))]})
    answer = answered("Each item's own answer.", ref("Results"))
    return operation("labels", "Judge items of the labelling queue.", answer, body=taken)


def _queue() -> Schema:
    answer = {"type": "object", "properties": {"answer": {"enum": list(LETTERS)}, "message": OBJECT}}
    item = closed(
        {
            "item_id": TEXT,
            "agent": maybe(TEXT),
            "at": TEXT,
            "reason": {"enum": list(ORDER)},
            "messages": {"type": "array", "items": OBJECT},
            "context": {"type": "array", "items": TEXT},
            "answers": {"type": "array", "items": answer, "minItems": 1, "maxItems": 2},
        }
    )
    return closed(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": item},
            "waiting": WHOLE | {"description": "How many there are for this reviewer."},
        }
    )
