"""The labelled cases a detector is trained and measured on: plain files in `cases/`, a case a line.

`[train]` and `[held_out]` open the two parts. A line is a mark and a text (`+ You idiot`), or a name and a
text (`billing: Why …`); `= ` opens a passage that the following lines are about; `#` starts a comment.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["train", "held_out"]
FOLDER = Path(__file__).parent / "cases"
MARKS = {"+ ": "yes", "- ": "no", "0 ": "neutral"}


@dataclass(frozen=True, slots=True)
class Case:
    """A text with the label a person gave it."""

    part: Part
    label: str
    text: str
    passage: str | None = None


def cases(name: str, part: Part) -> list[Case]:
    """The cases of a detector in one part."""
    return [case for case in _parse((FOLDER / f"{name}.txt").read_text(encoding="utf-8")) if case.part == part]


def _parse(text: str) -> Iterator[Case]:
    part: Part = "train"
    passage: str | None = None
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line in ("[train]", "[held_out]"):
            part, passage = "train" if line == "[train]" else "held_out", None
        elif line.startswith("= "):
            passage = line[2:]
        elif line[:2] in MARKS:
            yield Case(part, MARKS[line[:2]], line[2:], passage)
        else:
            name, _, rest = line.partition(": ")
            yield Case(part, name, rest)
