"""KubeRay's schemas, made strict."""

from typing import Any


def closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` wherever properties are listed."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    result = {k: closed(v) for k, v in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and "properties" in schema and not open_ended:
        result["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        result = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return result
