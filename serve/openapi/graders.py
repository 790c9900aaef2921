"""The grader, an application beside the router at `/grader`."""

from data.grading.make import KINDS
from serve.graders import ACTIONS, ERRORS, PREFIXES
from serve.openapi.shapes import (
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    Schema,
    answered,
    as_json,
    closed,
    listed,
    map_of,
    maybe,
    of_model,
    operation,
    ref,
)

MOUNTED = [{"url": "/grader"}]
"""Where the application is, from the address of the router."""


def paths(shared: Schema) -> Schema:
    """Both actions under both of their paths; what a grader may be is made from the models that check it."""
    shared["Grader"] = {"anyOf": [of_model(model, shared) for model, _ in KINDS.values()]}
    shared["Grade"] = _grade()
    described = {"run": _run, "validate": _validate}
    return {
        f"{prefix}{action}": {"servers": MOUNTED, "post": described[action](_name(prefix, action))}
        for prefix in PREFIXES
        for action in ACTIONS
    }


def _name(prefix: str, action: str) -> str:
    return f"{action}_grader_alpha" if "alpha" in prefix else f"{action}_grader"


def _run(name: str) -> Schema:
    answer = {"model_sample": TEXT, "item": OBJECT, "output_tools": {"type": "array", "items": OBJECT}}
    one = {"type": "object", "properties": answer, "required": ["model_sample"]}
    alone = one | {"properties": {"grader": ref("Grader"), **answer}, "required": ["grader", "model_sample"]}
    batch = closed({"grader": ref("Grader"), "items": {"type": "array", "items": one, "minItems": 1}})
    return operation(
        name,
        "Grade an answer, or a batch of answers.",
        answered("Its grade, or theirs in order.", {"anyOf": [ref("Grade"), listed(ref("Grade"))]}),
        body=as_json({"anyOf": [alone, batch]}),
        description="What cannot be judged, or not in time, is an abstention: its `reward` is null.",
    )


def _validate(name: str) -> Schema:
    return operation(
        name,
        "Say whether a configuration is a grader.",
        answered("It is.", closed({"grader": OBJECT, "name": TEXT, "version": TEXT})),
        body=as_json(closed({"grader": ref("Grader")})),
    )


def _grade() -> Schema:
    errors = {name: FLAG if raised is False else maybe(TEXT) for name, raised in ERRORS.items()}
    scores = map_of(NUMBER)
    metadata = {
        "name": TEXT,
        "type": TEXT,
        "errors": closed(errors),
        "execution_time": NUMBER,
        "scores": scores,
        "token_usage": {"type": "null"},
        "sampled_model_name": maybe(TEXT),
        "grader_version": TEXT,
        "abstained": FLAG,
        "reason": TEXT,
    }
    return closed(
        {
            "reward": maybe({"type": "number", "minimum": 0, "maximum": 1}),
            "metadata": closed(metadata),
            "sub_rewards": scores,
            "model_grader_token_usage_per_model": OBJECT,
        }
    )
