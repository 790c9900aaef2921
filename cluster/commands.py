"""Commands about the whole: `config`, `status`, `jobs`, `loop`, `submit`."""

import json
import sys
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from cluster.errors import InputError
from cluster.options import ConfigOption, JsonOption
from cluster.settings import load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False)


SECRET_WORDS = ("secret", "password", "token", "key")


@app.command()
def config(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """The settings in force and where each came from."""
    settings, origin = load_settings(config)
    rows = list(_flatten(settings))
    if json_output:
        print(
            json.dumps(
                {name: {"value": value, "origin": origin.get(name, "default")} for name, value in rows},
                default=str,
            )
        )
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value!s:<32}  {origin.get(name, 'default')}")


def _flatten(section: BaseModel, prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, _shown(name, value)))
    return rows


def _shown(name: str, value: Any) -> Any:
    """The value, or stars where it is a secret; passwords inside database URLs are hidden too."""
    if value is None:
        return None
    if any(word in name.split("_") for word in SECRET_WORDS):
        return "***"
    if name == "url" and "@" in str(value):
        import sqlalchemy as sa

        return sa.make_url(str(value)).render_as_string(hide_password=True)
    return value


@app.command()
def status(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """What runs, which switches are on, which version serves, what is under way."""
    from cluster.status import collect, lines

    picture = collect(load_settings(config)[0])
    print(json.dumps(picture) if json_output else "\n".join(lines(picture)))


@app.command()
def jobs(
    job_id: Annotated[str | None, typer.Argument(help="Show this one whole.")] = None,
    state: Annotated[str | None, typer.Option(help="Only pending, running, completed or failed ones.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Newest first, so many.")] = 20,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Training jobs, sweeps and turns of the loop, and their state."""
    from dataclasses import asdict

    from cluster.clock import to_iso
    from cluster.database import connect
    from cluster.jobs import STATES, Jobs

    if state is not None and state not in STATES:
        raise InputError("--state", state, f"must be one of {', '.join(STATES)}", "name a state or leave it out")
    settings, _ = load_settings(config)
    table = Jobs(connect(settings), settings.tenant, settings.workspace)
    found = [table.get(job_id)] if job_id else table.list(state=state, limit=limit)
    if json_output:
        print(json.dumps({"jobs": [asdict(job) for job in found]}, default=str))
        return
    if job_id:
        print("\n".join(f"{name}: {value}" for name, value in asdict(found[0]).items()))
        return
    for job in found:
        ended = job.output_version or job.error or ""
        print(f"{job.job_id:<24} {job.kind:<6} {job.state:<10} {to_iso(job.created_at_us)[:19]} {ended}"[:160])
    print("next: rayloop jobs JOB" if found else "no jobs; start one with `rayloop train run` or `rayloop loop`")


@app.command()
def loop(
    agent: Annotated[str, typer.Option(help="Whose loop turns.")],
    method: Annotated[list[str] | None, typer.Option(help="sft, dpo, kto; repeat it to compare several.")] = None,
    force: Annotated[bool, typer.Option(help="Train although there is not enough feedback.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="JOB", help="Go on with a turn that was cut off.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """One turn of the loop: curate, train if it is enough, register, evaluate, start a rollout of the best version."""
    from cluster.database import connect
    from cluster.jobs import Jobs
    from cluster.turn import Turn, run_turn

    settings, _ = load_settings(config)
    turn = Turn(agent, tuple(method or ["sft", "dpo"]), config.resolve() if config else None, force)
    table = Jobs(connect(settings), settings.tenant, settings.workspace)
    result = run_turn(settings, table, turn, resume=resume, say=lambda line: print(line, file=sys.stderr))
    if json_output:
        print(json.dumps(result))
        return
    started = result["steps"]["rollout"]
    print(f"passed: {', '.join(result['passed']) or 'none'}; best: {result['version'] or 'none'}")
    print("next: rayloop rollout status" if started["started"] else f"no rollout: {started['reason']}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="Dashboard of the Ray cluster.")] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Show the job's output until it ends.")] = True,
    manifest: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print a RayJob of this name instead of submitting.")
    ] = None,
    environment: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="Variable for the job; repeatable."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Send any rayloop command to a Ray cluster as a job: `rayloop submit -- curate --agent triage`."""
    from cluster.submit import rayjob_manifest
    from cluster.submit import submit as submit_job

    if manifest is not None:
        print(rayjob_manifest(context.args, manifest), end="")
        return
    stream = sys.stderr if json_output else sys.stdout
    on_text = (lambda text: print(text, end="", file=stream, flush=True)) if wait else None
    job_id = submit_job(context.args, address, environment=_variables(environment or []), on_text=on_text)
    if json_output:
        print(json.dumps({"ray_job_id": job_id, "address": address, "waited": wait}))
    elif not wait:
        print(f"submitted {job_id}; follow it with: ray job logs --address {address} --follow {job_id}")


def _variables(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise InputError("--env", pair, "must be NAME=VALUE", "write for example --env RAYLOOP_TENANT=acme")
    return dict(pair.split("=", 1) for pair in pairs)
