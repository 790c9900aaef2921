"""The part of a sweep that is Ray Tune: search, scheduler, and the nested MLflow runs of the trials."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from cluster.errors import InputError, NotFoundError
from cluster.settings import Settings
from cluster.settings.training import SweepSettings
from cluster.tracking import Run
from tune.report import Trial
from tune.space import to_ray
from tune.sweep import RESULTS, Sweep, sweep_folder
from tune.trial import Plan, SweepTrial

log = logging.getLogger(__name__)

QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_WARN_THRESHOLD_S": "30"}
SCHEDULERS = ("asha", "none")
METRICS = ("win_rate", "kl", "reward", "score", "progress")


class NestedRuns(ray.tune.Callback):  # type: ignore[misc]  # Ray is untyped here
    """One MLflow run a trial, under the sweep's; remembered in a file, so a resumed trial keeps its own."""

    def __init__(self, parent: Run, file: Path) -> None:
        self.parent, self.file = parent, file
        self.run_ids: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the trial's run, with its parameters."""
        if trial.trial_id in self.run_ids:
            return
        experiment = self.parent.client.get_run(self.parent.run_id).info.experiment_id
        tags = {
            "mlflow.parentRunId": self.parent.run_id,
            "rayloop.kind": "trial",
            "rayloop.trial": trial.trial_id,
        }
        opened = self.parent.client.create_run(experiment, run_name=f"trial {_number(trial)}", tags=tags)
        self.run_ids[trial.trial_id] = opened.info.run_id
        self.file.write_text(json.dumps(self.run_ids))
        Run(opened.info.run_id, self.parent.client).log_params(trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log what a rung measured."""
        run, step = self._run(trial), int(result["training_iteration"])
        run.log_metrics({name: result[name] for name in METRICS if name in result}, step=step)
        if result.get("failed"):
            run.set_tags({"rayloop.failed": result["failed"]})
        shown = ", ".join(f"{name} {result[name]:.3f}" for name in ("win_rate", "kl") if name in result)
        log.info(
            "trial %s at %.0f%%: %s", _number(trial), 100 * result["progress"], shown or result.get("failed")
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the trial's run."""
        failed = trial.last_result.get("failed")
        self.parent.client.set_terminated(self.run_ids[trial.trial_id], "FAILED" if failed else "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the trial's run as failed."""
        if trial.trial_id in self.run_ids:
            self.parent.client.set_terminated(self.run_ids[trial.trial_id], "FAILED")

    def _run(self, trial: Any) -> Run:
        return Run(self.run_ids[trial.trial_id], self.parent.client)


def run_trials(
    settings: Settings, sweep: Sweep, plan: Plan, first: dict[str, Any], run: Run, *, resume: bool
) -> list[Trial]:
    """Run the trials, or those that are left, and say what came of each.

    Raises:
        NotFoundError: the sweep was interrupted before its first trial.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    folder = sweep_folder(settings, sweep.sweep_id)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(SweepTrial, plan=plan),
        {"cpu": settings.sweep.cpus_per_trial, "gpu": settings.sweep.gpus_per_trial},
    )
    if resume:
        place = folder / RESULTS
        if not ray.tune.Tuner.can_restore(str(place)):
            raise NotFoundError(f"sweep {sweep.sweep_id} stopped before its first trial; start it anew")
        tuner = ray.tune.Tuner.restore(str(place), trainable, resume_unfinished=True, restart_errored=True)
    else:
        callbacks = [NestedRuns(run, folder / "runs.json")]
        tuner = ray.tune.Tuner(
            trainable,
            param_space=to_ray(sweep.space, grid=sweep.grid),
            tune_config=_tune_config(settings.sweep, sweep, first),
            run_config=ray.tune.RunConfig(
                name=RESULTS, storage_path=str(folder), callbacks=callbacks, verbose=0
            ),
        )
    results = tuner.fit()
    return sorted(
        (_trial(result, settings.sweep.rungs) for result in results), key=lambda trial: trial.number
    )


def _tune_config(settings: SweepSettings, sweep: Sweep, first: dict[str, Any]) -> ray.tune.TuneConfig:
    points = [first] if first and not sweep.grid else []
    return ray.tune.TuneConfig(
        metric="score",
        mode="max",
        num_samples=1 if sweep.grid else sweep.trials,
        search_alg=BasicVariantGenerator(points_to_evaluate=points, random_state=settings.seed),
        scheduler=_scheduler(settings, sweep.scheduler),
        max_concurrent_trials=settings.concurrency,
        reuse_actors=True,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )


def _scheduler(settings: SweepSettings, name: str) -> Any:
    if name not in SCHEDULERS:
        raise InputError("scheduler", name, f"must be one of {', '.join(SCHEDULERS)}", "choose one of them")
    if name == "none" or settings.rungs == 1:
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="training_iteration",
        max_t=settings.rungs,
        grace_period=1,
        reduction_factor=settings.reduction,
    )


def _number(trial: Any) -> int:
    """`ab12_00003` is trial 3."""
    return int(trial.trial_id.rpartition("_")[2])


def _trial(result: Any, rungs: int) -> Trial:
    values = result.metrics or {}
    failed = values.get("failed") or (str(result.error) if result.error else "")
    status = "failed" if failed else "completed" if values.get("progress", 0) >= 1 else "stopped"
    return Trial(
        number=int(Path(result.path).name.rpartition("_")[2]),
        config=dict(result.config or values.get("config", {})),
        win_rate=values.get("win_rate"),
        kl=values.get("kl"),
        reward=values.get("reward"),
        progress=float(values.get("progress", 0.0)),
        status=status,
        adapter_dir=values.get("adapter_dir"),
        seconds=float(values.get("seconds", 0.0)),
        reason=failed,
    )
