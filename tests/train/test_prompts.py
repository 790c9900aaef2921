"""A training learns behind the agent's prompt of now, and its version says which that was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from cluster.jobs import Jobs
from cluster.settings import Settings
from data.lineage import to_text, trace
from data.manifest import Manifest, PromptUsed, load_manifest, write_manifest
from data.prompt import AgentPrompt, with_prompt
from data.prompt_versions import parse_prompt, set_prompt
from data.template import render
from train.config import TrainConfig, TrainedPrompt
from train.examples import behind, read_data
from train.models import load_tokenizer
from train.plan import Request, plan_runs
from train.prompts import trained_prompt
from train.register import register_runs
from train.remote import as_lines
from train.run import prepare

PROMPT = TrainedPrompt(digest="n" * 64, text="Sort alerts.", recorded={"o" * 64: "Old rules."})


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_every_row_begins_with_the_prompt(method: str, config_of: Callable[..., TrainConfig]) -> None:
    config = config_of(method, prompt=PROMPT)
    tokenizer = load_tokenizer(config.base_model)
    head = render(tokenizer, [{"role": "system", "content": "Sort alerts."}])
    found = prepare(config)
    for encoded in (found.rows, found.validation):
        for row in encoded.rows:
            ids = row["input_ids"] if method == "sft" else row["prompt_ids"]
            assert ids[: len(head)] == head
    assert config.digest() != config_of(method).digest()


def test_recorded_prompt_gives_way_and_its_digest_stays(toy_dataset: Path) -> None:
    table = read_data(toy_dataset, "preference").train.slice(0, 2)
    plain = [json.loads(cell) for cell in table["prompt"].to_pylist()]
    old = [json.dumps(with_prompt(plain[0], "Old rules.")), json.dumps(plain[1])]
    table = table.set_column(table.column_names.index("prompt"), "prompt", [old])
    table = table.set_column(table.column_names.index("prompt_digest"), "prompt_digest", [["o" * 64, None]])
    found = behind(table, PROMPT)
    assert [json.loads(cell) for cell in found["prompt"].to_pylist()] == [
        with_prompt(messages, "Sort alerts.") for messages in plain
    ]
    assert found["prompt_digest"].to_pylist() == ["o" * 64, None]


def test_prompt_in_force_is_looked_up_with_those_of_the_dataset(sqlite_database: Engine, toy_dataset: Path) -> None:
    manifest = load_manifest(toy_dataset)
    assert trained_prompt(sqlite_database, "default", "triage", manifest) is None
    used = Manifest(**{**vars(manifest), "prompts": {"o" * 64: PromptUsed("Old rules.", 3)}})
    gone = trained_prompt(sqlite_database, "default", "triage", used)
    assert gone == TrainedPrompt(digest="", text="", recorded={"o" * 64: "Old rules."})
    made = put(sqlite_database)
    found = trained_prompt(sqlite_database, "default", "triage", used)
    assert found == TrainedPrompt(digest=made.digest, text=made.text, recorded={"o" * 64: "Old rules."})


def put(database: Engine) -> AgentPrompt:
    return set_prompt(database, "default", "default", "triage", parse_prompt({"system": "Sort."}), writer="person:t")


def test_a_version_and_its_lineage_name_the_prompt(
    mlflow_settings: Settings, sqlite_database: Engine, toy_base: Path, toy_dataset: Path
) -> None:
    from train.jobs import run_training

    made = put(sqlite_database)
    folder = mlflow_settings.home / "datasets" / toy_dataset.name
    shutil.copytree(toy_dataset, folder)
    manifest = load_manifest(folder)
    write_manifest(folder, Manifest(**{**vars(manifest), "prompts": {made.digest: PromptUsed(made.text, 3)}}))
    short = {"max_steps": 1, "batch_size": 8, "gradient_accumulation": 1, "report_examples": 0}
    request = Request(methods=("sft",), dataset=str(folder), base=str(toy_base), ray=False, overrides=short)
    jobs = Jobs(sqlite_database, "default", "default")
    (planned,), _ = plan_runs(mlflow_settings, request, jobs)
    assert planned.config.prompt is not None and planned.config.prompt.digest == made.digest
    result = register_runs(
        mlflow_settings, sqlite_database, "triage", run_training(mlflow_settings, request, sqlite_database)
    )
    chain = trace(result["version"], mlflow_settings)
    assert chain["version"]["prompt_digest"] == made.digest
    assert chain["dataset"]["prompts"] == {made.digest: 3}
    assert to_text(chain).count(f"prompt    {made.digest}") == 2


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_lines_for_another_endpoint_begin_with_the_prompt(kind: str, toy_dataset: Path) -> None:
    for split in ("train", "validation"):
        lines = list(as_lines(toy_dataset, kind, split, PROMPT))
        asked = [(line if kind == "sft" else line["input"])["messages"] for line in lines]
        assert asked
        assert all(messages[0] == {"role": "system", "content": "Sort alerts."} for messages in asked)
