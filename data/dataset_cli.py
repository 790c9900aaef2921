"""`rayloop data list`, `show`, `validate`, `eligible`: what datasets hold, and whether to train on them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.database import connect
from cluster.errors import InputError
from cluster.options import ConfigOption, JsonOption
from data.command import command_settings, print_json


def eligible(
    dataset: Annotated[str, typer.Argument(help="Id, path, prefix of the hash, or latest.")] = "latest",
    method: Annotated[str, typer.Option("--method", help="sft, dpo, kto, ...")] = "sft",
    rules: Annotated[Path | None, typer.Option("--rules", help="Mapping rules that hold the archetype.")] = None,
    archetype: Annotated[str | None, typer.Option("--archetype", help="Judge its agents together.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """May a training start, and if not, what is missing? Exit code 1 if a rule failed."""
    from data.eligibility import eligibility
    from data.manifest import find_dataset, load_manifest

    settings = command_settings(config)
    manifest = load_manifest(find_dataset(settings, dataset))
    engine = connect(settings)
    found = eligibility(settings, engine, manifest, method=method, agents=_agents_of(archetype, rules))
    engine.dispose()
    if json_output:
        shown = [
            {"name": r.name, "needed": r.needed, "found": min(r.found, 1e9), "passed": r.passed, "says": str(r)}
            for r in found
        ]
        print_json({"dataset_id": manifest.dataset_id, "eligible": all(r.passed for r in found), "rules": shown})
    else:
        for rule in found:
            print(f"{'ok  ' if rule.passed else 'FAIL'} {rule}")
    raise typer.Exit(0 if all(rule.passed for rule in found) else 1)


def _agents_of(archetype: str | None, rules: Path | None) -> tuple[str, ...]:
    """The agents of an archetype in a file of rules; none where no archetype is asked for."""
    if archetype is None:
        return ()
    if rules is None:
        raise InputError("--rules", None, "is missing", "name the file that `rayloop data archetypes` wrote")
    from data.archetypes import load_rules

    known = {rule.name: rule.agents for rule in load_rules(rules)}
    if archetype not in known:
        raise InputError("--archetype", archetype, f"must be one of {', '.join(known)}", "name one of the file")
    return known[archetype]


def list_(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """The datasets there are, the oldest first."""
    from data.manifest import list_datasets
    from data.show import as_json, to_line

    found = list_datasets(command_settings(config))
    if json_output:
        print_json({"datasets": [as_json(manifest) for manifest in found]})
        return
    for manifest in found:
        print(to_line(manifest))
    print("next: rayloop data show DATASET" if found else "no datasets yet\nnext: rayloop curate")


def show(
    dataset: Annotated[str, typer.Argument(help="Id, path, prefix of the hash, or latest.")] = "latest",
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """What a dataset holds and how it came about."""
    from data.manifest import find_dataset, load_manifest
    from data.show import as_json, to_text

    manifest = load_manifest(find_dataset(command_settings(config), dataset))
    if json_output:
        print_json(as_json(manifest))
        return
    print(to_text(manifest))
    print(f"next: rayloop train run --method dpo --dataset {manifest.dataset_id}")


def validate(
    dataset: Annotated[str, typer.Argument(help="Id, path, prefix of the hash, or latest.")] = "latest",
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="Model folder whose template must fit.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest conversation, with --tokenizer.")
    ] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Is a dataset whole and fit to train on? Exit code 1 if a check failed."""
    from data.manifest import find_dataset, load_manifest
    from data.show import check_line, checks_as_json
    from data.validate import validate as run

    settings = command_settings(config)
    manifest = load_manifest(find_dataset(settings, dataset))
    checks = run(manifest, settings, tokenizer=_tokenizer(tokenizer), max_tokens=max_tokens)
    failed = any(check.status == "failed" for check in checks)
    if json_output:
        print_json(checks_as_json(manifest, checks))
    else:
        for check in checks:
            print(check_line(check))
        if not failed:
            print(f"next: rayloop train run --method dpo --dataset {manifest.dataset_id}")
    raise typer.Exit(1 if failed else 0)


def _tokenizer(folder: Path | None) -> Any:
    if folder is None:
        return None
    if not folder.is_dir():
        raise InputError("tokenizer", str(folder), "must be a folder with a tokenizer", "name a model folder")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
