"""What the demo says while it runs: numbered stages with their times, on standard error."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.status import Status


@dataclass
class Stage:
    """One stage while it runs: what it does now, and what came out."""

    name: str
    title: str
    _status: Status | None = None
    outcome: str = ""

    def says(self, line: str) -> None:
        """Show the latest line of progress beside the spinner."""
        if self._status is not None and line.strip():
            self._status.update(f"{escape(self.title)} [dim]{escape(line.strip()[:90])}[/]")

    def found(self, outcome: str) -> None:
        """What the stage ends with, in a few words."""
        self.outcome = outcome


@dataclass
class Story:
    """The stages so far, and their seconds."""

    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def act(self, title: str) -> None:
        """Begin a part of the story."""
        self.console.print(f"\n[bold]{escape(title)}[/]")

    def note(self, text: str) -> None:
        """A sentence between stages."""
        self.console.print(f"  [dim]{escape(text)}[/]")

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[Stage]:
        """Run a stage: its time is kept, also when it fails."""
        stage = Stage(name, title)
        begun = time.monotonic()
        mark, style = "✗", "red"
        if not self.console.is_terminal:
            self.console.print(f"  … {escape(title)}")
        try:
            with self.console.status(escape(title), spinner="dots") as status:
                stage._status = status
                yield stage
            mark, style = "✓", "green"
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - begun, 2)
            outcome = f": {stage.outcome}" if stage.outcome else ""
            self.console.print(
                f"  [{style}]{mark}[/] {escape(title + outcome)} [dim]{time.monotonic() - begun:.1f} s[/]"
            )

    @property
    def elapsed_s(self) -> float:
        """Seconds since the story began."""
        return time.monotonic() - self.started
