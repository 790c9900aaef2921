"""How the demo acts on Rayloop: the command line as separate processes, and HTTP. It imports no other folder."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from cluster.demo.story import Stage
from cluster.errors import UnavailableError
from cluster.loop import ROOT, run_command

END_S = 15.0
HTTP_TIMEOUT_S = 5.0


@dataclass
class Commands:
    """`rayloop …` with the demo's configuration."""

    config: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, stage: Stage | None = None, accepted: Collection[int] = (0,)) -> dict[str, Any]:
        """Run one command to its end; its progress shows in the stage."""
        folder = self.config.parent / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        name = "-".join(part for part in arguments[:2] if part.isalpha())
        with (folder / f"{time.time_ns()}-{name}.log").open("w", encoding="utf-8") as log:

            def says(line: str) -> None:
                print(line, file=log, flush=True)
                if stage is not None:
                    stage.says(line)

            with _ended_on_failure():
                return run_command(
                    arguments, config=self.config, on_line=says, environment=self.environment, accepted=accepted
                )

    def run_all(
        self,
        lines: Sequence[Sequence[str]],
        stage: Stage,
        *,
        at_once: int = 2,
        accepted: Collection[int] = (0,),
    ) -> list[dict[str, Any]]:
        """Run independent commands side by side, with one thread of arithmetic each."""
        alone = Commands(self.config, {**self.environment, "OMP_NUM_THREADS": "1"})
        with ThreadPoolExecutor(at_once) as pool, _ended_on_failure():
            futures = [pool.submit(alone.run, *line, stage=stage, accepted=accepted) for line in lines]
            return [future.result() for future in futures]

    @contextlib.contextmanager
    def beside(self, *arguments: str, accepted: Collection[int] = (0,)) -> Iterator["Future[dict[str, Any]]"]:
        """Run one command while the block runs; leaving the block waits for it."""
        with ThreadPoolExecutor(1) as pool, _ended_on_failure():
            yield pool.submit(self.run, *arguments, accepted=accepted)


@contextlib.contextmanager
def _ended_on_failure() -> Iterator[None]:
    """End the commands in other threads when the block raises, so that nobody waits for them."""
    before = psutil.Process().children(recursive=True)
    try:
        yield
    except BaseException:
        _end_children(but=before)
        raise


def _end_children(but: Collection[psutil.Process]) -> None:
    children = [child for child in psutil.Process().children(recursive=True) if child not in but]
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    _, left = psutil.wait_procs(children, END_S)
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@dataclass(frozen=True)
class Api:
    """The router, as an operator's script sees it."""

    url: str
    """Ends in `/v1`."""
    key: str

    def get(self, path: str) -> dict[str, Any]:
        """One JSON answer.

        Raises:
            UnavailableError: no answer, or an error.
        """
        request = urllib.request.Request(f"{self.url}{path}", headers={"authorization": f"Bearer {self.key}"})
        try:
            with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
                found: dict[str, Any] = json.load(response)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{self.url}{path} does not answer ({error})") from None
        return found


class Traffic:
    """The simulated analysts, in a process of their own."""

    def __init__(self, api: Api, folder: Path, arguments: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"traffic-{time.time_ns()}"
        self._tally, self._progress = folder / f"{stem}.json", folder / f"{stem}.log"
        line = [sys.executable, "-m", "cluster.demo.analysts", "--base-url", api.url, *arguments]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        with self._tally.open("wb") as out, self._progress.open("wb") as err:
            self.process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment, start_new_session=True
            )
        keys: IO[bytes] = self.process.stdin  # type: ignore[assignment]
        keys.write(f"{api.key}\n".encode())
        keys.close()

    def progress(self) -> str:
        """What the analysts last said of themselves."""
        lines = self._progress.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else ""

    def wait(self, stage: Stage, timeout_s: float) -> dict[str, Any]:
        """Their tally, when they have finished by themselves.

        Raises:
            UnavailableError: they failed, or were not done in time.
        """
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self.stop()
                raise UnavailableError(f"the analysts were not done after {timeout_s:.0f} s: {self.progress()}")
            stage.says(self.progress())
            time.sleep(0.2)
        return self._result()

    def stop(self) -> dict[str, Any]:
        """Send them home, and their tally; `{}` where they left none."""
        self.process.terminate()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return self._result() if self.process.returncode == 0 else {}

    def _result(self) -> dict[str, Any]:
        if self.process.returncode != 0:
            raise UnavailableError(f"the analysts failed: {self.progress() or self.process.returncode}")
        tally: dict[str, Any] = json.loads(self._tally.read_text(encoding="utf-8"))
        return tally


@dataclass
class Processes:
    """What one demo started, written down so that the next one ends exactly that and nothing else."""

    file: Path
    started: dict[int, float] = field(default_factory=dict)

    def add(self, pid: int) -> None:
        """Remember a process with its start time; the number alone may be given to another later."""
        self.started[pid] = psutil.Process(pid).create_time()
        self._write()

    def _write(self) -> None:
        document = {str(pid): begun for pid, begun in self.started.items()}
        self.file.write_text(json.dumps(document), encoding="utf-8")

    @staticmethod
    def left_over(file: Path) -> list[psutil.Process]:
        """Processes of an earlier demo that still run."""
        try:
            recorded = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        found = []
        for pid, begun in recorded.items():
            try:
                process = psutil.Process(int(pid))
                if abs(process.create_time() - begun) < 1 and process.pid != os.getpid():
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found
