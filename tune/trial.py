"""One trial of a sweep, inside a Ray Tune actor: the plain `train()` in a thread, measured at each rung.

The actor is used again for the next trial, so torch and its friends are imported once. For that a trial
must be stoppable: the training's reporter raises in its thread as soon as the scheduler has had enough,
and the actor is free within one step.
"""

import functools
import math
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune

from cluster.errors import DatasetError, HealthGateError
from tune.objective import Measurement, Target, measure

FAILED_SCORE = -1e9  # finite: the scheduler takes percentiles of scores


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep share."""

    train_config: dict[str, Any]
    """Fields of `TrainConfig`; a trial's point replaces some, and each has its own `out`."""
    target: Target
    folder: str
    """One sub-folder a trial is made here."""
    rungs: int
    threads: int


class StoppedError(Exception):
    """Raised in the training's thread when the scheduler has stopped the trial."""


class SweepTrial(ray.tune.Trainable):  # type: ignore[misc]  # Ray is untyped here
    """Each `step` runs the training on to its next rung, or to its end."""

    def setup(self, config: dict[str, Any], plan: Plan | None = None) -> None:
        """Start the first trial of this actor."""
        assert plan is not None
        self.plan = plan
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Stop what runs and start the next trial in the same actor."""
        self.running.stop()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """What the training measured at its next rung."""
        return self.running.next()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the training keeps checkpoints of its own, and goes on from them."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: see `save_checkpoint`."""

    def cleanup(self) -> None:
        """Stop what runs."""
        self.running.stop()

    def _begin(self, point: dict[str, Any]) -> None:
        self.running = RunningTrial(self.plan, point, Path(self.plan.folder) / self.trial_id)
        self.running.start()


class RunningTrial:
    """A training in a thread, with a queue of what it measured."""

    def __init__(self, plan: Plan, point: Mapping[str, Any], folder: Path) -> None:
        self.plan, self.point, self.folder = plan, dict(point), folder
        self.results: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stopped = threading.Event()
        self.started = time.monotonic()
        self.share, self.rung = 0.0, 1
        self.thread = threading.Thread(target=self._run, name="training", daemon=True)

    def start(self) -> None:
        """Begin to train."""
        self.thread.start()

    def stop(self) -> None:
        """End the training within one step."""
        self.stopped.set()
        self.thread.join()

    def next(self) -> dict[str, Any]:
        """The next result; waits for it."""
        return self.results.get()

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """The training's reporter: one step is done."""
        self.share = step / steps
        if self.stopped.is_set():
            raise StoppedError

    def checkpoint(self, folder: Path, step: int) -> None:
        """The training's reporter: a checkpoint was written; at a rung it is measured."""
        if step % self.rung == 0:
            self._put(measured(self.plan, str(folder)), done=False)
        if self.stopped.is_set():
            raise StoppedError

    def _run(self) -> None:
        try:
            result = self._train()
            found = measured(self.plan, str(result.adapter_dir))
            self.share = 1.0
            self._put(found, done=True, adapter_dir=str(result.adapter_dir), steps=result.steps)
        except StoppedError:
            return
        except (HealthGateError, DatasetError, FloatingPointError, ValueError) as error:
            self._fail(str(error))
        except BaseException as error:  # the trial must answer, or the sweep waits for ever
            self._fail(f"{type(error).__name__}: {error}")

    def _train(self) -> Any:
        from train.checkpoint import last_checkpoint
        from train.config import TrainConfig
        from train.run import prepare, train

        config = TrainConfig(**{**self.plan.train_config, **self.point, "out": self.folder})
        steps = prepare(config).steps
        self.rung = max(1, math.ceil(steps / self.plan.rungs))
        config = config.model_copy(update={"save_steps": self.rung})
        return train(config, reporter=self, resume_from=last_checkpoint(config.out / "checkpoints"))

    def _put(self, found: Measurement, *, done: bool, **more: Any) -> None:
        values = {
            "win_rate": found.win_rate,
            "reward": found.reward,
            "kl": found.kl,
            "score": found.score(self.plan.target.kl_limit),
            "progress": self.share,
            "seconds": time.monotonic() - self.started,
        }
        self.results.put({**values, **more, "failed": "", "done": done})

    def _fail(self, reason: str) -> None:
        values = {"score": FAILED_SCORE, "progress": self.share, "seconds": time.monotonic() - self.started}
        self.results.put({**values, "failed": reason or "failed", "done": True})


def measured(plan: Plan, adapter_dir: str) -> Measurement:
    """Measure an adapter with the start model this process keeps loaded."""
    start = _start_model(plan.target.base_model, plan.target.init_adapter, plan.threads)
    return measure(plan.target, adapter_dir, start, plan.threads)


@functools.cache
def _start_model(base_model: str, init_adapter: str | None, threads: int) -> Any:
    from train.generate import LocalModel

    return LocalModel(base_model, init_adapter, threads=threads)
