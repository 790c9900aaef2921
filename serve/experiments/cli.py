"""`rayloop experiment`: what runs, what the numbers say, and how many users it takes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.database import connect
from cluster.errors import InputError
from cluster.logs import configure_logging
from cluster.settings import load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False)

ConfigOption = Annotated[Path | None, typer.Option("--config", help="The rayloop.yaml to use.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command("list")
def list_command(
    agent: Annotated[str | None, typer.Option(help="Only this agent's.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """All experiments of this tenant, newest first."""
    from serve.experiments.store import list_experiments

    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    found = list_experiments(connect(settings), settings.tenant, agent)
    if json_output:
        print(json.dumps({"experiments": [asdict(experiment) for experiment in found]}))
        return
    lines = [f"{e.experiment_id}  {e.candidate} against {e.stable}  {e.outcome or e.state}" for e in found]
    print("\n".join(lines) or "no experiments yet; next: rayloop rollout start VERSION")


@app.command()
def show(
    experiment_id: Annotated[str, typer.Argument(help="From `rayloop experiment list`.")],
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Every metric of an experiment, by period, and whether the split is as configured."""
    from serve.experiments.projection import Projection
    from serve.experiments.readings import periods_of, read_all, read_split
    from serve.experiments.store import get_experiment

    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    engine = connect(settings)
    experiment = get_experiment(engine, experiment_id)
    Projection(engine, settings).catch_up()
    readings = {
        period: [asdict(r) for r in read_all(engine, experiment_id, settings.experiment, period=period)]
        for period in periods_of(engine, experiment_id)
    }
    split = asdict(read_split(engine, experiment_id, settings.experiment))
    if json_output:
        print(json.dumps({"experiment": asdict(experiment), "split": split, "periods": readings}))
        return
    print(
        f"{experiment_id}  {experiment.candidate} against {experiment.stable}  {experiment.outcome or experiment.state}"
    )
    print(f"split {split['users']}, expected {split['expected']}, p {split['p_value']:.3g} (always valid)")
    for period, rows in readings.items():
        print(f"\n{period}: candidate, control, effect, harm in (always valid), p (one look only)")
        print("\n".join(_row(row) for row in rows))


@app.command()
def plan(
    margin: Annotated[float, typer.Option(help="The difference to detect, in the metric's own units.")],
    probability: Annotated[float | None, typer.Option(help="Of the event, for a rate such as thumbs up.")] = None,
    deviation: Annotated[float | None, typer.Option(help="Standard deviation of a user's value, for a mean.")] = None,
    share: Annotated[
        float | None, typer.Option(help="The candidate's share, when all others are the control group.")
    ] = None,
    users_per_day: Annotated[float | None, typer.Option(help="Active users, to say how long it takes.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """How many users it takes to tell a difference, in one look."""
    from serve.experiments.planner import users_for_proportion, users_needed

    if (probability is None) == (deviation is None):
        raise InputError("plan", None, "needs one of --probability and --deviation", "give exactly one")
    _check_plan(margin, probability, deviation, share)
    settings, _ = load_settings(config)
    known: dict[str, Any] = {"alpha": settings.experiment.alpha, "power": settings.experiment.power}
    if share is not None:
        known["control_per_candidate"] = (1 - share) / share
    if probability is not None:
        found = users_for_proportion(probability, margin, **known)
    else:
        found = users_needed(float(deviation or 0) ** 2, margin, **known)
    document: dict[str, Any] = {"candidate": found.candidate, "control": found.control, "margin": margin, **known}
    if users_per_day:
        document["days"] = round((found.candidate + found.control) / users_per_day, 1)
    if json_output:
        print(json.dumps(document))
        return
    days = f", {document['days']} days" if users_per_day else ""
    print(f"{found.candidate} users on the candidate, {found.control} on control{days}")
    print(f"alpha {known['alpha']} one-sided, power {known['power']}, a single look")


def _check_plan(margin: float, probability: float | None, deviation: float | None, share: float | None) -> None:
    if not margin > 0:
        raise InputError("margin", margin, "must be above 0", "name the difference to detect")
    if probability is not None and not 0 < probability < 1:
        raise InputError("probability", probability, "must be between 0 and 1", "write a fraction such as 0.7")
    if deviation is not None and not deviation > 0:
        raise InputError("deviation", deviation, "must be above 0", "name a standard deviation")
    if share is not None and not 0 < share < 1:
        raise InputError("share", share, "must be between 0 and 1", "write a fraction such as 0.1")


def _row(row: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    means = "".join(f"{number(row[arm]['mean']):>10}" for arm in ("candidate", "control"))
    users = f"{row['candidate']['users']}/{row['control']['users']}"
    bounds = row["problem"] or f"[{number(row['harm_low'])}, {number(row['harm_high'])}]"
    return f"{row['metric']:<26}{means}{number(row['effect']):>10}{bounds:>22}{number(row['p_value']):>9}{users:>12}"
