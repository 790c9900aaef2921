"""Worker processes that grade under a deadline.

A worker that has not answered by the deadline is ended and replaced; its answer counts as an abstention.
So does an answer that found no free worker in time.
"""

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import orjson

from cluster.settings.engines import GraderSettings

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 60.0


class WorkerError(Exception):
    """A worker ended, or its grader failed."""


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, settings: GraderSettings) -> "_Worker":
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "serve.grading_worker",
            str(settings.worker_memory_mb),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            limit=2 * settings.max_body_bytes,
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await worker._read()
        except BaseException:
            worker.kill()
            raise
        return worker

    async def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """One task's reply."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(orjson.dumps(task) + b"\n")
            await self._process.stdin.drain()
        except (ConnectionError, RuntimeError):  # uvloop raises the latter on a closed pipe
            raise WorkerError("the grading process ended") from None
        return await self._read()

    async def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise WorkerError("the grading process ended")
        reply: dict[str, Any] = orjson.loads(line)
        return reply

    @property
    def dead(self) -> bool:
        """True once the process has ended."""
        return self._process.returncode is not None

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> None:
        """Until the process is gone."""
        await self._process.wait()


class GraderPool:
    """Hands tasks to idle workers. Belongs to one event loop."""

    def __init__(self, settings: GraderSettings) -> None:
        self._settings = settings
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers: set[_Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.waiting = 0
        """Answers that are being graded or wait for a worker."""
        self.replaced = 0
        """Workers ended at a deadline or found dead."""

    async def start(self) -> None:
        """Start the workers."""
        await asyncio.gather(*[self._add() for _ in range(self._settings.workers)])

    async def close(self) -> None:
        """End the workers."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for worker in self._workers:
            worker.kill()
        await asyncio.gather(*[worker.wait() for worker in self._workers], return_exceptions=True)

    async def ask(self, task: dict[str, Any], deadline: float) -> dict[str, Any]:
        """A worker's reply by `deadline` (time of the event loop).

        Raises:
            TimeoutError: no reply by then.
            WorkerError: the worker ended.
        """
        self.waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                worker = await self._free_worker()
                try:
                    reply = await worker.ask(task)
                except BaseException:
                    self._replace(worker)  # its pipe may hold half a reply
                    raise
        finally:
            self.waiting -= 1
        self._idle.put_nowait(worker)
        return reply

    async def _free_worker(self) -> _Worker:
        while (worker := await self._idle.get()).dead:
            self._replace(worker)
        return worker

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.discard(worker)
        self.replaced += 1
        if not self._closed:
            for work in (self._add(), worker.wait()):
                task = asyncio.ensure_future(work)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _add(self) -> None:
        worker = await _Worker.start(self._settings)
        self._workers.add(worker)
        if self._closed:
            worker.kill()
        self._idle.put_nowait(worker)
