"""Pages for those who run the installation."""

from serve.openapi.shapes import FLAG, NUMBER, OBJECT, TEXT, Schema, answered, operation

OPEN: list[Schema] = []
"""Who asks needs no key."""


def paths(shared: Schema) -> Schema:
    """Readiness, metrics, this document."""
    return {
        "/healthz": {"get": _health()},
        "/metrics": {"get": _metrics()},
        "/openapi.json": {"get": _document()},
    }


def _health() -> Schema:
    properties = {"status": {"enum": ["ok", "not ready"]}, "snapshot_age_s": NUMBER, "config_rejected": FLAG}
    found = {"type": "object", "properties": properties, "required": ["status"], "additionalProperties": False}
    return {
        "operationId": "healthz",
        "summary": "Is the router ready?",
        "security": OPEN,
        "responses": {"200": answered("It is.", found), "503": answered("Not yet.", found)},
    }


def _metrics() -> Schema:
    answer = {"description": "In Prometheus's text format.", "content": {"text/plain": {"schema": TEXT}}}
    return operation("metrics", "Metrics of this replica; for an admin of the tenant that runs it.", answer)


def _document() -> Schema:
    return {
        "operationId": "openapi",
        "summary": "This document.",
        "security": OPEN,
        "responses": {"200": answered("The document.", OBJECT)},
    }
