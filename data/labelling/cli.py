"""`rayloop label`: the queue of answers to judge, judging one, and how far reviewers agree."""

import getpass
import json
from typing import Annotated, Any

import typer

from cluster.errors import InputError
from cluster.options import ConfigOption, JsonOption
from cluster.settings import Settings, load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False)

ReviewerOption = Annotated[str | None, typer.Option("--reviewer", help="Who judges; you, by default.")]


@app.command()
def queue(
    limit: Annotated[int | None, typer.Option(min=1, help="So many at most.")] = None,
    reviewer: ReviewerOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """What waits to be judged, the most urgent first: prompts and answers, without whose they are."""
    from cluster.database import connect
    from data.labelling.content import shown_items
    from data.labelling.queue import LabelQueue
    from data.log import EventLog

    settings, _ = load_settings(config)
    engine = connect(settings)
    waiting = LabelQueue(engine, settings.labelling).waiting(
        settings.tenant, settings.workspace, reviewer=reviewer or getpass.getuser()
    )
    shown = shown_items(EventLog(engine), waiting[: limit or settings.labelling.shown_items], settings)
    if json_output:
        print(json.dumps({"waiting": len(waiting), "items": shown}))
        return
    for item in shown:
        print(_to_text(item))
    print(f"{len(waiting)} wait" + ("; next: rayloop label add ITEM --score a.success=1" if shown else ""))


def _to_text(item: dict[str, Any]) -> str:
    lines = [f"item {item['item_id']}  {item['agent'] or ''}  {item['reason']}"]
    lines += [f"  {message.get('role')}: {message.get('content')}" for message in item["messages"]]
    for answer in item["answers"]:
        lines.append(f"  answer {answer['answer']}: {answer['message'].get('content')}")
        lines += [f"    calls {call.get('function')}" for call in answer["message"].get("tool_calls") or []]
    return "\n".join([*lines, ""])


@app.command()
def add(
    item: Annotated[str, typer.Argument(help="The item, as `rayloop label queue` names it.")],
    preferred: Annotated[str | None, typer.Option(help="a, b or tie, where there are two answers.")] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(metavar="ANSWER.CRITERION=NUMBER", help="success, helpfulness, tone, safety; repeatable."),
    ] = None,
    corrected: Annotated[str | None, typer.Option(help="What the answer should have been.")] = None,
    category: Annotated[str | None, typer.Option(help="What kind of task it was.")] = None,
    complexity: Annotated[str | None, typer.Option(help="low, medium or high.")] = None,
    notes: Annotated[str | None, typer.Option(help="Anything else.")] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Pass it over.")] = False,
    reviewer: ReviewerOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Judge one item of the queue; judging it again replaces what you said before."""
    from cluster.database import connect
    from data.intake.items import Identity
    from data.labelling.queue import LabelQueue
    from data.labelling.submission import LabelParser
    from data.log import EventLog

    settings, _ = load_settings(config)
    engine = connect(settings)
    given = {
        "item_id": item, "preferred": preferred, "scores": _scores(score or []), "corrected": corrected,
        "task_category": category, "complexity": complexity, "notes": notes, "skip": skip or None,
    }  # fmt: skip
    parser = LabelParser(LabelQueue(engine, settings.labelling), settings.intake.max_text_chars)
    said = {name: value for name, value in given.items() if value is not None}
    events = parser.parse(said, Identity(settings.tenant, settings.workspace), reviewer or getpass.getuser())
    EventLog(engine).append(events)
    if json_output:
        print(json.dumps({"item_id": item, "event_id": events[0].event_id, "kind": events[0].kind}))
    else:
        print(f"{'skipped' if skip else 'judged'} {item}; next: rayloop label queue")


def _scores(given: list[str]) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {}
    for text in given:
        name, _, value = text.partition("=")
        answer, _, criterion = name.partition(".")
        try:
            scores.setdefault(answer, {})[criterion] = float(value)
        except ValueError:
            raise InputError("--score", text, "must be ANSWER.CRITERION=NUMBER", "write a.success=1") from None
    return scores


@app.command()
def agreement(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """How far reviewers agree (Krippendorff's alpha), on what more than one of them judged."""
    from dataclasses import asdict

    from cluster.database import connect
    from data.labelling.agreement import agreement_of
    from data.log import EventLog

    settings, _ = load_settings(config)
    found = agreement_of(EventLog(connect(settings)), settings.tenant, settings.workspace)
    if json_output:
        print(json.dumps({"agreement": [asdict(one) for one in found]}))
        return
    for one in found:
        alpha = "-" if one.alpha is None else f"{one.alpha:.3f}"
        print(f"{one.name:<12} alpha {alpha:>6}  judged twice {one.judged_twice:>5}  reviewers {one.reviewers}")
    print("no labels; next: rayloop label queue" if not found else "0: what chance gives; 1: they always agree")


@app.command()
def sample(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Put uncertain answers and random ones of the last day into the queue, as far as today has room."""
    from cluster.database import connect
    from data.labelling.queue import LabelQueue
    from data.labelling.sampling import sample_for_labelling

    settings: Settings = load_settings(config)[0]
    engine = connect(settings)
    drawn = sample_for_labelling(engine, settings, LabelQueue(engine, settings.labelling))
    print(json.dumps({"sampled": drawn}) if json_output else f"{drawn} put into the queue; next: rayloop label queue")
