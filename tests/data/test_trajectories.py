"""Recorded agent runs with tool calls become examples whose tool messages survive."""

import json
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest

from cluster.database import connect
from cluster.settings import load_settings
from cluster.settings.curation import CurationSettings
from data.curate import curate
from data.importers.run import ImportOptions, import_source
from data.importers.source import file_source
from data.join import join_events, name_trajectories, to_json
from data.log import EventLog
from data.manifest import read_examples
from data.scrub_text import Looks, Placeholders, scrub_value
from data.source import EVENTS
from data.split import SPLITS
from data.template import normalise, render, render_with_mask
from data.validate import validate

CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"id": "Z7"}'}}
STEPS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is order Z7?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"state": "sent"}'},
    {"role": "assistant", "content": "It was sent."},
    {"role": "user", "content": "Thanks! ###STOP###"},
]


def event(body: dict[str, Any], **more: Any) -> dict[str, Any]:
    plain = {"kind": "trajectory", "event_id": "t1", "user_id": "ada", "session_id": None, "agent": "shop", "at_us": 1}
    return plain | {"interaction_id": None, "body": to_json(body)} | more


def test_a_trajectory_is_a_row_with_its_last_spoken_turn_as_answer() -> None:
    table = name_trajectories(pa.Table.from_pylist([event({"messages": STEPS, "reward": 1.0})], EVENTS))
    rows, dropped = join_events(table)
    (row,) = rows.to_pylist()
    assert row["interaction_id"] == "t1" and not dropped
    assert orjson.loads(row["messages"]) == STEPS[:4]
    assert orjson.loads(row["response"]) == STEPS[4]
    assert orjson.loads(row["tail"]) == STEPS[5:]
    assert orjson.loads(row["grades"]) == [{"grader": "outcome", "grader_version": "1", "reward": 1.0}]


def test_feedback_about_a_trajectory_joins_it() -> None:
    body = {"type": "thumbs_up", "source": "explicit", "reward": 1.0}
    said = event(body, kind="feedback", event_id="f1", interaction_id="run-1")
    run = event({"messages": STEPS}, interaction_id="run-1")
    rows, _ = join_events(name_trajectories(pa.Table.from_pylist([said, run], EVENTS)))
    assert [signal["type"] for signal in orjson.loads(rows["signals"][0].as_py())] == ["thumbs_up"]


def test_a_trajectory_in_which_nobody_speaks_has_no_answer() -> None:
    table = name_trajectories(pa.Table.from_pylist([event({"messages": STEPS[:4]})], EVENTS))
    rows, _ = join_events(table)
    nothing, dropped = join_events(table, trajectories=False)
    assert len(nothing) == 0 and dropped == {"trajectory_feedback_loop is off": 1}
    assert rows["response"][0].as_py() is None


@pytest.fixture(scope="module")
def tool_tokenizer() -> Any:
    """A tokenizer of bytes whose template writes tool calls and results."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
        "{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.mark.ray
@pytest.mark.slow
def test_real_runs_are_curated_into_examples_that_render_with_their_tools(
    ray_session: None, shared_data: Path, tmp_path: Path, tool_tokenizer: Any
) -> None:
    curation = {"log_to_mlflow": False, "split": {"train": 0.6, "validation": 0.2}}
    settings = load_settings(home=tmp_path, curation=curation, trajectory_feedback_loop={"enabled": True})[0]
    engine = connect(settings)
    report = import_source(
        file_source(shared_data / "tool_call_trajectories.jsonl"), EventLog(engine), settings, ImportOptions()
    )
    engine.dispose()
    made = curate(settings)
    assert report.rejected == 0 and made.total("trajectory") > 0 and made.total("reward") > 0
    lines = (shared_data / "tool_call_trajectories.jsonl").read_text().splitlines()
    imported = [json.loads(line)["traj"] for line in lines]
    looks = Looks.of(settings.curation.scrub)
    known = {to_json(scrub_value(normalise(steps), Placeholders(), looks=looks)) for steps in imported}
    assert len(known - {to_json(normalise(steps)) for steps in imported}) > 10  # there is personal data in them
    calls = 0
    for split in SPLITS:
        for row in read_examples(made.path, "trajectory", split).to_pylist():
            steps = [*json.loads(row["prompt"]), *json.loads(row["trajectory"])]
            assert to_json(normalise(steps)) in known
        for row in read_examples(made.path, "sft", split).to_pylist():
            messages = json.loads(row["messages"])
            ids, mask = render_with_mask(tool_tokenizer, messages)
            text = tool_tokenizer.decode(ids)
            assert ids == render(tool_tokenizer, messages) and sum(mask) > 0
            for message in messages:
                for call in message.get("tool_calls") or []:
                    calls += 1
                    arguments = json.loads(call["function"]["arguments"])
                    assert f"<call>{call['function']['name']} " in text
                    said = [value for value in arguments.values() if isinstance(value, str)]
                    assert all(json.dumps(value)[1:-1] in text for value in said)
                if message["role"] == "tool":
                    assert f"<tool>{message['content']}<end>" in text
    assert calls > 0
    checks = {check.name: check for check in validate(made, settings, tokenizer=tool_tokenizer)}
    assert checks["tokens"].status == "passed"


def test_reward_tuples_name_what_the_reward_rests_on() -> None:
    from data.examples import reward_examples, score_card
    from tests.data.test_pairs import judged, say

    parts = {"explicit": 0.9, "implicit": None, "grade": 0.4, "label": None, "complete": 0.5}
    grades = [{"grader": "style", "grader_version": "1", "reward": 0.4, "score_card": {"tone": 0.3}}]
    (row,) = judged(say("fine", parts=to_json(parts), grades=grades)).to_pylist()
    assert score_card(row, parts) == {"explicit": 0.9, "grade": 0.4, "complete": 0.5, "style.tone": 0.3}
    from data.answers import answers_of

    (example,) = reward_examples(answers_of(row, CurationSettings()))
    assert (example["reward"], example["origin"]) == (0.4, "grade")


def test_score_cards_hold_the_means_of_reviewers_and_their_word_for_the_task() -> None:
    from data.answers import task_category
    from data.examples import score_card
    from tests.data.test_pairs import judged, say

    labels = [
        {"reviewer": "a", "scores": {"success": 1.0, "tone": 0.5}, "task_category": "refund"},
        {"reviewer": "b", "scores": {"success": 0.5}, "task_category": "booking"},
        {"reviewer": "c", "scores": {}, "task_category": "refund"},
    ]
    parts = {"explicit": None, "implicit": None, "grade": None, "label": 0.7, "complete": None}
    (row,) = judged(say("fine", parts=to_json(parts), labels=labels)).to_pylist()
    assert score_card(row, parts) == {"label": 0.7, "success": 0.75, "tone": 0.5}
    assert task_category(row) == "refund"
