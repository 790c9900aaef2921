"""How likely an answer was: what curation keeps of it, and when it keeps nothing."""

from typing import Any

import orjson
import pytest

from cluster.settings.curation import CurationSettings, ScrubSettings
from data.examples import make_examples
from data.propensity import answer_logprob
from data.scrub import scrub
from data.source import _body
from tests.data.rows import rows
from tests.data.test_pairs import judged, of_kind, say

DRAWN: dict[str, Any] = {
    "completion_token_ids": [5, 6, 2],
    "completion_logprobs": [-0.5, -0.25, -0.25],
    "finish_reason": "stop",
    "response": {"role": "assistant", "content": "close it"},
}


def test_an_answers_logprob_is_the_sum_over_its_tokens() -> None:
    assert answer_logprob(DRAWN) == -1.0
    assert answer_logprob(DRAWN | {"parameters": {"temperature": 1.0, "top_p": 1, "max_tokens": 40}}) == -1.0


@pytest.mark.parametrize(
    "change",
    [
        {"completion_logprobs": []},
        {"completion_logprobs": [-0.5]},
        {"finish_reason": "length"},
        {"response": {"role": "assistant", "tool_calls": [{"id": "c1"}]}},
        {"parameters": {"temperature": 0.7}},
        {"parameters": {"top_p": 0.9}},
        {"parameters": {"response_format": {"type": "json_object"}}},
        {"parameters": {"stop": ["\n"]}},
    ],
)
def test_an_answer_that_was_not_drawn_from_its_logprobs_has_none(change: dict[str, Any]) -> None:
    assert answer_logprob(DRAWN | change) is None


def test_token_ids_leave_and_their_number_and_sum_stay() -> None:
    kept = orjson.loads(_body("interaction", DRAWN))
    assert (kept["answer_tokens"], kept["answer_logprob"]) == (3, -1.0)
    assert "completion_token_ids" not in kept and "completion_logprobs" not in kept


def test_a_scrubbed_text_is_not_the_one_that_was_drawn() -> None:
    asked = [{"role": "user", "content": "Mail bob@example.com about it, please."}]
    noted = [{"type": "comment", "text": "ask bob@example.com", "user": "ada", "at_us": 1}]
    table = rows(
        {"interaction_id": "i1", "messages": asked, "answer_logprob": -1.0},
        {"interaction_id": "i2", "signals": noted, "answer_logprob": -2.0},
        {"interaction_id": "i3", "answer_logprob": -3.0},
    )
    scrubbed, _ = scrub(table, ScrubSettings())
    assert "<EMAIL_1>" in scrubbed["messages"][0].as_py() and "<EMAIL_1>" in scrubbed["signals"][1].as_py()
    assert scrubbed["answer_logprob"].to_pylist() == [None, -2.0, -3.0]


def test_reward_rows_carry_the_logprob() -> None:
    liked = say("close it", answer_logprob=-1.0, answer_tokens=3, explicit=1.0)
    liked["parts"] = '{"explicit":1.0,"implicit":null,"grade":null,"label":null}'
    examples, _ = make_examples(judged(liked), CurationSettings())
    (row,) = of_kind(examples, "reward")
    assert (row["reward"], row["logprob"], row["answer_tokens"]) == (1.0, -1.0, 3)
