"""A small base model trained here from scratch, so that the whole loop runs offline on two CPU cores.

A byte-level BPE tokenizer and a Llama of about a million parameters learn chat examples in about a
minute. What is written is an ordinary `transformers` directory: any engine or trainer loads it like a
downloaded model. One plain torch loop, batches of similar length, the loss over the answers; the same
examples and seed give the same files.
"""

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.errors import DatasetError
from cluster.settings.training import ToySettings
from data.interaction_bodies import Message
from train.device import resolve_device
from train.files import check_replaceable, written_whole
from train.progress import Progress
from train.quiet import quiet_libraries

log = logging.getLogger(__name__)

PAD, BOS, END = "<|pad|>", "<|begin|>", "<|end|>"
TOY_FILES = ("config.json", "model.safetensors", "tokenizer.json")
ROLES = ("system", "user", "assistant", "tool")
IGNORED = -100  # label of a token outside the loss; torch's cross-entropy skips it

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools %}{{ '<|system|>tools: ' + tools | tojson + '<|end|>' }}{% endif -%}
{%- for message in messages -%}
{{- '<|' + message.role + '|>' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{{- message.content or '' -}}
{%- if message.tool_calls -%}
{%- for call in message.tool_calls -%}
{{- '<tool_call>' + (call.function if call.function else call) | tojson + '</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- (message.content or '') + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""


@dataclass(frozen=True)
class ToyResult:
    """What was trained, and how well it fits."""

    path: Path
    parameters: int
    examples: int
    steps: int
    loss: float
    """Mean cross-entropy of the last tenth of the steps, in nats a token."""
    seconds: float


def build_toy_base(out: Path, examples: Iterable[Sequence[Message]], config: ToySettings) -> ToyResult:
    """Train tokenizer and model on chat examples and write them to `out`, whole or not at all.

    Raises:
        DatasetError: no example ends with an assistant's answer.
        InputError: `out` holds something else than a model, or cannot be written.
    """
    started = time.monotonic()
    quiet_libraries()
    chats = [list(messages) for messages in examples]
    if not any(message["role"] == "assistant" for chat in chats for message in chat):
        raise DatasetError("the examples hold no answer of an assistant; each needs `messages` that end with one")
    check_replaceable(out, TOY_FILES)
    with written_whole(out) as folder:
        tokenizer = train_tokenizer(chats, config)
        model = new_model(tokenizer, config)
        rows = [encode(tokenizer, chat, config) for chat in chats]
        losses = fit(model, rows, config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    tail = losses[-max(1, len(losses) // 10) :]
    return ToyResult(
        out, model.num_parameters(), len(rows), len(losses), sum(tail) / len(tail), time.monotonic() - started
    )


def read_examples(file: Path) -> list[list[Message]]:
    """The `messages` of each line of a JSON-lines file.

    Raises:
        DatasetError: the file cannot be read, or a line holds no messages; the message names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"examples {str(file)!r} cannot be read ({error})") from None
    chats = []
    for number, line in enumerate(lines, 1):
        try:
            messages = json.loads(line)["messages"]
            assert messages and all(m["role"] in ROLES and isinstance(m["content"], str) for m in messages)
        except (ValueError, LookupError, TypeError, AssertionError):
            rule = f'must be {{"messages": [{{"role": {"|".join(ROLES)}, "content": text}}, ...]}}'
            raise DatasetError(f"{file}:{number} {rule}") from None
        chats.append(messages)
    return chats


def train_tokenizer(chats: Sequence[Sequence[Message]], config: ToySettings) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text encodes, and what is frequent in the examples is short."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab,
        special_tokens=[PAD, BOS, END, *(f"<|{role}|>" for role in ROLES)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((message["content"] or "" for chat in chats for message in chat), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        model_max_length=config.max_positions,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, config: ToySettings) -> LlamaForCausalLM:
    """A Llama with random weights that depend on the seed alone."""
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        initializer_range=config.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(shape)


@dataclass(frozen=True)
class Row:
    """One example as token ids, and the label of each."""

    ids: list[int]
    labels: list[int]


def encode(tokenizer: PreTrainedTokenizerFast, chat: Sequence[Message], config: ToySettings) -> Row:
    """Ids of the rendered chat; labels are the ids inside the loss, `IGNORED` elsewhere."""
    rendered: Any = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids = rendered["input_ids"][: config.max_positions]
    if config.loss == "all":
        return Row(ids, ids)
    inside = rendered["assistant_masks"][: config.max_positions]
    return Row(ids, [i if kept else IGNORED for i, kept in zip(ids, inside, strict=True)])


def fit(model: LlamaForCausalLM, rows: Sequence[Row], config: ToySettings) -> list[float]:
    """Train with AdamW under a warm-up and a cosine; returns the loss of every step."""
    device = resolve_device("cpu")
    bf16 = device.precision == "bf16"
    model.set_attn_implementation(device.attention)
    per_epoch = math.ceil(len(rows) / config.batch_size)
    steps = max(1, round(per_epoch * config.epochs))
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    warmup = max(1, round(steps * config.warmup_ratio))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, warmup, steps))
    losses = []
    model.train()
    with Progress("base model", steps) as progress:
        for batch in _batches(rows, steps, config, model.config.pad_token_id):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = _step(model, batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            progress.advance(loss=loss, lr=float(schedule.get_last_lr()[0]), tokens=batch.ids_BT.numel())
    model.eval()
    return losses


@dataclass(frozen=True)
class _Batch:
    """int64 [B, T] each; shorter rows end in padding."""

    ids_BT: Tensor
    labels_BT: Tensor


def _step(model: LlamaForCausalLM, batch: _Batch) -> float:
    """Forward and backward; the head runs only on positions whose next token is in the loss."""
    hidden_BTD = model.model(input_ids=batch.ids_BT[:, :-1], use_cache=False).last_hidden_state
    targets_BT = batch.labels_BT[:, 1:]
    kept_BT = targets_BT != IGNORED
    logits_NV = model.lm_head(hidden_BTD[kept_BT])
    loss = F.cross_entropy(logits_NV.float(), targets_BT[kept_BT])
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def _batches(rows: Sequence[Row], steps: int, config: ToySettings, pad: int) -> Iterator[_Batch]:
    """`steps` batches of rows of similar length, each epoch in another order.

    Padding stands on the right, where causal attention hides it from every real token: no mask needed.
    """
    generator = torch.Generator().manual_seed(config.seed)
    done = 0
    while done < steps:
        shuffled = torch.randperm(len(rows), generator=generator).tolist()
        by_length = sorted(shuffled, key=lambda i: len(rows[i].ids))
        groups = [by_length[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
        for which in torch.randperm(len(groups), generator=generator).tolist()[: steps - done]:
            yield _padded([rows[i] for i in groups[which]], pad)
            done += 1


def _padded(rows: Sequence[Row], pad: int) -> _Batch:
    longest = max(len(row.ids) for row in rows)
    ids = [row.ids + [pad] * (longest - len(row.ids)) for row in rows]
    labels = [row.labels + [IGNORED] * (longest - len(row.labels)) for row in rows]
    return _Batch(torch.tensor(ids), torch.tensor(labels))


def _cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
