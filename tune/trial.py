"""One trial of a sweep, inside a Ray Tune actor: the plain training in a thread, measured at each rung.

The actor is used again for the next trial: torch and its friends are imported once, the data is tokenised once, and
the model that trials are compared with stays loaded. For that a trial must be stoppable: the training waits at
each rung until it is told to go on, and its reporter raises in its thread as soon as the scheduler has had enough.

Successive halving has its rungs where each is `reduction` times as far as the one before; a population (PBT) has
them at equal distances, and at each a trial may go on from the checkpoint of a better one.
"""

import functools
import json
import math
import queue
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune

from cluster.errors import DatasetError, HealthGateError
from cluster.settings.training import SweepSettings
from train.imports import import_trainers
from tune.objective import Axes, Measurement, Start, Target, load_start, measure, measure_scorer
from tune.space import with_point

FAILED_SCORE = -1e9  # finite: the scheduler takes percentiles of scores
SAVED = "training"  # folder of the training's checkpoint within Tune's
OWNER = "trial"  # file beside it: whose checkpoint it is
ADOPTED = "adopted"  # the same, of a trial that another goes on from
_STARTS: dict[str, Start] = {}
"""What trials are compared with, by the sweep's folder; a process loads it once."""


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep share."""

    train_config: dict[str, Any]
    """Fields of `TrainConfig`; a trial's point replaces some, and each has its own `out`."""
    target: Target | None
    """What a model that answers is measured on."""
    folder: str
    """One sub-folder a trial is made here."""
    rungs: tuple[float, ...]
    """Shares of the training at which it is measured; the last is 1."""
    threads: int
    axes: Axes


def rungs_of(settings: SweepSettings, scheduler: str) -> tuple[float, ...]:
    """Where trials are measured under a scheduler."""
    count = settings.rungs
    if scheduler == "none":
        return (1.0,)
    if scheduler == "pbt":
        return tuple((place + 1) / count for place in range(count))
    return tuple(settings.reduction ** -(count - 1 - place) for place in range(count))


class StoppedError(Exception):
    """Raised in the training's thread when the scheduler has stopped the trial."""


class SweepTrial(ray.tune.Trainable):  # type: ignore[misc]  # Ray is untyped here
    """Each `step` runs the training on to its next rung, or to its end."""

    def setup(self, config: dict[str, Any], plan: Plan | None = None) -> None:
        """The first trial of this actor."""
        assert plan is not None
        self.plan = plan
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Stop what runs; the next trial is in the same actor."""
        self.running.stop()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """What the training measured at its next rung."""
        self.running.go_on()
        return self.running.next()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A copy of the training's checkpoint, for a trial that goes on from this one."""
        found = self.running.last_checkpoint()
        if found is not None:
            shutil.copytree(found, Path(checkpoint_dir) / SAVED)
            (Path(checkpoint_dir) / OWNER).write_text(self.trial_id)

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from the checkpoint of another trial; from its own, a training goes on by itself."""
        saved, owner = Path(checkpoint) / SAVED, Path(checkpoint) / OWNER
        if owner.is_file() and owner.read_text() != self.trial_id:
            self.running.adopt(saved, owner.read_text())

    def cleanup(self) -> None:
        """Stop what runs."""
        self.running.stop()

    def _begin(self, point: dict[str, Any]) -> None:
        self.running = RunningTrial(self.plan, point, Path(self.plan.folder) / self.trial_id)


class RunningTrial:
    """A training in a thread, with a queue of what it measured."""

    def __init__(self, plan: Plan, point: Mapping[str, Any], folder: Path) -> None:
        self.plan, self.point, self.folder = plan, dict(point), folder
        self.results: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stopped, self.told = threading.Event(), threading.Semaphore(0)
        self.begun_at = time.monotonic()
        self.share, self.targets = 0.0, [0]
        self.adopted = ""
        """Id of the trial whose place this one has taken."""
        self.thread = threading.Thread(target=self._run, name="training", daemon=True)

    def go_on(self) -> None:
        """Begin to train, or go on from the rung where the training waits."""
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.told.release()

    def stop(self) -> None:
        """End the training within one step."""
        self.stopped.set()
        self.told.release()
        if self.thread.ident is not None:
            self.thread.join()

    def next(self) -> dict[str, Any]:
        """The next result; waits for it."""
        return self.results.get()

    def last_checkpoint(self) -> Path | None:
        """The training's newest checkpoint."""
        from train.checkpoint import last_checkpoint

        return last_checkpoint(self.folder / "checkpoints")

    def adopt(self, saved: Path, owner: str) -> None:
        """Keep a checkpoint of another trial to begin from."""
        self.adopted = owner
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(saved, self.folder / ADOPTED, dirs_exist_ok=True)

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """The training's reporter: one step is done."""
        self.share = step / steps
        if self.stopped.is_set():
            raise StoppedError

    def checkpoint(self, folder: Path, step: int) -> None:
        """The training's reporter: a checkpoint was written; at a rung it is measured, and the training waits."""
        if self.targets and step >= self.targets[0]:
            self.targets = [target for target in self.targets if target > step]
            self._put(measured(self.plan, str(folder), self.point), done=False)
            self.told.acquire()
        if self.stopped.is_set():
            raise StoppedError

    def _run(self) -> None:
        try:
            result = self._train()
            found = measured(self.plan, str(result.adapter_dir), self.point)
            self.share = 1.0
            self._put(found, done=True, adapter_dir=str(result.adapter_dir), steps=result.steps)
        except StoppedError:
            return
        except (HealthGateError, DatasetError, FloatingPointError, ValueError) as error:
            self._fail(str(error))
        except BaseException as error:  # the trial must answer, or the sweep waits for ever
            self._fail(f"{type(error).__name__}: {error}")

    def _train(self) -> Any:
        import_trainers()
        from train.run import train_prepared

        prepared = prepared_for(self.plan, self.point, self.folder)
        resume_from = self._resume_from(prepared)
        reached = int(resume_from.name.removeprefix("step-")) if resume_from else 0
        targets = sorted({math.ceil(prepared.steps * share) for share in self.plan.rungs[:-1]})
        self.targets = [target for target in targets if reached < target < prepared.steps]
        return train_prepared(prepared, self, resume_from, time.monotonic())

    def _resume_from(self, prepared: Any) -> Path | None:
        """The training's own checkpoint, or that of a trial whose place it has taken."""
        from train.checkpoint import adopt

        adopted = self.folder / ADOPTED
        if not adopted.is_dir():
            return self.last_checkpoint()
        own = adopt(adopted, self.folder / "checkpoints", prepared.digest, prepared.config.learning_rate)
        shutil.rmtree(adopted)
        return own

    def _put(self, found: Measurement, *, done: bool, **more: Any) -> None:
        axes = self.plan.axes
        values = {axes.value: found.value, axes.cost: found.cost, "value": found.value, "cost": found.cost}
        values |= {"reward": found.reward} if found.reward is not None else {}
        values |= {"score": found.score(axes.limit), **self._progress()}
        self.results.put({**values, **more, "failed": "", "adopted": self.adopted, "done": done})

    def _fail(self, reason: str) -> None:
        self.results.put({"score": FAILED_SCORE, **self._progress(), "failed": reason or "failed", "done": True})

    def _progress(self) -> dict[str, float]:
        return {"progress": self.share, "seconds": time.monotonic() - self.begun_at}


def measured(plan: Plan, adapter_dir: str, point: Mapping[str, Any]) -> Measurement:
    """Measure an adapter with what this process keeps loaded."""
    if plan.target is not None:
        if plan.folder not in _STARTS:
            _STARTS[plan.folder] = load_start(plan.target, plan.threads)
        return measure(plan.target, adapter_dir, _STARTS[plan.folder], plan.threads)
    prepared = prepared_for(plan, point, Path(adapter_dir))
    base, table = prepared.config.base_model, prepared.data.validation
    return measure_scorer(prepared.config.method, adapter_dir, base, table, prepared.encoder)


def prepared_for(plan: Plan, point: Mapping[str, Any], out: Path) -> Any:
    """A trial's run, on token ids that all trials of this process share."""
    from train.config import TrainConfig
    from train.run import prepare_like

    config = TrainConfig(**{**with_point(plan.train_config, point), "out": out})
    shared = _shared(json.dumps(plan.train_config, sort_keys=True))
    steps = prepare_like(shared, config).steps
    first = max(1, min(math.ceil(steps * share) for share in plan.rungs))
    every = math.ceil(first / math.ceil(first / config.save_steps))  # a checkpoint falls on each rung
    return prepare_like(shared, config.model_copy(update={"save_steps": every}))


@functools.lru_cache(maxsize=1)
def _shared(train_config: str) -> Any:
    from train.config import TrainConfig
    from train.run import prepare

    return prepare(TrainConfig.model_validate_json(train_config))
