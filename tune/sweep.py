"""A sweep: many trainings on one dataset, judged by an evaluation metric under a KL constraint.

Ray Tune draws the configurations and stops the worse ones early (ASHA), or lets them go on from the better ones with
other rates (PBT). Each trial is a nested MLflow run with its parameters, written from this process, so that the
trials' actors need no MLflow. A sweep lives in `<home>/sweeps/<id>/`, from which an interrupted one resumes.
"""

import json
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster import tracking
from cluster.database import connect
from cluster.errors import DatasetError, RayloopError
from cluster.interruption import goes_on_with
from cluster.registry import Registry
from cluster.runtime import ray_session
from cluster.settings import Settings
from data.grading import make_grader
from data.manifest import Manifest, find_dataset, load_manifest
from train.config import TrainConfig, TrainedPrompt
from train.evaluate.prompted import asked_behind
from train.evaluate.truth import read_truths
from train.plan import load_whole, named_version, resolve_base
from train.prompts import trained_prompt
from tune import report
from tune.job import job_again, new_job
from tune.objective import Axes, Target, axes_of
from tune.report import Trial
from tune.space import Choice, Range, contains, field_of
from tune.spec import Sweep, read_sweep, sweep_folder, write_sweep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found."""

    sweep_id: str
    run_id: str
    method: str
    dataset_id: str
    base: str
    """Version or path the trainings started from."""
    shared: dict[str, Any]
    """Fields of the training that were the same in every trial."""
    trials: list[Trial]
    chosen: Trial | None
    axes: Axes
    folder: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {**self.__dict__, "trials": [report.to_json(trial) for trial in self.trials]}
        values["pareto"] = [trial.number for trial in report.pareto_front(self.trials)]
        values["axes"] = asdict(self.axes)
        values["chosen"] = report.to_json(self.chosen) if self.chosen else None
        return values


def run_sweep(settings: Settings, sweep: Sweep) -> SweepResult:
    """Run a sweep from its beginning.

    Raises:
        DatasetError: no held-out feedback to judge the trials by.
        NotFoundError: no such dataset or version.
        ConflictError: the tenant runs as many jobs as it may.
        RayloopError: every trial failed for the same reason.
    """
    sweep = pin(settings, sweep)
    prepared = make_plan(settings, sweep, Path(sweep.dataset))  # refuses before anything is written
    tags = {"rayloop.kind": "sweep", "rayloop.sweep": sweep.sweep_id, "rayloop.method": sweep.method}
    again = goes_on_with(f"rayloop tune run --resume {sweep.sweep_id}")
    with again, new_job(settings, sweep), tracking.run(settings, f"sweep {sweep.sweep_id}", tags=tags) as run:
        sweep = replace(sweep, run_id=run.run_id)
        write_sweep(settings, sweep)
        return _carry_out(settings, sweep, prepared, run, resume=False)


def pin(settings: Settings, sweep: Sweep) -> Sweep:
    """The sweep with `latest` and aliases replaced by what they name today, and with the agent's prompt of today, so
    that resuming means the same.

    Raises:
        NotFoundError: no such dataset or version.
    """
    dataset = find_dataset(settings, sweep.dataset, agent=sweep.agent)
    manifest = load_manifest(dataset)
    agent = sweep.agent or manifest.agent
    named = named_version(sweep.base)
    base = sweep.base if named is None else Registry(settings).get(named).id
    prompt = _prompt_of(settings, agent, manifest)
    overrides = sweep.overrides if prompt is None else {**sweep.overrides, "prompt": prompt.model_dump(mode="json")}
    return replace(
        sweep,
        dataset=str(dataset),
        base=base or resolve_base(settings, None, agent)[0],
        agent=agent,
        overrides=overrides,
    )


def _prompt_of(settings: Settings, agent: str | None, manifest: Manifest) -> TrainedPrompt | None:
    database = connect(settings)
    try:
        return trained_prompt(database, settings.tenant, agent, manifest)
    finally:
        database.dispose()


def resume_sweep(settings: Settings, sweep_id: str) -> SweepResult:
    """Go on with a sweep that was interrupted; finished trials are kept, others go on from a checkpoint.

    Raises:
        NotFoundError: no such sweep.
        ConflictError: its process is still at it.
    """
    sweep = read_sweep(settings, sweep_id)
    prepared = make_plan(settings, sweep, Path(sweep.dataset))
    again = goes_on_with(f"rayloop tune run --resume {sweep_id}")
    with again, job_again(settings, sweep_id), tracking.reopen(settings, sweep.run_id) as run:
        return _carry_out(settings, sweep, prepared, run, resume=True)


def _carry_out(
    settings: Settings, sweep: Sweep, prepared: tuple[Any, dict[str, Any]], run: tracking.Run, *, resume: bool
) -> SweepResult:
    started = time.monotonic()
    plan, defaults = prepared
    dataset = Path(plan.train_config["dataset"])
    manifest = load_manifest(dataset)
    if not resume:
        space = {name: _text(dimension) for name, dimension in sweep.space.items()}
        shared = {"method": sweep.method, "base": sweep.base, "trials": sweep.trials, "space": space}
        run.log_params({**shared, "kl_limit": settings.sweep.kl_limit, "scheduler": sweep.scheduler})
        run.log_dataset(name=manifest.dataset_id, digest=manifest.dataset_hash, uri=str(dataset), context="training")
    with ray_session(settings):
        from tune.search import run_trials

        trials = run_trials(settings, sweep, plan, defaults, resume=resume)
    check_any_ran(trials)
    axes = axes_of(sweep.method, settings.sweep.kl_limit)
    chosen = report.choose(trials, axes.limit)
    found = SweepResult(
        sweep_id=sweep.sweep_id,
        run_id=run.run_id,
        method=sweep.method,
        dataset_id=manifest.dataset_id,
        base=sweep.base,
        shared={name: value for name, value in sweep.overrides.items() if name != "prompt"},
        trials=trials,
        chosen=chosen,
        axes=axes,
        folder=str(sweep_folder(settings, sweep.sweep_id)),
        seconds=time.monotonic() - started,
    )
    _log_result(run, found)
    return found


def check_any_ran(trials: Iterable[Trial]) -> None:
    """Refuse a sweep whose trials all failed for one reason: it is what they share, such as the data.

    Raises:
        RayloopError: with that reason.
    """
    reasons = {trial.reason if trial.status == "failed" else "" for trial in trials}
    if len(reasons) == 1 and (reason := reasons.pop()):
        raise RayloopError(f"every trial failed: {reason}")


def make_plan(settings: Settings, sweep: Sweep, dataset: Path) -> tuple[Any, dict[str, Any]]:
    """What all trials share, and the configuration that is tried first: the method's own default.

    Nothing here loads a model: each process that runs trials prepares the data and asks the start once, and by then
    this one has long begun to start them.

    Raises:
        DatasetError: nothing to learn from, somebody in it was erased, or no held-out feedback to judge the trials by.
        ConflictError: the version to start from learned from somebody who was erased.
    """
    from train.config import check_model_dir, resolve_config
    from train.examples import check_data, read_data
    from tune.trial import Plan, rungs_of

    folder = sweep_folder(settings, sweep.sweep_id)
    load_whole(dataset)
    base_model, init_adapter = resolve_base(settings, sweep.base, sweep.agent)
    threads = max(1, (os.cpu_count() or 1) // settings.sweep.concurrency)
    config = resolve_config(
        settings,
        sweep.method,
        base_model=base_model,
        init_adapter=init_adapter,
        dataset=dataset,
        out=folder,
        threads=threads,
        **sweep.overrides,
    )
    config = config.model_copy(update={"report_examples": 0})  # trials are measured here
    check_model_dir(base_model)
    check_data(config.method, config.kind, read_data(dataset, config.kind), dataset)
    plan = Plan(
        train_config=config.model_dump(mode="json"),
        target=None if config.scores else _make_target(settings, config),
        folder=str(folder / "trials"),
        rungs=rungs_of(settings.sweep, sweep.scheduler),
        threads=threads,
        axes=axes_of(sweep.method, settings.sweep.kl_limit),
    )
    defaults = {name: field_of(plan.train_config, name) for name in sweep.space}
    return plan, defaults if contains(sweep.space, defaults) else {}


def _make_target(settings: Settings, config: TrainConfig) -> Target:
    """The validation split's truths, and how they are answered."""
    truths = read_truths(config.dataset, split="validation", limit=settings.sweep.validation_prompts)
    if config.prompt is not None:
        truths = asked_behind(truths, config.prompt.text, config.prompt.recorded.values())
    if not truths:
        raise DatasetError(
            f"{config.dataset} holds no feedback in its validation split to judge trials by; curate more"
        )
    make_grader(settings.evaluation.grader, field="evaluation.grader")
    chosen = settings.evaluation
    return Target(
        base_model=config.base_model,
        init_adapter=config.init_adapter,
        truths=tuple(truths),
        grader=chosen.grader,
        max_new_tokens=chosen.max_new_tokens,
        batch_size=chosen.batch_size,
        kl_samples=settings.sweep.kl_samples,
        seed=settings.sweep.seed,
    )


def _log_result(run: tracking.Run, found: SweepResult) -> None:
    run.log_dict(found.to_json(), "sweep.json")
    run.log_text(report.markdown(found.trials, found.chosen, found.axes), "pareto.md")
    run.log_bytes(report.plot(found.trials, found.chosen, found.axes), "pareto.png")
    if found.chosen:
        best = {found.axes.value: found.chosen.value, found.axes.cost: found.chosen.cost}
        run.log_metrics({f"chosen.{name}": value for name, value in best.items()})
        run.set_tags({"rayloop.chosen": json.dumps(found.chosen.config)})


def _text(dimension: Range | Choice) -> str:
    if isinstance(dimension, Choice):
        return ",".join(map(str, dimension.values))
    return f"{dimension.low:g}:{dimension.high:g}"
