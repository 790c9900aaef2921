"""Erasure of a person."""

from serve.openapi.shapes import TEXT, WHOLE, Schema, answered, closed, in_path, map_of, operation, ref
from serve.users_http import LONGEST_USER, PATH


def paths(shared: Schema) -> Schema:
    """The route."""
    shared["Erased"] = _erased()
    user = in_path("id", "The user, as the client names them.")
    user["schema"] |= {"maxLength": LONGEST_USER}
    erase = operation(
        "erase_user",
        "Remove a person and refuse their return; asked again, the answer is the same.",
        answered("What was erased, and what had been made of it.", ref("Erased")),
        refused=("400", "404", "409"),
        parameters=[user],
    )
    return {PATH: {"delete": erase}}


def _erased() -> Schema:
    names = {"type": "array", "items": TEXT}
    return closed(
        {
            "object": {"const": "user.erased"},
            "user_id": TEXT | {"description": "The pseudonym."},
            "tenant": TEXT,
            "erased_at": TEXT,
            "events": map_of(WHOLE) | {"description": "How many of each kind."},
            "interactions": WHOLE,
            "projected_rows": WHOLE,
            "partitions": names,
            "datasets": names,
            "versions": names,
            "exports": names,
            "write_ahead_log": TEXT,
        }
    )
