import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import DatasetError, InputError
from cluster.model_files import describe_base
from cluster.settings.training import ToySettings
from data.template import render, render_with_mask
from tests.toys import toy_examples
from train.toy import build_toy_base, read_examples

TINY = ToySettings(hidden=32, layers=1, heads=2, intermediate=64, vocab=300, epochs=1, batch_size=16)


def test_base_answers_in_the_form_it_was_taught(toy_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    model = AutoModelForCausalLM.from_pretrained(toy_base)
    prompt = torch.tensor([render(tokenizer, toy_examples(1, seed=9)[0][:1], add_generation_prompt=True)])
    ids = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert ids[-1] == tokenizer.eos_token_id
    assert set(json.loads(tokenizer.decode(ids[:-1]))) == {"verdict", "owner"}


def test_tokenizer_encodes_any_text_and_marks_what_the_assistant_says(toy_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    text = "naïve ✓ 漢字 \t\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids, mask = render_with_mask(tokenizer, toy_examples(1)[0])
    said = tokenizer.decode([i for i, inside in zip(ids, mask, strict=True) if inside])
    assert said == toy_examples(1)[0][1]["content"] + tokenizer.eos_token


def test_same_seed_gives_the_same_files_and_another_seed_does_not(tmp_path: Path) -> None:
    examples = toy_examples(40)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_toy_base(tmp_path / name, examples, TINY.model_copy(update={"seed": seed}))
    digest = {name: describe_base(tmp_path / name)[1] for name in "abc"}
    assert digest["a"] == digest["b"] != digest["c"]


def test_examples_without_answers_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no answer of an assistant"):
        build_toy_base(tmp_path / "out", [[{"role": "user", "content": "hello"}]], TINY)
    assert not list(tmp_path.iterdir())


def test_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text(json.dumps({"messages": toy_examples(1)[0]}) + '\n{"messages": []}\n')
    with pytest.raises(DatasetError, match=r"examples\.jsonl:2 must be"):
        read_examples(file)


def test_out_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        build_toy_base(tmp_path / "file" / "out", toy_examples(4), TINY)
