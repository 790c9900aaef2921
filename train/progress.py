"""A live line on standard error: loss, learning rate, gradient norm, tokens a second, time left."""

import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """Counts steps and says how it goes; quiet enough for a log when it is not a terminal."""

    def __init__(self, title: str, steps: int, stream: TextIO | None = None, every_s: float | None = None) -> None:
        self.title, self.steps = title, steps
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.every_s = every_s if every_s is not None else (0.1 if self.live else 5.0)
        self.done = self.tokens = self.start_step = 0
        self.started = self.shown = time.monotonic()
        self.values: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.done:
            self._show()
        if self.live:
            self.stream.write("\n")
            self.stream.flush()

    def resume_at(self, step: int) -> None:
        """Steps that an earlier run has done already: they count for the bar, not for the speed."""
        self.done = self.start_step = step

    def advance(self, tokens: int = 0, steps: int = 1, **values: float) -> None:
        """Count `steps` more, with what they measured."""
        self.done += steps
        self.tokens += tokens
        self.values |= values
        if time.monotonic() - self.shown >= self.every_s:
            self._show()

    def line(self) -> str:
        """The line as text."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        here = self.done - self.start_step
        left = (self.steps - self.done) * seconds / max(here, 1)
        shown = " ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        speed = f"{self.tokens / seconds:,.0f} tokens/s " if self.tokens else ""
        share = self.done / max(self.steps, 1)
        return f"{self.title}: {self.done}/{self.steps} ({share:.0%}) {shown} {speed}{left:.0f} s left"

    def _show(self) -> None:
        self.shown = time.monotonic()
        self.stream.write(f"\r\x1b[2K{self.line()}" if self.live else f"{self.line()}\n")
        self.stream.flush()
