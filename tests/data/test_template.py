from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.errors import DatasetError
from data.template import check_parity, content_text, normalise, render, render_pair, render_with_mask, template_digest

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REWRITING = "{% for m in messages %}{% if not loop.last %}old {% endif %}{{ m.content }}<|end|>{% endfor %}"
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def tokenizer_with(template: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = template
    return tokenizer


def test_render_ends_with_the_assistant_turn_when_asked() -> None:
    tokenizer = tokenizer_with(PLAIN)
    ids = render(tokenizer, CHAT[:1], add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<|user|>one<|end|><|assistant|>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_mask_covers_exactly_what_the_assistant_says(template: str) -> None:
    tokenizer = tokenizer_with(template)
    ids, mask = render_with_mask(tokenizer, CHAT)
    said = tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])
    assert said == "two<|end|>four<|end|>"
    assert ids == render(tokenizer, CHAT)


def test_pair_splits_where_the_engine_would() -> None:
    tokenizer = tokenizer_with(PLAIN)
    prompt, completion = render_pair(tokenizer, CHAT[:3], CHAT[3:])
    assert prompt == render(tokenizer, CHAT[:3], add_generation_prompt=True)
    assert tokenizer.decode(completion) == "four<|end|>"


def test_template_that_rewrites_the_prompt_is_refused() -> None:
    with pytest.raises(DatasetError, match="rewrites the prompt"):
        render_pair(tokenizer_with(REWRITING), CHAT[:1], CHAT[1:2])


def test_normalise_brings_messages_to_one_form() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": None,
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert normalise(messages) == [
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
    ]


@pytest.mark.parametrize("content", [None, {"a": 1}, 5, ["a"], [{"type": "text"}], [{"type": "image_url"}]])
def test_what_is_no_text_has_none(content: Any) -> None:
    assert content_text({"role": "user", "content": content}) == ""


def test_digest_depends_on_the_template_and_nothing_random() -> None:
    assert template_digest(tokenizer_with(PLAIN)) == template_digest(tokenizer_with(PLAIN))
    assert template_digest(tokenizer_with(PLAIN)) != template_digest(tokenizer_with(MARKED))


def test_parity_names_the_first_different_token() -> None:
    tokenizer = tokenizer_with(PLAIN)
    ids = render(tokenizer, CHAT[:1], add_generation_prompt=True)
    check_parity(tokenizer, CHAT[:1], ids)
    with pytest.raises(DatasetError, match="first difference at token 1"):
        check_parity(tokenizer, [{"role": "user", "content": "x"}], ids)
