"""Reads suites: JSON lines, one case a line, built in and a team's own.

A line is `{"id", "messages", "expect", "domain"?, "hard"?, "tools"?, "insists"?}`. A team's file of the same name
adds its cases; a case with the same id replaces ours.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from train.evaluate.scorers import check_expectation
from train.evaluate.types import Case, Prompt

BUILT_IN = Path(__file__).parent / "suites"
FIELDS = {"id", "messages", "expect", "domain", "hard", "tools", "insists"}


def read_cases(suite: str, folder: Path | None = None) -> list[Case]:
    """The cases of a suite, by id.

    Raises:
        InputError: a line is not a case, or `folder` does not exist; the message names file and line.
    """
    if folder is not None and not folder.is_dir():
        raise InputError("evaluation.suites", str(folder), "is not a folder", "name a folder of .jsonl files")
    cases: dict[str, Case] = {}
    for place in (BUILT_IN, folder):
        file = place / f"{suite}.jsonl" if place else None
        if file and file.is_file():
            cases |= {case.id: case for case in _read(file, suite)}
    return sorted(cases.values(), key=lambda case: case.id)


def _read(file: Path, suite: str) -> Iterator[Case]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield _parse(f"{file.name}:{number}", line, suite)


def _parse(where: str, line: str, suite: str) -> Case:
    try:
        row: dict[str, Any] = json.loads(line)
        unknown = set(row) - FIELDS
        messages = row["messages"]
        wellformed = isinstance(row["id"], str) and messages and all("role" in m for m in messages)
        wellformed = wellformed and isinstance(row.get("insists"), str | None)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(where, line, "is not a case", "write id, messages and expect") from None
    if unknown or not wellformed:
        raise InputError(where, sorted(unknown) or line, "is not a case", f"use {', '.join(sorted(FIELDS))}")
    tools = row.get("tools")
    return Case(
        id=row["id"],
        suite=suite,
        prompt=Prompt(tuple(messages), tuple(tools) if tools else None),
        expect=check_expectation(where, row.get("expect") or _default_expectation(suite)),
        domain=str(row.get("domain", "general")),
        hard=bool(row.get("hard", True)),
        insists=row.get("insists"),
    )


def _default_expectation(suite: str) -> dict[str, Any] | None:
    return {"refusal": {"refuses": True}, "over_refusal": {"refuses": False}}.get(suite)
