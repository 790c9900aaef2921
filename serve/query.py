"""The query string of a list."""

from collections.abc import Sequence
from urllib.parse import parse_qsl

from serve.openai import ApiError, Scope


class Query:
    """Its values, each checked when it is asked for."""

    def __init__(self, scope: Scope) -> None:
        raw: bytes = scope.get("query_string", b"")
        self._values = dict(parse_qsl(raw.decode("latin-1"), keep_blank_values=True))

    def text(self, name: str) -> str | None:
        """A text, or `None` where it was not given.

        Raises:
            ApiError: 400 for one with a NUL character, which PostgreSQL cannot look for.
        """
        value = self._values.get(name)
        if value and "\0" in value:
            message = f"{name} must hold no NUL character, not {value[:40]!r}."
            raise ApiError(400, message, code="invalid_value", param=name)
        return value or None

    def number(self, name: str, default: int, highest: int) -> int:
        """A whole number from 1.

        Raises:
            ApiError: 400 for anything else.
        """
        value = self._values.get(name)
        if value is None:
            return default
        if not (value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= highest):
            message = f"{name} must be a whole number from 1 to {highest}, not {value[:40]!r}."
            raise ApiError(400, message, code="invalid_value", param=name)
        return int(value)

    def choice(self, name: str, known: Sequence[str]) -> str:
        """One of the known words, the first by default.

        Raises:
            ApiError: 400 for another.
        """
        value = self._values.get(name, known[0])
        if value not in known:
            message = f"{name} must be one of {', '.join(known)}, not {value[:40]!r}."
            raise ApiError(400, message, code="invalid_value", param=name)
        return value

    def mapping(self, name: str) -> dict[str, str]:
        """`name[key]=value` pairs."""
        start = f"{name}["
        return {
            key.removeprefix(start).removesuffix("]"): value
            for key, value in self._values.items()
            if key.startswith(start) and key.endswith("]")
        }
