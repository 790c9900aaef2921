"""`rayloop train`: the offline base model, and LoRA adapters from datasets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import InputError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import Settings, load_settings
from train.answers import generate

if TYPE_CHECKING:
    from train.plan import Request

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Fit a LoRA adapter to a dataset.")

app.command("generate")(generate)


@app.callback()
def train() -> None:
    """Fit a LoRA adapter to a dataset."""


@app.command("toy")
def toy(
    examples: Annotated[Path, typer.Option(help='JSON lines of {"messages": [...]}.')],
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    epochs: Annotated[float | None, typer.Option(help="Passes over the examples.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small base model from scratch on chat examples."""
    chosen = {k: v for k, v in {"epochs": epochs, "seed": seed}.items() if v is not None}
    settings, _ = load_settings(config, training={"toy": chosen})
    configure_logging(settings.logging)
    from train.toy import build_toy_base, read_examples

    result = build_toy_base(out, read_examples(examples), settings.training.toy)
    report = {
        "path": str(result.path.resolve()),
        "parameters": result.parameters,
        "examples": result.examples,
        "steps": result.steps,
        "loss": round(result.loss, 4),
        "seconds": round(result.seconds, 2),
    }
    human = f"{result.parameters:,} parameters, loss {result.loss:.3f}, {result.seconds:.0f} s, in {out}"
    _print(report, f"{human}\nnext: rayloop register MODEL --base {out}", as_json)


@app.command("run")
def run(
    method: Annotated[
        list[str] | None, typer.Option(help="sft, dpo, kto, reward, score_card, grpo; repeat it.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="Dataset id, hash prefix, folder, or `latest`.")] = "latest",
    agent: Annotated[str | None, typer.Option(help="Whose latest dataset and champion.")] = None,
    base: Annotated[str | None, typer.Option(help="Model folder, hub id, or version such as triage@champion.")] = None,
    weights: Annotated[str | None, typer.Option(help="lora, qlora (on a GPU) or full.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    beta: Annotated[float | None, typer.Option(help="KL coefficient of DPO, KTO and GRPO.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in one forward pass.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Forward passes in one step.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and dropout.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Ray Train workers.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; made up when not given.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with an unfinished training.")] = None,
    baseline: Annotated[bool | None, typer.Option(help="Train SFT on the same feedback beside.")] = None,
    use_ray: Annotated[bool, typer.Option("--ray/--no-ray", help="On Ray Train, or in this process.")] = True,
    register_as: Annotated[
        str | None,
        typer.Option("--register", metavar="MODEL", help="Register what was trained as versions of this agent."),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train on a curated dataset; DPO and KTO are reported beside SFT on the same feedback."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    from train.plan import Request

    shape = {"weights": weights, "learning_rate": learning_rate, "beta": beta, "seed": seed, "device": device}
    length = {"epochs": epochs, "max_steps": max_steps}
    size = {"batch_size": batch_size, "gradient_accumulation": gradient_accumulation}
    request = Request(
        methods=tuple(method or ["dpo"]),
        dataset=dataset,
        agent=agent,
        base=base,
        name=name,
        resume=resume,
        workers=workers,
        ray=use_ray,
        sft_baseline=baseline,
        overrides=shape | length | size,
    )
    result, follow = _trained(settings, request, register_as)
    _print(result, f"{_table(result)}\nnext: {follow}", as_json)


def _trained(settings: Settings, request: "Request", register_as: str | None) -> tuple[dict[str, Any], str]:
    """What a training found, registered where that was asked for, and the command that comes next."""
    from cluster.database import connect
    from train.jobs import run_training

    if register_as is not None:
        _check_registrable(register_as, request.methods)
    database = connect(settings)
    result = run_training(settings, request, database)
    if register_as is None:
        return result, _following(result)
    from train.register import register_runs

    result = register_runs(settings, database, register_as, result)
    return result, f"rayloop evaluate {result['version']}"


def _check_registrable(model: str, methods: Sequence[str]) -> None:
    """Refuse before a training, and not after it, what could not be registered."""
    from cluster.registry import check_model_name
    from train.config import SCORING_METHODS

    check_model_name(model)
    scoring = [method for method in methods if method in SCORING_METHODS]
    if scoring:
        rule = f"is for models that answer, {scoring[0]} makes one that scores"
        raise InputError("--register", model, rule, "leave it out; ask the reward model as a grader")


@app.command("remote")
def remote(
    model: Annotated[str, typer.Option(help="Base model, by its name at the endpoint.")] = "",
    agent: Annotated[str, typer.Option(help="Agent that the result becomes a version of.")] = "",
    method: Annotated[str, typer.Option(help="sft or dpo.")] = "sft",
    dataset: Annotated[str, typer.Option(help="Dataset id, hash prefix, folder, or `latest`.")] = "latest",
    base_url: Annotated[str | None, typer.Option(help="Address in front of /files; else as configured.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in one step.")] = None,
    beta: Annotated[float | None, typer.Option(help="KL coefficient of DPO.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="JOB", help="Go on watching a job that was sent.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have a dataset trained by another endpoint that speaks OpenAI's fine-tuning API; its result is registered."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    from cluster.database import connect
    from train.remote import RemoteRequest, train_remotely

    if resume is None and not (model and agent):
        raise InputError("--model", model, "and --agent must be given", "or name a job to --resume")
    hyperparameters = {"n_epochs": epochs, "batch_size": batch_size, "beta": beta}
    request = RemoteRequest(
        model=model,
        agent=agent,
        method=method,
        dataset=dataset,
        base_url=base_url or settings.finetuning.remote.base_url,
        hyperparameters={name: value for name, value in hyperparameters.items() if value is not None},
        suffix=suffix,
        resume=resume,
    )
    result = train_remotely(settings, connect(settings), request)
    following = f"serve.engines.NAME.models: {{{result['version']}: {result['remote_model']}}} in rayloop.yaml"
    _print(result, f"{result['version']} is {result['remote_model']}\nnext: {following}", as_json)


@app.command("job")
def job(
    job_id: Annotated[str, typer.Argument(help="A job of the fine-tuning API.")],
    token: Annotated[str, typer.Option(help="Shows that the job was given to this process.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Do a job of the fine-tuning API; `rayloop up` starts this by itself."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    from cluster.database import connect
    from train.finetuning import run_job

    version = run_job(settings, connect(settings), job_id, token)
    _print({"job_id": job_id, "version": version}, f"{job_id} registered as {version}", as_json)


@app.command("register")
def register(
    model: Annotated[str, typer.Argument(help="Name of the agent the version is for.")],
    adapter: Annotated[Path | None, typer.Argument(help="Folder of an adapter.")] = None,
    base: Annotated[str | None, typer.Option(help="Register this base model instead of an adapter.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model of the adapter, where it is not known.")] = None,
    run: Annotated[str | None, typer.Option(help="MLflow run that made the adapter.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a trained adapter or a base model into the registry."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    if (adapter is None) == (base is None):
        raise InputError("adapter", adapter, "or --base must be given, one of the two", "name a folder or a base model")
    from cluster.database import connect
    from train.register import register_adapter, register_base

    database = connect(settings)
    if adapter is not None:
        version = register_adapter(settings, database, model, adapter, base=base_model, run_id=run)
    else:
        version = register_base(settings, database, model, str(base))
    report = {
        "version": version.id,
        "name": version.name,
        "base_model": version.base_model,
        "adapter_sha256": version.adapter_sha256,
        "dataset_hash": version.dataset_hash,
        "run_id": version.run_id,
        "aliases": list(version.aliases),
    }
    following = f"rayloop evaluate {version.id} --against champion" if adapter else "rayloop up"
    _print(report, f"{version.id} ({version.name}) registered\nnext: {following}", as_json)


def _following(result: dict[str, Any]) -> str:
    """The command that uses what was trained."""
    from train.config import SCORING_METHODS

    if result["method"] in SCORING_METHODS:
        return f"rayloop train reward-server {result['adapter_dir']}"
    return f"rayloop register MODEL {'--base ' if result['weights'] == 'full' else ''}{result['adapter_dir']}"


@app.command("reward-server")
def reward_server(
    adapter: Annotated[Path, typer.Argument(help="Folder of a reward model's adapter.")],
    base: Annotated[str | None, typer.Option(help="Its base model, where it is not known.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8100,
    config: ConfigOption = None,
) -> None:
    """Score conversations with a reward model over HTTP, for graders of type `reward_model`."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    from aiohttp import web

    from train.scorer import LocalScorer, scoring_app

    web.run_app(scoring_app(LocalScorer(adapter, base)), host=host, port=port)


MEASURES = {
    "heldout/liked_nats_per_token": "liked nats/token",
    "heldout/pair_accuracy": "pair accuracy",
    "heldout/kl_to_base": "KL to base",
}
"""Columns of the comparison of methods."""


def _table(result: dict[str, Any]) -> str:
    """The runs beside each other, on the same held-out feedback."""
    header = f"{'method':<8}{'examples':>9}{'steps':>7}{'seconds':>9}" + "".join(f"{n:>18}" for n in MEASURES.values())
    lines = [header]
    for run in result["runs"]:
        cells = "".join(
            f"{run['metrics'][name]:>18.4f}" if name in run["metrics"] else f"{'-':>18}" for name in MEASURES
        )
        lines.append(f"{run['method']:<8}{run['examples']:>9}{run['steps']:>7}{run['seconds']:>9.1f}{cells}")
        lines += [f"  warning: {warning}" for warning in run["warnings"]]
    return "\n".join(lines)


def _print(report: dict[str, Any], human: str, as_json: bool) -> None:
    print(json.dumps(report) if as_json else human)
