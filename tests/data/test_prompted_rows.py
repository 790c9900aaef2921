"""Agents' prompts leave questions in curation and come back in the examples."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.database import connect
from cluster.settings import Settings, load_settings
from data.curate import curate
from data.events import Event
from data.join import join_events
from data.log import EventLog
from data.manifest import Manifest, read_examples
from data.prompt import with_prompt
from data.prompt_versions import parse_prompt, set_prompt
from data.prompted_rows import put_back
from tests.data.test_join import block
from tests.data.traffic import interaction, traffic

DECLARED = parse_prompt({"system": "Sort alerts. Ask Ada Lovelace in doubt."})
PROMPT = DECLARED.numbered(1)
TEXTS = {PROMPT.digest: PROMPT.text}


def behind(event: Event, digest: str = PROMPT.digest) -> Event:
    messages = with_prompt(event.body["messages"], PROMPT.text)
    return replace(event, body=event.body | {"messages": messages, "prompt_digest": digest})


def test_join_takes_the_prompt_off_and_keeps_its_digest() -> None:
    plain = interaction(1, "q", "a", user="ada")
    bare, _ = join_events(block(plain))
    joined, _ = join_events(block(behind(plain)), prompts=TEXTS)
    assert joined["messages"].to_pylist() == bare["messages"].to_pylist()
    assert joined["prompt_digest"].to_pylist() == [PROMPT.digest]
    assert put_back(joined, TEXTS)["messages"].to_pylist() == [
        json.dumps(with_prompt(plain.body["messages"], PROMPT.text), separators=(",", ":"), sort_keys=True)
    ]


def test_a_prompt_that_nobody_knows_stays_where_it_is() -> None:
    told = behind(interaction(1, "q", "a", user="ada"), "0" * 64)
    joined, _ = join_events(block(told), prompts=TEXTS)
    assert joined["prompt_digest"].to_pylist() == [None]
    assert json.loads(joined["messages"][0].as_py())[0]["content"].startswith(PROMPT.text)


@pytest.fixture(scope="module")
def curated(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manifest]:
    """A dataset of traffic of which the second half of the interactions was answered behind a prompt."""
    options = {"filter": {"min_answer_tokens": 2}, "split": {"train": 0.6, "validation": 0.2}, "log_to_mlflow": False}
    settings: Settings = load_settings(home=tmp_path_factory.mktemp("home"), curation=options)[0]
    engine = connect(settings)
    set_prompt(engine, "default", "default", "triage", DECLARED, writer="person:test")
    events = traffic(300)
    asked = [event for event in events if event.kind == "interaction"]
    late = {event.event_id for event in asked[len(asked) // 2 :]}
    EventLog(engine).append([behind(event) if event.event_id in late else event for event in events])
    engine.dispose()
    yield curate(settings, parallelism=1)


@pytest.mark.ray
def test_examples_begin_with_the_prompt_they_were_answered_behind(curated: Manifest) -> None:
    splits = ("train", "validation", "test")
    rows = [row for split in splits for row in read_examples(curated.path, "sft", split).to_pylist()]
    firsts = {row["prompt_digest"]: json.loads(row["messages"])[0] for row in rows}
    assert set(firsts) == {None, PROMPT.digest}
    assert firsts[PROMPT.digest]["content"].startswith(PROMPT.text)
    for row in rows:
        begins = json.loads(row["messages"])[0].get("content", "").startswith(PROMPT.text)
        assert begins == (row["prompt_digest"] == PROMPT.digest)


@pytest.mark.ray
def test_manifest_and_card_say_which_prompts_a_dataset_holds(curated: Manifest) -> None:
    (used,) = curated.prompts.values()
    assert list(curated.prompts) == [PROMPT.digest]
    assert used.text == PROMPT.text
    kinds = [kind for kind, counts in curated.counts.items() if sum(counts.values())]
    found = [
        digest
        for kind in kinds
        for split in ("train", "validation", "test")
        for digest in read_examples(curated.path, kind, split)["prompt_digest"].to_pylist()
    ]
    assert used.examples == found.count(PROMPT.digest) > 0
    assert f"| {PROMPT.digest[:12]} | {used.examples} |" in (Path(curated.path) / "card.md").read_text()
