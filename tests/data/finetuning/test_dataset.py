"""Uploaded fine-tuning files become datasets like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.database import exclusive
from cluster.errors import ConflictError, DatasetError
from cluster.settings import Settings
from data.erasure.person import PUBLISH
from data.finetuning.dataset import Part, package
from data.finetuning.rows import check_file
from data.finetuning.uploads import Uploads
from data.log import EventLog
from data.manifest import list_datasets, read_examples
from data.validate import validate

Json = dict[str, Any]


def turn(role: str, content: str, **more: Any) -> Json:
    return {"role": role, "content": content, **more}


def part(settings: Settings, database: Engine, split: str, rows: list[Json]) -> Part:
    uploads = Uploads(database, settings.files_root, settings.tenant, settings.workspace)
    with uploads.draft() as (path, file):
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        checked = check_file(path)
        stored = uploads.keep(path, f"{split}.jsonl", "fine-tune", format=checked.format, rows=checked.rows)
    return Part(split, stored, uploads.path(stored))


def chats(count: int, answer: str = "yes") -> list[Json]:
    return [{"messages": [turn("user", f"is {n} odd"), turn("assistant", answer)]} for n in range(count)]


def test_dataset_is_whole_scrubbed_and_the_same_for_the_same_file(settings: Settings, sqlite_database: Engine) -> None:
    rows = chats(5)
    rows[2]["messages"][0]["content"] = "mail bob@example.com, then bob@example.com again"
    training = part(settings, sqlite_database, "train", rows)
    validation = part(settings, sqlite_database, "validation", chats(9)[7:])
    made = package(sqlite_database, settings, [training, validation], agent="ft-default")
    assert made.counts["sft"] == {"train": 5, "validation": 2, "test": 0}
    assert made.sources["files"][0]["sha256"] == training.stored.sha256
    texts = [json.loads(text) for text in read_examples(made.path, "sft", "train")["messages"].to_pylist()]
    assert "mail <EMAIL_1>, then <EMAIL_1> again" in [messages[0]["content"] for messages in texts]
    assert {check.status for check in validate(made, settings)} <= {"passed", "warning"}
    again = part(settings, sqlite_database, "train", rows)
    assert package(sqlite_database, settings, [again, validation], agent="ft-default").dataset_hash == made.dataset_hash
    assert package(sqlite_database, settings, [again], agent="ft-default").dataset_hash != made.dataset_hash


def test_every_learned_turn_is_an_example_with_its_own_prompt(settings: Settings, sqlite_database: Engine) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    messages = [
        turn("developer", "be short"),
        turn("user", "one"),
        turn("assistant", "1"),
        turn("user", "two"),
        turn("assistant", "no", weight=0),
        turn("user", "look"),
        {"role": "assistant", "tool_calls": [call], "weight": 1},
        turn("tool", "seen", tool_call_id="c1"),
        turn("assistant", "done"),
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    made = package(
        sqlite_database,
        settings,
        [part(settings, sqlite_database, "train", [{"messages": messages, "tools": tools}])],
        agent=None,
    )
    rows = read_examples(made.path, "sft", "train").to_pylist()
    conversations = sorted((json.loads(row["messages"]) for row in rows), key=len)
    assert [len(conversation) for conversation in conversations] == [3, 7, 9]
    assert conversations[0][0] == turn("system", "be short")
    assert conversations[1][-1]["tool_calls"] == [call]
    assert not any("weight" in message for conversation in conversations for message in conversation)
    assert all(json.loads(row["tools"]) == tools for row in rows)


def test_pairs_keep_both_answers_and_leave_validation_questions_out(
    settings: Settings, sqlite_database: Engine
) -> None:
    def pair(question: str) -> Json:
        return {
            "input": {"messages": [turn("user", question)]},
            "preferred_output": [turn("assistant", "call 192.168.7.9")],
            "non_preferred_output": [turn("assistant", "no")],
        }

    training = part(settings, sqlite_database, "train", [pair("a"), pair("b"), pair("c")])
    validation = part(settings, sqlite_database, "validation", [pair("b")])
    made = package(sqlite_database, settings, [training, validation], agent=None)
    assert made.counts["preference"] == {"train": 2, "validation": 1, "test": 0}
    assert made.stages[-1].dropped == {"question in validation": 1}
    row = read_examples(made.path, "preference", "train").to_pylist()[0]
    assert "192.168" not in row["chosen"] and json.loads(row["rejected"]) == [turn("assistant", "no")]


def test_items_become_tasks_with_their_fields_scrubbed_like_their_prompts(
    settings: Settings, sqlite_database: Engine
) -> None:
    def item(question: str, **fields: object) -> Json:
        return {"messages": [turn("developer", "be short"), turn("user", question)], **fields}

    rows = [item("write to bob@example.com", answer="bob@example.com", points={"of": [1, 2.5]}), item("hm")]
    made = package(sqlite_database, settings, [part(settings, sqlite_database, "train", rows)], agent=None)
    assert made.counts["task"] == {"train": 2, "validation": 0, "test": 0}
    table = {row["order"]: row for row in read_examples(made.path, "task", "train").to_pylist()}
    first, second = (table[line] for line in sorted(table))
    assert json.loads(first["prompt"]) == [turn("system", "be short"), turn("user", "write to <EMAIL_1>")]
    assert json.loads(first["item"]) == {"answer": "<EMAIL_1>", "points": {"of": [1, 2.5]}}
    assert json.loads(second["item"]) == {}
    assert {check.status for check in validate(made, settings)} <= {"passed", "warning"}


def test_file_of_which_nothing_is_left_is_refused_with_the_reason(
    settings: Settings, sqlite_database: Engine, tmp_path: Path
) -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIabc"
    training = part(settings, sqlite_database, "train", chats(2, key))
    with pytest.raises(DatasetError, match=r"no line .* is left to train on \(scrub: quarantine: .* 2\)"):
        package(sqlite_database, settings, [training], agent=None)
    assert not list((settings.home / "datasets").glob("upload*"))


def test_dataset_gets_no_name_while_an_erasure_looks_for_datasets(settings: Settings, sqlite_database: Engine) -> None:
    hasty = settings.model_copy(update={"erasure": settings.erasure.model_copy(update={"wait_s": 0.0})})
    parts, log = [part(settings, sqlite_database, "train", chats(5))], EventLog(sqlite_database)
    with exclusive(sqlite_database, PUBLISH), pytest.raises(ConflictError, match="holds the lock `publish`"):
        package(sqlite_database, hasty, parts, agent=None)
    assert list_datasets(settings) == [] and log.read(kinds=["dataset.ready"]) == []
    made = package(sqlite_database, hasty, parts, agent=None)
    assert [m.dataset_id for m in list_datasets(settings)] == [made.dataset_id]
    assert [r.event.body["dataset_id"] for r in log.read(kinds=["dataset.ready"])] == [made.dataset_id]
