"""A base model and its adapters in a vLLM child: what may be asked for, and what an adapter must pass.

vLLM ends its engine, base included, when a request names an adapter it cannot read. So nothing reaches it but
names that were loaded here: from a private copy of the files, which was read whole, whose digest and rank were
checked, which vLLM itself loaded, and which moved the log-probs of the canary prompts. The copy goes only after
the unload, and the unload waits for the requests that use it.
"""

import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, NotFoundError, UnavailableError
from cluster.settings.engines import EngineSettings
from data.template import template_digest
from serve.engines.adapter_files import AdapterFiles, read_adapter, read_bytes, read_canary
from serve.engines.adapter_source import AdapterError
from serve.engines.as_trained import check_as_trained
from serve.engines.base_model import BaseIdentity
from serve.engines.host import BASE_NAME, ServedModel
from serve.engines.vllm.process import VllmProcess
from serve.openai import from_engine

log = logging.getLogger(__name__)

ADAPTER_TIMEOUT_S = 120.0  # of a load, an unload or a canary request, behind the batch that runs
SCORED_TOKENS = 8
"""Tokens of a canary prompt that are scored, one request each."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""Of an adapter, which is also the folder of its copy."""
WARM_UP_TIMEOUT_S = 300.0  # the first request with log-probs compiles for a while


@dataclass(slots=True)
class _Loaded:
    """An adapter that vLLM holds."""

    files: AdapterFiles
    folder: Path
    loaded_at: int
    users: int = 0
    """Requests that use it."""
    leaving: bool = False


@dataclass
class VllmEngine:
    """The engine behind a `VllmProcess`. Thread-safe.

    Raises:
        ConfigError: no base model, or it cannot be served.
        UnavailableError: vLLM does not start.
    """

    settings: EngineSettings
    _adapters: dict[str, _Loaded] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.settings.base_model:
            raise ConfigError("engine.base_model", None, "is not set", "set `engine.base_model` in rayloop.yaml")
        self.base_model = self.settings.base_model
        self._most = {name: getattr(self.settings, name) for name in ("max_adapters", "max_rank")}
        """What vLLM was started with."""
        self.base = BaseIdentity(self.base_model)
        tokenizer = _tokenizer(self.base_model)
        self.template_digest = template_digest(tokenizer)
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.settings.canary_prompts]
        self._canaries: list[list[int]] = [ids for ids in texts if len(ids) > 1]
        self._started_at = int(time.time())
        self._changed = threading.Condition()
        self._loading = threading.Lock()
        self.process = VllmProcess(self.settings, self.base_model, BASE_NAME)
        try:
            self.process.wait_until_up()
            self._warm_up()
            self._base_logprobs = [self._score(BASE_NAME, ids, WARM_UP_TIMEOUT_S) for ids in self._canaries]
        except BaseException:
            self.process.close()
            raise

    @property
    def alive(self) -> bool:
        """False once vLLM has ended or its engine has died."""
        return self.process.alive and self.process.healthy()

    @property
    def running(self) -> int:
        """Requests that use an adapter."""
        return sum(loaded.users for loaded in list(self._adapters.values()))

    def close(self) -> None:
        """End vLLM."""
        self.process.close()

    def apply(self, settings: EngineSettings) -> None:
        """Take limits that may change while serving; never above what vLLM was started with."""
        fixed = {name: min(getattr(settings, name), most) for name, most in self._most.items()}
        self.settings = settings.model_copy(update=fixed)

    def models(self) -> list[ServedModel]:
        """Every name that can be asked for, the base first."""
        with self._changed:
            found = [ServedModel(n, a.files.location, a.loaded_at) for n, a in self._adapters.items() if not a.leaving]
        return [ServedModel(BASE_NAME, None, self._started_at), *found]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Keep an adapter from being unloaded while a request names it.

        Raises:
            NotFoundError: vLLM does not hold it.
        """
        if name == BASE_NAME:
            yield
            return
        with self._changed:
            loaded = self._adapters.get(name)
            if loaded is None or loaded.leaving:
                raise NotFoundError(f"the model {name!r} does not exist here")
            loaded.users += 1
        try:
            yield
        finally:
            with self._changed:
                loaded.users -= 1
                self._changed.notify_all()

    def load_adapter(self, name: str, path: Path | str, *, expected_sha256: str | None = None) -> AdapterFiles:
        """Check, load and try an adapter; other answers go on meanwhile. Blocks: use a thread.

        Raises:
            AdapterError: one of the checks failed; the message says which.
        """
        if not NAME.fullmatch(name):
            raise AdapterError("its name must be letters, digits, `.`, `_` and `-`, and begin with a letter or digit")
        with self._loading:
            if name == BASE_NAME or name in self._adapters:
                raise AdapterError("the name is taken; names hold a digest, so one name is one adapter")
            if len(self._adapters) >= self.settings.max_adapters:
                raise AdapterError(f"{len(self._adapters)} adapters are loaded; raise `engine.max_adapters`")
            folder = self.process.folder / "adapters" / name
            try:
                files = self._copied(str(path), folder, expected_sha256)
                self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
                try:
                    self._check_canaries(name)
                    self._check_as_trained(name, read_canary(str(path)))
                except BaseException:
                    self._post("/v1/unload_lora_adapter", {"lora_name": name})
                    raise
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            with self._changed:
                self._adapters[name] = _Loaded(files, folder, int(time.time()))
            return files

    def unload_adapter(self, name: str) -> bool:
        """Take an adapter away once nobody uses it; false if it was not there. Blocks."""
        with self._changed:
            loaded = self._adapters.get(name)
            if loaded is None or loaded.leaving:
                return False
            loaded.leaving = True
            drained = self._changed.wait_for(lambda: loaded.users == 0, self.settings.vllm.unload_wait_s)
        if not drained:
            log.warning("adapter %s is unloaded while %d answers use it", name, loaded.users)
        try:
            self._post("/v1/unload_lora_adapter", {"lora_name": name})
        except (AdapterError, UnavailableError) as error:
            log.warning("vLLM did not unload %s (%s)", name, error)
        with self._changed:
            del self._adapters[name]
        shutil.rmtree(loaded.folder, ignore_errors=True)
        return True

    def _copied(self, source: str, target: Path, expected_sha256: str | None) -> AdapterFiles:
        """A private copy of the two files that make an adapter, from a folder or a store, checked as copied."""
        target.mkdir(parents=True, mode=0o700)
        for name, data in read_bytes(source).items():
            (target / name).write_bytes(data)
        files = read_adapter(target, max_rank=self.settings.max_rank)
        if expected_sha256 is not None and files.sha256 != expected_sha256:
            raise AdapterError(f"its digest is {files.sha256}, the registry recorded {expected_sha256}")
        self.base.check_named(files.base_model)
        return AdapterFiles(source, files.sha256, files.rank, files.base_model, files.config, {})

    def _check_canaries(self, name: str) -> None:
        shift = 0.0
        for ids, base in zip(self._canaries, self._base_logprobs, strict=True):
            moved = self._score(name, ids, ADAPTER_TIMEOUT_S)
            shift = max([shift, *(abs(m - b) for m, b in zip(moved, base, strict=True))])
            if not shift < float("inf"):
                raise AdapterError("its log-probs of the canary prompts are not finite")
        least = self.settings.canary_min_shift
        if self._canaries and shift < least:
            raise AdapterError(
                f"it changes nothing: the canary prompts' log-probs moved by {shift:.2g} nats at most, "
                f"{least:.2g} is asked (`engine.canary_min_shift`)"
            )

    def _check_as_trained(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Compare with what the adapter's training found, on as many tokens of each text as are scored."""
        served = [self._score(name, row["ids"], ADAPTER_TIMEOUT_S) for row in rows]
        trained = [row["logprobs"][-len(found) :] for row, found in zip(rows, served, strict=True) if found]
        check_as_trained(_flat(served), _flat(trained), self.settings.canary_max_distance)

    def _score(self, name: str, ids: list[int], timeout_s: float) -> list[float]:
        """Log-prob of each of the last `SCORED_TOKENS` tokens, given what is before it.

        Each token is asked for as an answer to its prefix, and is the only one allowed. vLLM could give the log-probs
        of a whole prompt at once, but that ends its engine where another answer is sampled in the same step.
        """
        scored = range(max(1, len(ids) - SCORED_TOKENS), len(ids))
        return [self._score_next(name, ids[:place], ids[place], timeout_s) for place in scored]

    def _score_next(self, name: str, prefix: list[int], token: int, timeout_s: float) -> float:
        request = {"model": name, "prompt": prefix, "max_tokens": 1, "temperature": 0, "logprobs": 0}
        found = self._post("/v1/completions", request | {"allowed_token_ids": [token]}, timeout_s)
        return float(found["choices"][0]["logprobs"]["token_logprobs"][0])

    def _warm_up(self) -> None:
        """The first answer with log-probs takes long: nobody should wait for it."""
        messages = [{"role": "user", "content": "warm up"}]
        request = {"model": BASE_NAME, "messages": messages, "max_tokens": 2, "logprobs": True, "top_logprobs": 1}
        self._post("/v1/chat/completions", request | {"temperature": 0}, WARM_UP_TIMEOUT_S)

    def _post(self, path: str, document: Any, timeout_s: float = ADAPTER_TIMEOUT_S) -> Any:
        status, body = self.process.ask("POST", path, document, timeout_s)
        if status != 200:
            raise AdapterError(f"vLLM answered {status}: {from_engine(status, body).message[:300]}")
        try:
            return json.loads(body)
        except ValueError:
            return None  # the adapter calls answer with a sentence


def _flat(rows: Iterable[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def _tokenizer(base_model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        remedy = "set `engine.base_model` to a model directory or hub id"
        raise ConfigError("engine.base_model", base_model, f"cannot be loaded ({cause})", remedy) from None
