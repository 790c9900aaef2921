"""What a detector is.

A detector looks at many texts at once and returns for each a badness in [0, 1], or `None` when it cannot
tell; above 0.5 it means yes. Everything else about it, how it was made and how fast it is, is its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

YES = 0.5
"""Badness above which a detector means yes."""


@dataclass(frozen=True, slots=True)
class Item:
    """A text to judge, with the passages it may rest on."""

    text: str
    passages: Sequence[str] = ()


class Detector(Protocol):
    """Judges texts; the same items always get the same answers."""

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """Badness in [0, 1] of each item, or `None` where it cannot tell."""
        ...
