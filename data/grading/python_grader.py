"""`python`: a function `grade(sample, item)` of the grader's author, as in OpenAI's grader schema.

It runs in a process of its own behind a seccomp filter (sandbox_child.py): no files, no sockets, no other
processes, bounded memory, and ended when its time is over. Where the filter cannot be had, it does not run.
"""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, ClassVar, Literal

import orjson
from pydantic import Field, field_validator

from data.grading.text import MISSING, parse_json
from data.grading.types import AbstainError, BaseGrader, Graded, GraderConfig, GradeResult, Item, RawSample

CHILD = Path(__file__).with_name("sandbox_child.py")
START_TIMEOUT_S = 30.0
CPU_S = 600  # of one process over all its answers; each answer's time is bounded by the clock
MAX_REPLY_BYTES = 100_000


class PythonConfig(GraderConfig):
    """`source` defines `grade(sample, item)`, which returns a number."""

    type: Literal["python"]
    source: str = Field(min_length=1, max_length=256_000)
    image_tag: str | None = None
    """Taken for compatibility; there is one image here."""

    @field_validator("source")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            compile(value, "<grader>", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"is no Python: {error}") from None
        if "grade" not in value:
            raise ValueError("must define grade(sample, item)")
        return value


class Sandbox:
    """One process that runs one grader's source. Not thread-safe.

    Raises:
        AbstainError: it did not start, or its source fails.
    """

    def __init__(self, source: str, memory_mb: int, deadline: float) -> None:
        command = [sys.executable, "-I", str(CHILD), str(memory_mb), str(CPU_S)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/"
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._buffer = b""
        try:
            ready = self._read(deadline)
            self._write(source, deadline)
            ready = self._read(deadline)
        except BaseException:
            self.close()
            raise
        if "error" in ready:
            self.close()
            raise AbstainError(f"the grader's source fails: {ready['error']}", "python_grader_runtime_error")

    def ask(self, task: dict[str, Any], deadline: float) -> dict[str, Any]:
        """The reply to one answer by `deadline` (time.monotonic).

        Raises:
            AbstainError: too late, or the process ended; close the sandbox then.
        """
        self._write(task, deadline)
        return self._read(deadline)

    def close(self) -> None:
        """End the process at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _write(self, document: Any, deadline: float) -> None:
        data = memoryview(orjson.dumps(document) + b"\n")
        while data:
            self._wait([], [self._in], deadline)
            try:
                data = data[os.write(self._in, data) :]
            except (BlockingIOError, InterruptedError):
                continue
            except OSError:
                raise _ended() from None

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._wait([self._out], [], deadline)
            piece = os.read(self._out, 65_536)
            self._buffer += piece
            if not piece or len(self._buffer) > MAX_REPLY_BYTES:
                raise _ended()
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            reply = orjson.loads(line)
        except orjson.JSONDecodeError:
            raise _ended() from None
        if not isinstance(reply, dict):
            raise _ended()
        return reply

    def _wait(self, readable: list[int], writable: list[int], deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not any(select.select(readable, writable, [], left)):
            raise AbstainError("the grader's source took too long", "unresponsive_reward_error")


class PythonGrader(BaseGrader[PythonConfig]):
    """Reward is what the function returns, cut to [0, 1]; an exception abstains. Thread-safe."""

    modules: ClassVar[tuple[str, ...]] = ("python_grader", "sandbox_child")

    def __init__(self, config: PythonConfig, *, timeout_s: float = 10.0, memory_mb: int = 256) -> None:
        super().__init__(config)
        self.timeout_s, self.memory_mb = timeout_s, memory_mb
        self._idle: deque[Sandbox] = deque()

    def grade_by(self, item: Item, sample: RawSample, deadline: float) -> GradeResult:
        """`grade` that ends by `deadline` (time.monotonic)."""
        return self._guarded(lambda: self._run(item, self._checked(sample), deadline))

    def close(self) -> None:
        """End the processes that wait."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def __del__(self) -> None:
        if hasattr(self, "_idle"):
            self.close()

    def _grade(self, item: Item, sample: dict[str, Any]) -> Graded:
        return self._run(item, sample, time.monotonic() + self.timeout_s)

    def _run(self, item: Item, sample: dict[str, Any], deadline: float) -> Graded:
        parsed = parse_json(sample["output_text"])
        task = {"item": item, "sample": sample | {"output_json": None if parsed is MISSING else parsed}}
        try:
            sandbox = self._idle.pop()
        except IndexError:
            sandbox = Sandbox(self.config.source, self.memory_mb, deadline)
        try:
            reply = sandbox.ask(task, deadline)
        except BaseException:
            sandbox.close()
            raise
        self._idle.append(sandbox)
        value = reply.get("reward")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise AbstainError(f"the grader's source fails: {reply.get('error')}", "python_grader_runtime_error")
        return float(value), {"value": float(value)}, f"grade returned {value:g}"


def _ended() -> AbstainError:
    return AbstainError("the grader's process ended without a reward", "python_grader_server_error")
