"""`rayloop experiment`: what runs, what the numbers say, how many users it takes, and bandits."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.errors import InputError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import Settings, load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False)


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
    segment: Annotated[str | None, typer.Option(help="Only users of this segment, such as tier=pro.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Every metric of an experiment, by period; whether the split is as configured; what to be wary of."""
    from serve.experiments.report import describe, to_text

    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    document = describe(_counted(settings), experiment_id, settings, segment)
    print(json.dumps(document) if json_output else to_text(document))


@app.command()
def plot(
    experiment_id: Annotated[str, typer.Argument(help="From `rayloop experiment list`.")],
    out: Annotated[Path, typer.Option("--out", help="PNG file to write.")] = Path("experiment.png"),
    metric: Annotated[str | None, typer.Option(help="The metric; the primary without.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Draw a metric's effect over time with its always-valid interval."""
    from serve.experiments.timeline import draw, read_timeline

    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    points = read_timeline(_counted(settings), experiment_id, metric or settings.experiment.primary, settings)
    draw(points, metric or settings.experiment.primary, out)
    if json_output:
        print(json.dumps({"points": [asdict(point) for point in points], "plot": str(out)}))
    else:
        print(f"wrote {out}, {len(points)} points")


@app.command("off-policy")
def off_policy(
    experiment_id: Annotated[str, typer.Argument(help="From `rayloop experiment list`.")],
    share: Annotated[list[float] | None, typer.Option(help="Shares of the candidate to judge; repeat it.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """What other splits would have earned in explicit reward a request, from the log and its propensities."""
    from serve.experiments.logged import estimates

    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    found = estimates(connect(settings), experiment_id, share or [0.0, 0.5, 1.0])
    if json_output:
        print(json.dumps({"estimates": found}))
        return
    for row in found:
        print(
            f"share {row['share']:<5g} {row['estimator']:<14} {row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
            f"  worth {row['effective_requests']:.0f} requests"
        )


@app.command("start")
def start_command(
    shares: Annotated[list[str], typer.Argument(help="VERSION=SHARE for each candidate, such as triage/3=0.2.")],
    agent: Annotated[str | None, typer.Option(help="The route; the first version's own agent without.")] = None,
    modality: Annotated[str, typer.Option(help="Modality of the route.")] = "text",
    layer: Annotated[str | None, typer.Option(help="The layer whose buckets they share; alone without.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Compare several candidates with stable at once (A/B/n); each is a rollout up to its share."""
    import getpass

    from serve.rollout.commands import compare
    from serve.rollout.live import command_steps
    from serve.rollout.report import describe, line
    from serve.routes import RouteKey

    given = _shares(shares)
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    key = RouteKey(settings.tenant, agent or next(iter(given)).partition("/")[0], modality)
    steps = command_steps(connect(settings), settings)
    made = compare(steps, settings, key, given, actor=f"person:{getpass.getuser()}", layer=layer)
    if json_output:
        print(json.dumps({"rollouts": [describe(rollout) for rollout in made]}))
    else:
        print("\n".join(map(line, made)))
        print("next: rayloop rollout list")


def _shares(given: list[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in given:
        version, _, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            version = ""
        if not version or version in shares:
            raise InputError("shares", text, "must be VERSION=SHARE, each version once", "write triage/3=0.2")
        shares[version] = value
    return shares


@app.command()
def bandit(
    version: Annotated[str, typer.Argument(help="The version to try, such as triage/3.")],
    agent: Annotated[str | None, typer.Option(help="The route; the version's own agent without.")] = None,
    modality: Annotated[str, typer.Option(help="Modality of the route.")] = "text",
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Let shares follow the evidence, for choices where a wrong arm costs little; `end` ends it."""
    import getpass

    from serve.rollout.bandits import start_bandit
    from serve.rollout.live import command_steps
    from serve.routes import RouteKey

    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    key = RouteKey(settings.tenant, agent or version.partition("/")[0], modality)
    steps = command_steps(connect(settings), settings)
    made = start_bandit(steps, settings, key, version, actor=f"person:{getpass.getuser()}")
    print(json.dumps(asdict(made)) if json_output else f"{made.experiment_id}\nnext: rayloop experiment show ID")


@app.command()
def end(
    experiment_id: Annotated[str, typer.Argument(help="A running bandit.")],
    keep: Annotated[str, typer.Option(help="The arm that everybody gets: stable or candidate.")],
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """End a bandit and give everybody one of its arms."""
    import getpass

    from serve.rollout.bandits import end_bandit
    from serve.rollout.live import command_steps

    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    steps = command_steps(connect(settings), settings)
    ended = end_bandit(steps, experiment_id, keep, actor=f"person:{getpass.getuser()}")  # type: ignore[arg-type]
    print(json.dumps(asdict(ended)) if json_output else f"{experiment_id} ended: {ended.outcome}")


def _counted(settings: Settings) -> Engine:
    """The database, its statistics brought up to the log."""
    from serve.experiments.projection import Projection

    engine = connect(settings)
    Projection(engine, settings).catch_up()
    return engine


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
    _check_plan(margin, probability, deviation, share, users_per_day)
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


def _check_plan(
    margin: float, probability: float | None, deviation: float | None, share: float | None, users_per_day: float | None
) -> None:
    if not margin > 0:
        raise InputError("margin", margin, "must be above 0", "name the difference to detect")
    if probability is not None and not 0 < probability < 1:
        raise InputError("probability", probability, "must be between 0 and 1", "write a fraction such as 0.7")
    if deviation is not None and not deviation > 0:
        raise InputError("deviation", deviation, "must be above 0", "name a standard deviation")
    if share is not None and not 0 < share < 1:
        raise InputError("share", share, "must be between 0 and 1", "write a fraction such as 0.1")
    if users_per_day is not None and not users_per_day > 0:
        raise InputError("users_per_day", users_per_day, "must be above 0", "name the users of a day")
