import json
from pathlib import Path

import pytest

from cluster.errors import InputError
from train.answers import read_prompts, write_lines


def test_prompts_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    chats = [[{"role": "user", "content": text}] for text in ("one", "two")]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    assert read_prompts(file) == chats


@pytest.mark.parametrize("text", ["", '{"messages": []}\n', "not JSON\n", '{"prompt": "x"}\n', "[1]\n"])
def test_broken_prompts_are_refused_with_the_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=r"prompts\.jsonl"):
        read_prompts(file)


def test_missing_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.jsonl")


def test_answers_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    write_lines(out, [{"line": 1, "adapter": None, "text": "yes"}])
    assert json.loads(out.read_text()) == {"line": 1, "adapter": None, "text": "yes"}

    def broken() -> object:
        yield {"line": 1}
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_lines(out, broken())  # type: ignore[arg-type]
    assert json.loads(out.read_text())["text"] == "yes" and list(tmp_path.iterdir()) == [out]
    with pytest.raises(InputError, match="cannot be written"):
        write_lines(tmp_path / "missing" / "answers.jsonl", [{}])
