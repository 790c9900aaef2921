"""Reading answers: strict JSON, normalised text, templates. Answers are data; nothing in them is expanded."""

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from cluster.errors import InputError
from data.grading.types import AbstainError, FailedAnswerError, Item

TEMPLATE = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
PATH = re.compile(r"(item|sample)((?:\.[A-Za-z0-9_\-]+|\[\d+\])+)")
INDEX = re.compile(r"\[(\d+)\]")
SAMPLE_FIELDS = ("output_text", "output_json", "output_tools")
MISSING = object()


def parse_json(text: str) -> Any:
    """The JSON value that is the whole of `text`; `MISSING` if it is anything else.

    Duplicate keys and NaN are refused, so an answer cannot name two verdicts at once.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return MISSING


def normalise(text: str) -> str:
    """Text for comparison: NFKC, case folded, white space collapsed, outer punctuation removed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(" .,;:!?\"'`")


def lookup(value: Any, path: str) -> Any:
    """The value at a dotted path of keys and list positions; `MISSING` where there is none."""
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value


def check_template(field: str, template: str) -> None:
    """Refuse a template that names anything but `item.…` or a known field of `sample`.

    Raises:
        InputError: with the field's name.
    """
    for expression in TEMPLATE.findall(template):
        match = PATH.fullmatch(expression)
        if not match:
            raise InputError(field, template, f"names {expression!r}", "use {{ item.x }} or {{ sample.output_text }}")
        first = _dotted(match[2]).split(".")[1]
        if match[1] == "sample" and first not in SAMPLE_FIELDS:
            raise InputError(field, template, f"names sample.{first}", f"use one of {', '.join(SAMPLE_FIELDS)}")


def render(template: str, item: Item, sample: Mapping[str, Any]) -> str:
    """The template with its expressions replaced in one pass; what is put in is not expanded again.

    Raises:
        AbstainError: the item lacks a value.
        FailedAnswerError: the answer lacks a value.
    """
    return TEMPLATE.sub(lambda match: shown(resolve(match[1], item, sample)), template)


def resolve(expression: str, item: Item, sample: Mapping[str, Any]) -> Any:
    """The value of `item.a.b` or `sample.output_tools[0].function.name`, in its own type."""
    root, _, path = _dotted(expression).partition(".")
    if root == "item":
        found = lookup(item, path)
        if found is MISSING or found is None:
            raise AbstainError(f"the item has no {path!r}")
        return found
    found = lookup({**sample, "output_json": parse_json(sample["output_text"])}, path)
    if found is MISSING or found is None:
        raise FailedAnswerError(f"the answer has no {path!r}")
    return found


def render_value(value: Any, item: Item, sample: Mapping[str, Any]) -> Any:
    """A configured value; a string that is one whole expression keeps the type of what it names."""
    if not isinstance(value, str):
        return value
    whole = TEMPLATE.fullmatch(value.strip())
    return resolve(whole[1], item, sample) if whole else render(value, item, sample)


def equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: strings normalised, numbers by value, `true` is not 1."""
    if isinstance(left, str) and isinstance(right, str):
        return normalise(left) == normalise(right)
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return bool(left == right)


def _dotted(expression: str) -> str:
    """`a.b[0].c` as `a.b.0.c`."""
    return INDEX.sub(r".\1", expression)


def shown(value: Any) -> str:
    """A value as text: itself, or its JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate key")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(name)
