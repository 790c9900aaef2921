"""How rows of a foreign format become items: a small declarative file, read by one short interpreter.

A mapping (`data/importers/mappings/*.yaml`, or a file of your own) lists the events a row gives. Values are
templates: `$a.b` is the value at a path, of whatever type (`$a.b?` may be missing; list places are
numbers or slices like `:-1`), `text {a.b}` puts values into text, `{a:digest}` is a short hash of a value
(`{row:digest}` of the whole row), anything else stands for itself. With `for_each`, the events are given
for every field whose name matches, with `each` as its value and `key` as its name.
"""

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import InputError
from data.events import BODIES, input_error

FOLDER = Path(__file__).parent / "mappings"
DIGEST_HEX = 16

_PLACE = re.compile(r"\{([^{}]+)\}")


class EventRule(BaseModel):
    """One event that a row gives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    fields: dict[str, Any]
    """Fields of the item (`data.intake.items`), as templates."""
    when: str | None = None
    """A path; the event is given only where its value is true."""
    unless: str | None = None
    """A path; the event is given only where its value is false."""


class Mapping(BaseModel):
    """From rows of one format to items."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    requires: list[str] = Field(min_length=1)
    """Paths that a row of this format has; also how `--format auto` knows it."""
    refuses: list[str] = []
    """Paths that a row of this format does not have."""
    for_each: list[str] = []
    """Patterns of field names; the events are given once a matching field."""
    events: list[EventRule] = Field(min_length=1)

    def fits(self, row: Any) -> bool:
        """Whether a row looks like this format."""
        return all(_has(row, p) for p in self.requires) and not any(_has(row, p) for p in self.refuses)

    def items(self, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The items of one row, each with its kind.

        Raises:
            InputError: the row lacks a field.
        """
        for path in self.requires:
            look_up(row, path)
        for scope in self._scopes(row):
            for rule in self.events:
                if rule.when is not None and not look_up(scope, rule.when.lstrip("$")):
                    continue
                if rule.unless is not None and look_up(scope, rule.unless.lstrip("$")):
                    continue
                yield rule.kind, _fill(rule.fields, scope)

    def _scopes(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        scope = {**row, "row": row}
        if not self.for_each:
            yield scope
            return
        matching = [key for key in row if any(fnmatch.fnmatch(key, p) for p in self.for_each)]
        if not matching:
            raise InputError(self.for_each[0], None, "matches no field of the row", "see the mapping")
        for key in matching:
            yield {**scope, "key": key, "each": row[key]}


def load_mapping(path: Path) -> Mapping:
    """A mapping from its file.

    Raises:
        InputError: unreadable, not YAML, or against the schema.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise InputError("mapping", str(path), f"cannot be read ({cause})", "mend the file") from None
    try:
        mapping = Mapping.model_validate(document)
    except ValidationError as error:
        raise input_error(error, f"mend {path.name}") from None
    for rule in mapping.events:
        if rule.kind not in BODIES:
            raise InputError("kind", rule.kind, "is no kind of event", f"mend {path.name}")
    return mapping


def shipped_mappings() -> dict[str, Mapping]:
    """The mappings that come with Rayloop, by name."""
    return {path.stem: load_mapping(path) for path in sorted(FOLDER.glob("*.yaml"))}


def look_up(scope: Any, path: str) -> Any:
    """The value at a dotted path.

    Raises:
        InputError: there is none.
    """
    value = scope
    for part in path.split("."):
        try:
            value = value[_index(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(path, None, "is missing in the row", "send the field, or use another format") from None
    return value


def _index(part: str) -> Any:
    if ":" not in part:
        return int(part)
    return slice(*(int(n) if n else None for n in part.split(":")))


def _has(row: Any, path: str) -> bool:
    try:
        look_up(row, path)
    except InputError:
        return False
    return True


def _fill(template: Any, scope: dict[str, Any]) -> Any:
    """The template with its values; optional ones that are missing are left out."""
    if isinstance(template, dict):
        filled = {name: _fill(inner, scope) for name, inner in template.items() if _wanted(inner, scope)}
        return filled
    if isinstance(template, list):
        return [_fill(inner, scope) for inner in template]
    if not isinstance(template, str):
        return template
    if template.startswith("$"):
        return look_up(scope, template[1:].removesuffix("?"))
    return _PLACE.sub(lambda place: _text(scope, place[1]), template)


def _wanted(template: Any, scope: dict[str, Any]) -> bool:
    if not (isinstance(template, str) and template.startswith("$") and template.endswith("?")):
        return True
    path = template[1:-1]
    return _has(scope, path) and look_up(scope, path) is not None


def _text(scope: dict[str, Any], place: str) -> str:
    path, _, form = place.partition(":")
    value = look_up(scope, path)
    if form == "digest":
        return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:DIGEST_HEX]
    return str(value)
