"""An agent's prompt at the head of a conversation, its versions, and the command that sets them."""

import json
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from cluster.cli import run_app
from cluster.database import connect
from cluster.errors import InputError
from cluster.settings import load_settings
from data.log import EventLog
from data.prompt import AgentPrompt, Refusal, with_other_prompt, with_prompt, without_prompt
from data.prompt_versions import current_prompt, parse_prompt, prompt_versions, prompts_in_force, set_prompt
from data.prompts_cli import app
from data.template import content_text

USER = {"role": "user", "content": "?"}
PARTS = [{"type": "text", "text": "Be brief."}]
SYSTEM = [None, "Be brief.", PARTS]


def conversation(system: object) -> list[dict[str, object]]:
    return [USER] if system is None else [{"role": "system", "content": system}, USER]


@pytest.mark.parametrize("system", SYSTEM)
def test_prompt_stands_before_what_the_client_says_and_comes_off_again(system: object) -> None:
    asked = conversation(system)
    sent = with_prompt(asked, "Sort alerts.")
    assert content_text(sent[0]) == ("Sort alerts." if system is None else "Sort alerts.\n\nBe brief.")
    assert sent[1:] == [USER]
    assert without_prompt(sent, "Sort alerts.") == asked
    assert without_prompt(asked, "Sort alerts.") is None


def test_prompt_is_never_there_twice_and_an_empty_one_changes_nothing() -> None:
    once = with_prompt([USER], "Sort alerts.")
    assert with_prompt(once, "Sort alerts.") == once
    assert with_prompt([USER], "") == [USER]
    assert without_prompt(with_prompt([USER], "Sort alerts. Always."), "Sort alerts.") is None


def test_recorded_prompt_is_replaced_by_the_one_in_force() -> None:
    recorded = with_prompt(conversation("Be brief."), "Old.")
    assert with_other_prompt(recorded, "Old.", "New.") == with_prompt(conversation("Be brief."), "New.")
    assert with_other_prompt(recorded, "Old.", "") == conversation("Be brief.")
    assert with_other_prompt([USER], None, "New.") == with_prompt([USER], "New.")


def test_refusals_are_part_of_the_text_and_its_digest_but_their_cases_are_not() -> None:
    plain = AgentPrompt(1, "Sort alerts.")
    strict = AgentPrompt(2, "Sort alerts.", (Refusal("Never delete data."),))
    asked = AgentPrompt(3, "Sort alerts.", (Refusal("Never delete data.", ("Drop the table.",)),))
    assert strict.text.startswith("Sort alerts.\n\n")
    assert strict.text.endswith("- Never delete data.")
    assert plain.digest != strict.digest == asked.digest


def test_a_new_version_is_an_event_and_the_same_again_is_none(database: Engine) -> None:
    first = parse_prompt({"system": "Sort alerts."})
    assert set_prompt(database, "default", "default", "triage", first, writer="person:ann").number == 1
    assert set_prompt(database, "default", "default", "triage", first, writer="person:ann").number == 1
    second = parse_prompt({"system": "Sort alerts.", "refusals": [{"rule": "Never delete.", "cases": ["Delete it."]}]})
    made = set_prompt(database, "default", "default", "triage", second, writer="person:bob")
    assert current_prompt(database, "default", "triage") == made
    assert current_prompt(database, "default", "other") is None
    assert current_prompt(database, "acme", "triage") is None
    events = [recorded.event for recorded in EventLog(database).scan(kinds=["prompt.changed"])]
    assert [(e.agent, e.body["number"], e.body["digest"], e.body["writer"]) for e in events] == [
        ("triage", 1, first.numbered(1).digest, "person:ann"),
        ("triage", 2, made.digest, "person:bob"),
    ]


def test_an_empty_prompt_ends_the_last_one(database: Engine) -> None:
    set_prompt(database, "default", "default", "triage", parse_prompt({"system": "Sort alerts."}), writer="person:ann")
    set_prompt(database, "default", "default", "triage", parse_prompt({}), writer="person:ann")
    assert current_prompt(database, "default", "triage") is None
    with database.connect() as connection:
        assert prompts_in_force(connection) == {}
    assert [prompt.system for _, prompt in prompt_versions(database, "default")] == ["Sort alerts.", ""]


@pytest.mark.parametrize("document", ["text", {"sytem": "x"}, {"refusals": [{"cases": ["x"]}]}, {"system": 3}])
def test_a_broken_file_names_its_field(document: object) -> None:
    with pytest.raises(InputError, match="write `system`, and `refusals`"):
        parse_prompt(document)


def test_the_command_sets_lists_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, file = tmp_path / "rayloop.yaml", tmp_path / "triage.yaml"
    config.write_text(f"home: {tmp_path / 'home'}\n")
    file.write_text("system: Sort alerts.\nrefusals:\n- rule: Never delete data.\n  cases: [Drop the table.]\n")

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            run_app(app, [*arguments, "--config", str(config)], "rayloop prompt")
        shown = capsys.readouterr()
        return shown.out + shown.err

    made = json.loads(said("set", "triage", str(file), "--json"))
    settings = load_settings(config)[0]
    found = current_prompt(connect(settings), settings.tenant, "triage")
    assert found is not None
    assert (made["number"], made["digest"]) == (1, found.digest)
    assert found.digest[:12] in said("list")
    assert "- Never delete data." in said("show", "triage")
    assert "error: agent 'other' has no prompt" in said("show", "other")
    assert "cannot be read" in said("set", "triage", str(tmp_path / "missing.yaml"))
