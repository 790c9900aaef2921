"""Versions that can be asked: in this process, or spread over Ray actors; answers are kept on disk.

Champions are compared with many candidates on the same prompts, so what a version answered under the same
decoding is read back instead of generated again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.registry import Registry, Version
from cluster.runtime import ray_session
from cluster.settings import Settings
from train.evaluate.evidence import prompt_key
from train.evaluate.routed import routed
from train.evaluate.types import Logged, Model, Prompt, Truth
from train.files import write_file

PROJECT = Path(__file__).resolve().parents[2]
CODE = ("train/generate.py", "data/template.py")
"""What decides an answer beside weights and decoding; an edit there makes kept answers useless."""


@dataclass(frozen=True)
class Source:
    """Where a version's files are, and how it is decoded."""

    name: str
    base_model: str
    adapter_dir: str | None
    max_new_tokens: int
    batch_size: int
    seed: int


class LocalVersion:
    """A version loaded in this process, on first use."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name = source.name
        self._loaded: Any = None

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers, in order."""
        from train.generate import Sampling

        sampling = Sampling(self.source.max_new_tokens, 0.0, self.source.seed, self.source.batch_size)
        texts: dict[int, str] = {}
        for tools, positions in _by_tools(prompts):
            asked = [prompts[i].messages for i in positions]
            answers = self._model().generate(asked, sampling, tools=tools)
            texts |= {i: answer.text for i, answer in zip(positions, answers, strict=True)}
        return [texts[i] for i in range(len(prompts))]

    def losses(self, truths: Sequence[Truth]) -> list[tuple[float, int]]:
        """Negative log-likelihood in nats and tokens of each recorded answer."""
        losses: dict[int, tuple[float, int]] = {}
        for tools, positions in _by_tools([truth.prompt for truth in truths]):
            asked = [truths[i].prompt.messages for i in positions]
            recorded = [truths[i].reference for i in positions]
            scores = self._model().logprobs(asked, recorded, batch_size=self.source.batch_size, tools=tools)
            losses |= {i: (-s.total, s.tokens) for i, s in zip(positions, scores, strict=True)}
        return [losses[i] for i in range(len(truths))]

    def likelihoods(self, logged: Sequence[Logged]) -> list[tuple[float, int]]:
        """Log-probability in nats and tokens of each logged answer, up to its end token."""
        found: dict[int, tuple[float, int]] = {}
        for tools, positions in _by_tools([row.prompt for row in logged]):
            asked = [logged[i].prompt.messages for i in positions]
            said = [logged[i].answer for i in positions]
            size = self.source.batch_size
            scores = self._model().logprobs(asked, said, batch_size=size, tools=tools, upto_end=True)
            found |= {i: (s.total, s.tokens) for i, s in zip(positions, scores, strict=True)}
        return [found[i] for i in range(len(logged))]

    def _model(self) -> Any:
        if self._loaded is None:
            from train.generate import LocalModel

            self._loaded = LocalModel(self.source.base_model, self.source.adapter_dir)
        return self._loaded


class RayVersion:
    """A version loaded by several actors; each answers every n-th prompt."""

    def __init__(self, source: Source, workers: int, num_gpus: float) -> None:
        import ray

        self.name = source.name
        actor = ray.remote(num_cpus=0 if num_gpus else 1, num_gpus=num_gpus)(LocalVersion)
        self.actors = [actor.remote(source) for _ in range(workers)]

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers, in order."""
        return self._spread("answer", prompts)

    def losses(self, truths: Sequence[Truth]) -> list[tuple[float, int]]:
        """Negative log-likelihood in nats and tokens of each recorded answer."""
        return self._spread("losses", truths)

    def likelihoods(self, logged: Sequence[Logged]) -> list[tuple[float, int]]:
        """Log-probability in nats and tokens of each logged answer, up to its end token."""
        return self._spread("likelihoods", logged)

    def close(self) -> None:
        """Give the actors' resources back."""
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def _spread(self, method: str, items: Sequence[Any]) -> list[Any]:
        import ray

        count = len(self.actors)
        calls = [getattr(a, method).remote(list(items[i::count])) for i, a in enumerate(self.actors)]
        parts = ray.get(calls)
        return [parts[i % count][i // count] for i in range(len(items))]


class KeptVersion:
    """A version whose answers are read from a file where they are known, and added where not."""

    def __init__(self, model: Model, file: Path) -> None:
        self.model, self.file = model, file
        self.name = model.name
        self.known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers, in order."""
        keys = [_digest("answer", prompt_key(prompt)) for prompt in prompts]
        self._complete(keys, prompts, self.model.answer)
        return [str(self.known[key]) for key in keys]

    def losses(self, truths: Sequence[Truth]) -> list[tuple[float, int]]:
        """Negative log-likelihood in nats and tokens of each recorded answer."""
        keys = [_digest("loss", prompt_key(truth.prompt), truth.reference) for truth in truths]
        self._complete(keys, truths, self.model.losses)
        return [(float(self.known[key][0]), int(self.known[key][1])) for key in keys]

    def likelihoods(self, logged: Sequence[Logged]) -> list[tuple[float, int]]:
        """Log-probability in nats and tokens of each logged answer, up to its end token."""
        keys = [_digest("likelihood", prompt_key(row.prompt), row.answer) for row in logged]
        self._complete(keys, logged, self.model.likelihoods)
        return [(float(self.known[key][0]), int(self.known[key][1])) for key in keys]

    def _complete(self, keys: Sequence[str], items: Sequence[Any], ask: Callable[[Any], Any]) -> None:
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in self.known}
        if missing:
            self.known |= dict(zip(missing, ask(list(missing.values())), strict=True))
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.file, json.dumps(self.known))


@contextmanager
def open_version(settings: Settings, registry: Registry, version: Version) -> Iterator[Model]:
    """A version that can be asked, on Ray where `evaluation.workers` says so, or through the routers.

    Raises:
        InputError: its weights are elsewhere, and there is no key for the routers.
    """
    chosen = settings.evaluation
    adapter = str(registry.adapter_dir(version)) if version.adapter_sha256 else None
    source = Source(version.id, version.base_model, adapter, chosen.max_new_tokens, chosen.batch_size, chosen.seed)
    file = settings.home / "evaluation" / f"{_identity(version, source)}.json"
    if version.endpoint is not None:
        yield KeptVersion(routed(settings, version), file)
        return
    if not chosen.workers:
        yield KeptVersion(LocalVersion(source), file)
        return
    with ray_session(settings):
        spread = RayVersion(source, chosen.workers, chosen.worker_gpus)
        try:
            yield KeptVersion(spread, file)
        finally:
            spread.close()


def _identity(version: Version, source: Source) -> str:
    """What an answer depends on: weights, decoding, code."""
    code = [hashlib.sha256((PROJECT / path).read_bytes()).hexdigest() for path in CODE]
    base = version.tags.get("base_revision", version.base_model)
    return _digest(base, version.adapter_sha256 or "base", str(source.max_new_tokens), *code)[:32]


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _by_tools(prompts: Sequence[Prompt]) -> Iterator[tuple[list[dict[str, Any]] | None, list[int]]]:
    """Positions of the prompts that share their tools: one call of the model for each set."""
    groups: dict[str, list[int]] = {}
    for position, prompt in enumerate(prompts):
        groups.setdefault(json.dumps(prompt.tools, sort_keys=True), []).append(position)
    for positions in groups.values():
        tools = prompts[positions[0]].tools
        yield (list(tools) if tools else None), positions
