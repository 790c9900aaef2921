"""The part of a sweep that is Ray Tune: search, scheduler, and the nested MLflow runs of the trials."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from cluster import tracking
from cluster.errors import InputError, NotFoundError
from cluster.settings import Settings
from cluster.settings.training import SweepSettings
from train.files import write_file
from tune.job import tell
from tune.objective import Axes
from tune.report import Trial
from tune.space import Space, to_ray
from tune.spec import MUTABLE, Sweep, sweep_folder
from tune.trial import Plan, SweepTrial

log = logging.getLogger(__name__)

QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_WARN_THRESHOLD_S": "30"}
METRICS = ("reward", "score", "progress")
TOLD_EVERY_S = 5.0
RESULTS = "tune"
"""Ray Tune's own folder, in the sweep's."""


class NestedRuns(ray.tune.Callback):  # type: ignore[misc]  # Ray is untyped here
    """One MLflow run a trial, under the sweep's; remembered in a file, so a resumed trial keeps its own."""

    def __init__(self, settings: Settings, run_id: str, file: Path, axes: Axes, varied: Sequence[str]) -> None:
        self.settings, self.run_id, self.file = settings, run_id, file
        self.measures = (axes.value, axes.cost)
        self.varied = tuple(varied)
        """Fields whose values change within a trial."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the trial's run, with its parameters."""
        known = self._known()
        if trial.trial_id in known:
            return
        client = tracking.client(self.settings)
        experiment = client.get_run(self.run_id).info.experiment_id
        tags = {
            "mlflow.parentRunId": self.run_id,
            "rayloop.kind": "trial",
            "rayloop.trial": trial.trial_id,
        }
        opened = client.create_run(experiment, run_name=f"trial {_number(trial)}", tags=tags)
        write_file(self.file, json.dumps({**known, trial.trial_id: opened.info.run_id}))
        self._run(trial).log_params(trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log what a rung measured."""
        run, step = self._run(trial), int(result["training_iteration"])
        run.log_metrics({name: result[name] for name in (*self.measures, *METRICS) if name in result}, step=step)
        run.log_metrics({f"rate/{name}": trial.config[name] for name in self.varied}, step=step)
        for name in ("failed", "adopted"):
            if result.get(name):
                run.set_tags({f"rayloop.{name}": result[name]})
        shown = ", ".join(f"{name} {result[name]:.3f}" for name in self.measures if name in result)
        log.info("trial %s at %.0f%%: %s", _number(trial), 100 * result["progress"], shown or result.get("failed"))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the trial's run."""
        self._end(trial, "FAILED" if trial.last_result.get("failed") else "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the trial's run as failed."""
        if trial.trial_id in self._known():
            self._end(trial, "FAILED")

    def _end(self, trial: Any, status: str) -> None:
        run = self._run(trial)
        run.client.set_terminated(run.run_id, status)

    def _run(self, trial: Any) -> tracking.Run:
        return tracking.resume(self.settings, self._known()[trial.trial_id])

    def _known(self) -> dict[str, str]:
        """Trial id to run id. Read each time: a restored sweep brings back an old copy of this object."""
        known: dict[str, str] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        return known


class Told(ray.tune.Callback):  # type: ignore[misc]  # Ray is untyped here
    """Keeps the sweep's row in the job table current."""

    def __init__(self, settings: Settings, sweep_id: str) -> None:
        self.settings, self.sweep_id = settings, sweep_id
        self.told_at = 0.0
        """By the wall clock: a restored sweep brings back an old copy of this object."""

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called several times a second, whatever the trials do."""
        if time.time() - self.told_at >= TOLD_EVERY_S:
            self.told_at = time.time()
            tell(self.settings, self.sweep_id, sum(trial.is_finished() for trial in trials), len(trials))


def run_trials(settings: Settings, sweep: Sweep, plan: Plan, first: dict[str, Any], *, resume: bool) -> list[Trial]:
    """Run the trials, or those that are left, and say what came of each.

    Raises:
        NotFoundError: the sweep was interrupted before its first trial.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    folder = sweep_folder(settings, sweep.sweep_id)
    resources = {"cpu": _cpus(settings.sweep, sweep.scheduler), "gpu": settings.sweep.gpus_per_trial}
    check_room(settings.sweep, ray.cluster_resources())
    trainable = ray.tune.with_resources(ray.tune.with_parameters(SweepTrial, plan=plan), resources)
    if resume:
        place = folder / RESULTS
        if not ray.tune.Tuner.can_restore(str(place)):
            raise NotFoundError(f"sweep {sweep.sweep_id} stopped before its first trial; start it anew")
        tuner = ray.tune.Tuner.restore(str(place), trainable, resume_unfinished=True, restart_errored=True)
    else:
        varied = list(mutations(sweep.space)) if sweep.scheduler == "pbt" else []
        nested = NestedRuns(settings, sweep.run_id, folder / "runs.json", plan.axes, varied)
        callbacks = [nested, Told(settings, sweep.sweep_id)]
        tuner = ray.tune.Tuner(
            trainable,
            param_space=to_ray(sweep.space, grid=sweep.grid),
            tune_config=_tune_config(settings.sweep, sweep, first),
            run_config=ray.tune.RunConfig(name=RESULTS, storage_path=str(folder), callbacks=callbacks, verbose=0),
        )
    results = tuner.fit()
    return sorted((_trial(result) for result in results), key=lambda trial: trial.number)


def check_room(settings: SweepSettings, resources: Mapping[str, float]) -> None:
    """Refuse trials that the cluster could never hold: they would wait for ever.

    Raises:
        InputError: one asks for more CPUs or GPUs than there are.
    """
    for name, asked in (("cpu", settings.cpus_per_trial), ("gpu", settings.gpus_per_trial)):
        there = resources.get(name.upper(), 0.0)
        if asked > there:
            rule = f"is more than the cluster has ({there:g})"
            raise InputError(f"sweep.{name}s_per_trial", asked, rule, "lower it or add nodes")


def _cpus(settings: SweepSettings, scheduler: str) -> float:
    """Logical CPUs of a trial. A population takes turns on as many as there are, so its share bounds how many run."""
    if scheduler != "pbt":
        return settings.cpus_per_trial
    return max(settings.cpus_per_trial, float(ray.cluster_resources().get("CPU", 1)) / settings.concurrency)


def _tune_config(settings: SweepSettings, sweep: Sweep, first: dict[str, Any]) -> ray.tune.TuneConfig:
    points = [first] if first and not sweep.grid else []
    search = BasicVariantGenerator(
        points_to_evaluate=points,
        max_concurrent=0 if sweep.scheduler == "pbt" else settings.concurrency,
        random_state=settings.seed,
    )
    return ray.tune.TuneConfig(
        metric="score",
        mode="max",
        num_samples=1 if sweep.grid else sweep.trials,
        search_alg=search,
        scheduler=_scheduler(settings, sweep),
        reuse_actors=True,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )


def _scheduler(settings: SweepSettings, sweep: Sweep) -> Any:
    if sweep.scheduler == "none" or settings.rungs == 1:
        return FIFOScheduler()
    if sweep.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=1,
            hyperparam_mutations=mutations(sweep.space),
            quantile_fraction=settings.exploit_share,
            synch=True,  # else a trial that reports first finds nobody to copy, whatever the others will reach
        )
    return AsyncHyperBandScheduler(
        time_attr="progress",
        max_t=1.0,
        grace_period=settings.reduction ** -(settings.rungs - 1),
        reduction_factor=settings.reduction,
    )


def mutations(space: Space) -> dict[str, Any]:
    """What a population may change on the way, as Ray Tune's domains."""
    return to_ray({name: dimension for name, dimension in space.items() if name in MUTABLE})


def _number(trial: Any) -> int:
    """`ab12_00003` is trial 3."""
    return int(trial.trial_id.rpartition("_")[2])


def _trial(result: Any) -> Trial:
    values = result.metrics or {}
    failed = values.get("failed") or (str(result.error) if result.error else "")
    status = "failed" if failed else "completed" if values.get("progress", 0) >= 1 else "stopped"
    return Trial(
        number=int(Path(result.path).name.rpartition("_")[2]),
        config=dict(result.config or values.get("config", {})),
        value=values.get("value"),
        cost=values.get("cost"),
        reward=values.get("reward"),
        progress=float(values.get("progress", 0.0)),
        status=status,
        adapter_dir=values.get("adapter_dir"),
        seconds=float(values.get("seconds", 0.0)),
        reason=failed,
    )
