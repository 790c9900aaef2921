"""What a tenant can ask for, and how its routes are."""

from serve.openapi.shapes import (
    FLAG,
    NUMBER,
    TEXT,
    WHOLE,
    Schema,
    answered,
    closed,
    in_path,
    listed,
    map_of,
    maybe,
    operation,
    ref,
)

MODELS, MODEL, STATUS = "/v1/models", "/v1/models/{model}", "/v1/agents/status"
NAMED = [in_path("model", "Its name; a slash in it is written %2F.")]
SIGNALS = ("latency", "errors", "tool_errors", "safety")


def paths(shared: Schema) -> Schema:
    """The routes that show what is served."""
    shared["Model"] = closed({"id": TEXT, "object": {"const": "model"}, "created": WHOLE, "owned_by": TEXT})
    shared["DeletedModel"] = closed({"id": TEXT, "object": {"const": "model"}, "deleted": {"const": True}})
    shared["Route"] = _route()
    return {MODELS: {"get": _listed()}, MODEL: {"get": _retrieved(), "delete": _deleted()}, STATUS: {"get": _status()}}


def _listed() -> Schema:
    answer = answered("They.", listed(ref("Model")))
    return operation("models", "List agents, versions and fine-tuned models.", answer)


def _retrieved() -> Schema:
    answer = answered("The model.", ref("Model"))
    return operation("model", "See one of them.", answer, refused=("404", "405"), parameters=NAMED)


def _deleted() -> Schema:
    return operation(
        "delete_model",
        "Have a fine-tuned model served no more; its version stays in the registry.",
        answered("It is served no more.", ref("DeletedModel")),
        refused=("404", "405", "409"),
        parameters=NAMED,
    )


def _status() -> Schema:
    properties = listed(ref("Route"))["properties"] | {"config_rejected": maybe(TEXT)}
    return operation(
        "agents_status", "See the routes: versions, shares, replicas, anomalies.", answered("They.", closed(properties))
    )


def _route() -> Schema:
    version = closed({"served": FLAG, "replicas": map_of({}), "breaker_open": FLAG})
    anomaly = closed({"version": TEXT, "signal": {"enum": list(SIGNALS)}, "value": NUMBER, "limit": NUMBER})
    return closed(
        {
            "agent": TEXT,
            "modality": TEXT,
            "stable": TEXT,
            "candidate": maybe(TEXT),
            "share": NUMBER,
            "arms": {"type": "array", "items": {"type": "object"}},
            "max_share": NUMBER,
            "shadow": maybe(TEXT),
            "pinned": FLAG,
            "experiment_id": maybe(TEXT),
            "revision": WHOLE,
            "updated_by": TEXT,
            "versions": map_of(version),
            "anomalies": {"type": "array", "items": anomaly},
        }
    )
