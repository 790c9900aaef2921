"""The embedded engine: one base model and many adapters in this process, no server of its own.

`LocalEngine` ties the parts together: it turns messages into token ids, hands them to the step loop
(scheduler.py) and brings the updates back to the event loop of the HTTP side. It needs nothing but
transformers; any causal model whose layers keep plain keys and values works.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from cluster.errors import ConfigError, NotFoundError
from cluster.settings.engines import EngineSettings
from data.interaction_bodies import Message
from data.template import Tools, render, template_digest
from serve.engines.adapter_files import read_adapter, read_canary
from serve.engines.adapter_source import AdapterError
from serve.engines.base_model import BaseIdentity
from serve.engines.cache import SlotCache, layer_shapes
from serve.engines.canary import Canary
from serve.engines.detokenise import AnswerText, TokenTexts
from serve.engines.fingerprint import fingerprint
from serve.engines.generation import Generation, SamplingParams, Update
from serve.engines.host import BASE_NAME, ServedModel
from serve.engines.lora import AdapterBank, LoadedAdapter
from serve.engines.prefix import PrefixCache
from serve.engines.scheduler import Scheduler, SchedulerLimits
from serve.engines.structured import Grammars

log = logging.getLogger(__name__)
FIRST_COLUMNS = 256  # columns of a slot at the start; slots grow when a longer prompt comes
FIRST_SLOTS = 8


class LocalEngine:
    """A base model with adapters. `generate` and the adapter calls belong to one event loop.

    Raises:
        ConfigError: no base model is set, it does not exist, or it cannot be served.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.base_model = _require_base(settings)
        torch.set_num_threads(settings.torch_threads)
        self.tokenizer, model = _load(self.base_model, settings)
        self.base = BaseIdentity(self.base_model)
        self.fingerprint = fingerprint(self.base, settings.dtype, settings.device)
        self.max_context_tokens = _context(model.config, settings)
        self.texts = TokenTexts(self._decode_raw, self.tokenizer.convert_ids_to_tokens)
        self.template_digest = template_digest(self.tokenizer)
        self._bank = AdapterBank(model, settings.max_adapters)
        self._loaded_at: dict[str, int] = {BASE_NAME: int(time.time())}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.scheduler = self._build_scheduler(model)
        self.scheduler.start()
        self.grammars = Grammars(self.tokenizer, model.config.get_text_config().vocab_size, self.scheduler.eos_ids)
        self._canary = Canary(self.tokenizer, self.scheduler, settings)

    def _build_scheduler(self, model: Any) -> Scheduler:
        s = self.settings
        with torch.inference_mode():
            probe = DynamicCache(config=model.config)
            model(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device),
                past_key_values=probe,
                use_cache=True,
            )
        try:
            shapes = layer_shapes(probe)
        except ValueError as error:
            raise ConfigError(
                "engine.base_model", self.base_model, f"cannot be served: {error}", "use vLLM for it"
            ) from None
        token_bytes = sum(x.heads * (x.key_size + x.value_size) for x in shapes) * model.dtype.itemsize
        blocks = int(s.prefix_cache_mb * 2**20 / (token_bytes * s.prefix_block_tokens))
        return Scheduler(
            model,
            self._bank,
            SlotCache(shapes, slots=FIRST_SLOTS, columns=FIRST_COLUMNS, dtype=model.dtype, device=s.device),
            PrefixCache(s.prefix_block_tokens, blocks),
            SchedulerLimits(
                s.max_rows, s.max_queued, s.max_prefill_tokens, s.stream_tokens, s.stream_interval_ms / 1000
            ),
            eos_ids=_eos_ids(self.tokenizer, model),
            publish=self._publish,
        )

    @property
    def alive(self) -> bool:
        """False once the step loop has ended."""
        return self.scheduler.alive

    def close(self) -> None:
        """End the step loop."""
        self.scheduler.close()

    def apply(self, settings: EngineSettings) -> None:
        """Take limits that may change while serving: adapters, ranks, tokens, delays."""
        self.settings = settings
        self._bank.max_adapters = settings.max_adapters

    def models(self) -> list[ServedModel]:
        """Every name that can be asked for, the base first."""
        adapters = [ServedModel(a.name, a.path, self._loaded_at[a.name]) for a in list(self._bank.loaded.values())]
        return [ServedModel(BASE_NAME, None, self._loaded_at[BASE_NAME]), *adapters]

    def adapter(self, name: str) -> LoadedAdapter | None:
        """The adapter behind a served name; `None` for the base.

        Raises:
            NotFoundError: no such name; the message lists the known ones.
        """
        if name == BASE_NAME:
            return None
        adapter = self._bank.loaded.get(name)
        if adapter is None:
            known = ", ".join(m.name for m in self.models())
            raise NotFoundError(f"the model {name!r} does not exist here; known are {known}")
        return adapter

    def load_adapter(self, name: str, path: Path | str, *, expected_sha256: str | None = None) -> LoadedAdapter:
        """Read, check and make available an adapter; other answers go on meanwhile. Blocks: use a thread.

        Raises:
            AdapterError: one of the checks failed; the message says which.
        """
        files = read_adapter(path, max_rank=self.settings.max_rank)
        if expected_sha256 is not None and files.sha256 != expected_sha256:
            raise AdapterError(f"its digest is {files.sha256}, the registry recorded {expected_sha256}")
        self.base.check_named(files.base_model)
        adapter = self._bank.prepare(name, files)
        self._canary.check(adapter)
        self._canary.check_as_trained(adapter, read_canary(path))
        self._loaded_at.setdefault(name, int(time.time()))
        self._bank.add(adapter)
        return adapter

    def unload_adapter(self, name: str) -> bool:
        """Take an adapter away; answers in the making still finish with it. False if it was not there."""
        self._loaded_at.pop(name, None) if name != BASE_NAME else None
        return self._bank.remove(name)

    def render(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """The prompt's token ids."""
        return render(self.tokenizer, messages, tools, add_generation_prompt=True)

    async def generate(
        self, model: str, prompt: list[int], params: SamplingParams, *, choices: int = 1, stream: bool = False
    ) -> AsyncGenerator[Update]:
        """Updates of all choices until each has finished; without `stream`, one final update a choice.

        Closing the iterator early frees the rows.

        Raises:
            NotFoundError: the engine has no model of that name.
            QueueFullError: too many answers wait already.
        """
        self._loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Update] = asyncio.Queue()
        adapter = self.adapter(model)
        generations = [self._generation(prompt, params, adapter, index, stream, inbox) for index in range(choices)]
        self.scheduler.submit(generations)
        open_choices = choices
        try:
            while open_choices:
                update = await inbox.get()
                open_choices -= update.finish_reason is not None
                yield update
        finally:
            for generation in generations:
                generation.cancelled = True

    def _generation(
        self,
        prompt: list[int],
        params: SamplingParams,
        adapter: LoadedAdapter | None,
        index: int,
        stream: bool,
        inbox: "asyncio.Queue[Update]",
    ) -> Generation:
        seed = None if params.seed is None else f"{params.seed}/{index}"
        return Generation(
            prompt,
            params,
            AnswerText(self._decode, params.stop),
            adapter=adapter,
            index=index,
            stream=stream,
            inbox=inbox,
            draws=random.Random(seed),
            constraint=self.grammars.constraint(params),
        )

    def _publish(self, updates: list[Update]) -> None:
        """Called on the step loop's thread: hand the news to the event loop in one call."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, updates)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _decode_raw(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _put(updates: list[Update]) -> None:
    for update in updates:
        update.generation.inbox.put_nowait(update)


def _require_base(settings: EngineSettings) -> str:
    if not settings.base_model:
        raise ConfigError("engine.base_model", None, "is not set", "set `engine.base_model` in rayloop.yaml")
    return settings.base_model


def _load(base_model: str, settings: EngineSettings) -> tuple[Any, Any]:
    try:
        AutoConfig.from_pretrained(base_model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            base_model, dtype=getattr(torch, settings.dtype), trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        remedy = "set `engine.base_model` to a model directory or hub id"
        raise ConfigError("engine.base_model", base_model, f"cannot be loaded ({cause})", remedy) from None
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("engine.device", settings.device, "is not on this machine", "set `engine.device` to cpu")
    return tokenizer, model.to(settings.device).eval().requires_grad_(False)


def _context(config: Any, settings: EngineSettings) -> int:
    """Tokens of prompt and answer that the model can attend to at once.

    A model that slides its window is held to the window: the slots keep no more than plain attention.
    """
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None), settings.max_context_tokens]
    if getattr(text, "use_sliding_window", True):
        limits.append(getattr(text, "sliding_window", None))
    return min([limit for limit in limits if limit] or [2048])


def _eos_ids(tokenizer: Any, model: Any) -> frozenset[int]:
    ids: set[int] = set()
    for found in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
        ids |= set(found if isinstance(found, list | tuple) else [] if found is None else [found])
    return frozenset(ids)
