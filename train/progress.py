"""A live line on standard error: loss, learning rate, gradient norm, tokens a second, time left."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO


class Progress:
    """Counts steps and says how it goes; quiet enough for a log when it is not a terminal."""

    def __init__(self, title: str, steps: int, stream: TextIO | None = None, every_s: float | None = None) -> None:
        self.title, self.steps = title, steps
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.every_s = every_s if every_s is not None else (0.1 if self.live else 5.0)
        self.done = self.start_step = 0
        self.tokens = self.start_tokens = 0.0
        self.started = self.shown = time.monotonic()
        self.told = 0.0
        self.values: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.done:
            self._show()
        if self.live:
            self.stream.write("\n")
            self.stream.flush()

    def advance(self, tokens: int = 0, steps: int = 1, **values: float) -> None:
        """Count `steps` more, with what they measured."""
        self.done += steps
        self.tokens += tokens
        self.values |= values
        if time.monotonic() - self.shown >= self.every_s:
            self._show()

    def reached(self, step: int, tokens: float | None, values: Mapping[str, float]) -> None:
        """A run elsewhere has come to `step`, having read `tokens` in all."""
        if self.done == 0:  # what came before, loading or an earlier life, says nothing about the speed
            self.start_step, self.start_tokens, self.started = step, tokens or 0, time.monotonic()
        self.done, self.tokens = step, (tokens or self.start_tokens) - self.start_tokens
        self.values |= values
        if time.monotonic() - self.shown >= self.every_s:
            self._show()

    def beat(self, every_s: float = 1.0) -> bool:
        """True when it is time again to tell others how far it is."""
        due = time.monotonic() - self.told >= every_s
        if due:
            self.told = time.monotonic()
        return due

    def line(self) -> str:
        """The line as text."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        here = self.done - self.start_step
        left = f"{(self.steps - self.done) * seconds / here:.0f} s left" if here else "…"
        shown = " ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        speed = f"{self.tokens / seconds:,.0f} tokens/s " if self.tokens else ""
        share = self.done / max(self.steps, 1)
        return f"{self.title}: {self.done}/{self.steps} ({share:.0%}) {shown} {speed}{left}"

    def _show(self) -> None:
        self.shown = time.monotonic()
        self.stream.write(f"\r\x1b[2K{self.line()}" if self.live else f"{self.line()}\n")
        self.stream.flush()
