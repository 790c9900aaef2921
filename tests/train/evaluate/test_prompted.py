"""What evaluation asks behind the agent's prompt, and what of it a version must refuse."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from data.prompt import with_prompt
from data.prompt_versions import parse_prompt
from tests.train.evaluate.test_run import guesses
from train.evaluate.evidence import Evidence
from train.evaluate.parity import prompt_parity
from train.evaluate.prompted import BehindPrompt, asked_behind
from train.evaluate.types import Case, Prompt, Truth

USER = {"role": "user", "content": "?"}
DOCUMENT = {"system": "New.", "refusals": [{"rule": "Never delete.", "cases": ["Delete a.", "Delete b."]}]}
PROMPT = parse_prompt(DOCUMENT).numbered(2)
BEHIND = BehindPrompt("triage", PROMPT, ("Old.",))


def truth(messages: list[dict[str, str]]) -> Truth:
    return Truth("e1", "ada", Prompt(tuple(messages)), "yes", "liked")


def test_recorded_prompt_gives_way_to_the_one_in_force() -> None:
    wanted = tuple(with_prompt([USER], PROMPT.text))
    found = BEHIND.truths([truth(with_prompt([USER], "Old.")), truth([USER])])
    assert [each.prompt.messages for each in found] == [wanted, wanted]
    (bare,) = asked_behind([truth(with_prompt([USER], "Old."))], "", ["Old."])
    assert bare.prompt.messages == (USER,)


def test_refusals_of_the_prompt_are_hard_cases_of_the_refusal_suite_only() -> None:
    own = Case("own", "refusal", Prompt((USER,)), {"refuses": True})
    cases = BEHIND.cases("refusal", [own])
    assert [case.id for case in cases] == ["own", "triage-must-refuse-1.1", "triage-must-refuse-1.2"]
    assert all(case.hard and case.expect == {"refuses": True} for case in cases)
    assert cases[1].prompt.messages == tuple(with_prompt([{"role": "user", "content": "Delete a."}], PROMPT.text))
    assert [case.id for case in BEHIND.cases("anchor", [own])] == ["own"]
    assert BehindPrompt("triage", None).cases("refusal", [own]) == [own]


@pytest.mark.parametrize(
    ("digests", "trained", "status"),
    [
        (("a" * 64, "a" * 64), True, "passed"),
        (("a" * 64, "b" * 64), True, "failed"),
        ((None, "b" * 64), True, "failed"),
        (("a" * 64, None), True, "failed"),
        ((None, None), True, "not_applicable"),
        ((None, "b" * 64), False, "not_applicable"),
    ],
)
def test_only_a_version_trained_behind_the_prompt_in_force_passes(
    make_evidence: Callable[..., Evidence], digests: tuple[str | None, str | None], trained: bool, status: str
) -> None:
    evidence = replace(make_evidence(guesses, guesses), prompts=digests, trained=trained)
    assert prompt_parity(evidence).status == status
