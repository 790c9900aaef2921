"""Text from tokens: split characters, stop strings over token borders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engines.detokenise import AnswerText, TokenTexts
from serve.engines.tool_calls import parse_tool_calls
from tests.serve.engines.models import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return build_tokenizer()


@given(text=st.text(max_size=40), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_pieces_join_to_the_whole_text(tokenizer, text: str, sizes: list[int]) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, pieces, at = AnswerText(tokenizer.decode), [], 0
    while at < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        answer.push(ids[at : at + size])
        pieces.append(answer.take(final=False))
        at += size
    pieces.append(answer.take(final=True))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def feed(text: str, stop: list[str]) -> tuple[list[str], bool]:
    answer, pieces = AnswerText(lambda ids: "".join(map(chr, ids)), stop), []
    for character in text:
        answer.push([ord(character)])
        pieces.append(answer.take(final=answer.stopped))
        if answer.stopped:
            break
    pieces.append(answer.take(final=True))
    return pieces, answer.stopped


def test_stop_string_never_leaks_and_false_alarms_are_released() -> None:
    pieces, stopped = feed("hello ENxx END and more", ["END"])
    assert ("".join(pieces), stopped) == ("hello ENxx ", True)
    assert "E" not in pieces  # held back until it is clear
    assert feed("almost EN", ["END"]) == (["a", "l", "m", "o", "s", "t", " ", "", "", "EN"], False)


@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_cuts_where_the_first_match_completes(text: str, stop: list[str]) -> None:
    pieces, stopped = feed(text, stop)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stopped == bool(ends)
    if ends:
        first = min(end for end, _ in ends)
        assert "".join(pieces) == text[: min(start for end, start in ends if end == first)]
    else:
        assert "".join(pieces) == text


def test_token_bytes_of_a_split_character(tokenizer) -> None:
    texts = TokenTexts(tokenizer.decode, tokenizer.convert_ids_to_tokens)
    ids = tokenizer("🧪", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert bytes(b for i in ids for b in texts.get(i)[1]).decode() == "🧪"


def test_tool_calls_are_taken_out_of_the_text() -> None:
    text = 'Looking. <tool_call>\n{"name": "find", "arguments": {"id": 7}}\n</tool_call>'
    rest, calls = parse_tool_calls(text)
    assert rest == "Looking."
    assert (calls[0]["function"]["name"], calls[0]["function"]["arguments"]) == ("find", '{"id": 7}')
    broken = "<tool_call>{nope}</tool_call>"
    assert parse_tool_calls(broken) == (broken, [])
    assert parse_tool_calls("<tool_call>{[1]}</tool_call>")[1] == []
