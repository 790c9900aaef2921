"""The step loop: rows join and leave a batch between any two tokens.

One thread does everything that touches the model. Each turn it drops cancelled rows, reads the prompts of
waiting ones, then makes one token for every row. Adapters and sampling settings differ freely between the
rows of a batch. Other threads only append to `_waiting`, set `Generation.cancelled`, or hand in a function
to run between two steps.

Shape letters: B rows, Q tokens of a row in this pass, L columns read, V vocabulary.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from cluster.errors import UnavailableError
from serve.engines.cache import KeyValue, SlotCache
from serve.engines.generation import FinishReason, Generation, Update
from serve.engines.lora import AdapterBank
from serve.engines.prefix import PrefixCache
from serve.engines.sampling import sample

log = logging.getLogger(__name__)

T = TypeVar("T")
Publish = Callable[[list[Update]], None]
CLOSE_TIMEOUT_S = 30.0  # a step of a large model on a CPU may take long


class QueueFullError(UnavailableError):
    """Too many answers wait already."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes of the step loop (settings.engine)."""

    max_rows: int
    max_queued: int
    max_prefill_tokens: int
    stream_tokens: int
    stream_interval_s: float


class Scheduler:
    """Runs generations on one model. `publish` is called on the loop's thread, at most once a step."""

    def __init__(
        self,
        model: Any,
        bank: AdapterBank,
        cache: SlotCache,
        prefixes: PrefixCache,
        limits: SchedulerLimits,
        *,
        eos_ids: frozenset[int],
        publish: Publish,
    ) -> None:
        self._model, self._bank, self._cache, self.prefixes = model, bank, cache, prefixes
        self._limits, self.eos_ids, self._publish = limits, eos_ids, publish
        self._device = model.device
        self._rows: list[Generation] = []  # row i lives in slot i
        self._waiting: deque[Generation] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._updates: list[Update] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)
        self.steps = 0
        self.generated_tokens = 0

    def start(self) -> None:
        """Start the loop's thread."""
        self._thread.start()

    def close(self) -> None:
        """End the loop; answers in the making finish as cancelled."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    @property
    def running(self) -> int:
        """Rows in the batch."""
        return len(self._rows)

    @property
    def queued(self) -> int:
        """Rows that wait for a slot."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """False once the loop has ended."""
        return self._thread.is_alive()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue the choices of one request, all or none.

        Raises:
            QueueFullError: they do not fit in the queue.
        """
        with self._wake:
            free = self._limits.max_rows - len(self._rows)
            if len(self._waiting) + len(generations) > self._limits.max_queued + max(free, 0):
                raise QueueFullError(f"{len(self._waiting)} answers wait already; try again later")
            if self._closing:
                raise UnavailableError("the engine is shutting down")
            self._waiting.extend(generations)
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function on the loop's thread between two steps."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise UnavailableError("the engine is shutting down")
            self._jobs.append((function, future))
            self._wake.notify()
        return future

    def forward(
        self,
        rows: Sequence[Generation],
        first_slot: int,
        tokens: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """Run `tokens[i]` of each row, which follow what its slot holds; call on the loop's thread only.

        Returns the logits after each row's last token, [B, V], or after every token, [B, Q, V], with
        shorter rows padded on the left. Does not advance `Generation.length`.
        """
        width = max(len(t) for t in tokens)
        starts = [row.length for row in rows]
        length = max(start + len(t) for start, t in zip(starts, tokens, strict=True))
        self._cache.reserve(first_slot + len(rows), length)
        padded = [[0] * (width - len(t)) + list(t) for t in tokens]
        first_B1 = torch.tensor([s + len(t) - width for s, t in zip(starts, tokens, strict=True)]).unsqueeze(1)
        positions_BQ = (first_B1 + torch.arange(width)).to(self._device)
        ragged = any(len(t) != width for t in tokens)
        padding_BQ = None
        if ragged:
            used_B1 = torch.tensor([width - len(t) for t in tokens]).unsqueeze(1)
            padding_BQ = (torch.arange(width) < used_B1).to(self._device)
            positions_BQ = positions_BQ.clamp_min(0)
        self._cache.aim(first_slot, positions_BQ, padding_BQ, length)
        self._bank.select([row.adapter for row in rows])
        # A padding token sees column 0, so that no row of the mask is empty; nobody reads its result.
        later_BQL = torch.arange(length, device=self._device) > positions_BQ.unsqueeze(-1)
        mask_B1QL = torch.zeros(later_BQL.shape, dtype=self._model.dtype, device=self._device)
        mask_B1QL = mask_B1QL.masked_fill_(later_BQL, -torch.inf).unsqueeze(1)
        logits: Tensor = self._model(
            input_ids=torch.tensor(padded, device=self._device),
            attention_mask=mask_B1QL,
            position_ids=positions_BQ,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        ).logits
        return logits if all_logits else logits[:, -1]

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                self._run_jobs()
                self._drop_cancelled()
                self._admit()
                if self._rows:
                    self._step()
                self._deliver()
        self._end()

    def _wait(self) -> bool:
        with self._wake:
            while not (self._closing or self._rows or self._waiting or self._jobs):
                self._wake.wait()
            return not self._closing

    def _run_jobs(self) -> None:
        while self._jobs:
            function, future = self._jobs.popleft()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [row for row in self._waiting if row.cancelled]
            if gone:
                self._waiting = deque(row for row in self._waiting if not row.cancelled)
        for row in gone:
            self._finish(row, "cancelled")
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].cancelled:
                self._finish(self._rows[slot], "cancelled")
                self._release(slot)

    def _admit(self) -> None:
        """Read the prompts of waiting rows, as many as fit into this step."""
        joiners: list[Generation] = []
        blocks: list[list[KeyValue]] = []
        budget = self._limits.max_prefill_tokens
        while self._waiting and len(self._rows) + len(joiners) < self._limits.max_rows:
            row = self._waiting[0]
            if row.cancelled:
                self._finish(self._waiting.popleft(), "cancelled")
                continue
            found = self.prefixes.lookup(self._owner(row), row.prompt)
            todo = len(row.prompt) - len(found) * self.prefixes.block_tokens
            if joiners and todo > budget:
                break
            budget -= todo
            joiners.append(self._waiting.popleft())
            blocks.append(found)
        if joiners:
            try:
                self._prefill(joiners, blocks)
            except Exception as error:
                self._rows = [row for row in self._rows if row not in joiners]
                self._fail(joiners, error)

    def _prefill(self, joiners: list[Generation], blocks: list[list[KeyValue]]) -> None:
        first, size = len(self._rows), self.prefixes.block_tokens
        self._cache.reserve(first + len(joiners), max(len(row.prompt) for row in joiners))
        for slot, (row, found) in enumerate(zip(joiners, blocks, strict=True), start=first):
            for number, block in enumerate(found):
                self._cache.write(slot, number * size, block)
            row.length = len(found) * size
        logits_BV = self.forward(joiners, first, [row.prompt[row.length :] for row in joiners])
        for slot, row in enumerate(joiners, start=first):
            row.length = len(row.prompt)
            for number, key in self.prefixes.wanted(self._owner(row), row.prompt):
                self.prefixes.store(key, self._cache.read(slot, number * size, (number + 1) * size))
        self._rows.extend(joiners)
        self._advance(joiners, logits_BV)

    def _step(self) -> None:
        try:
            logits_BV = self.forward(self._rows, 0, [row.tokens[-1:] for row in self._rows])
            for row in self._rows:
                row.length += 1
            self._advance(list(self._rows), logits_BV)
        except Exception as error:
            rows, self._rows = self._rows, []
            self._fail(rows, error)

    def _advance(self, rows: list[Generation], logits_BV: Tensor) -> None:
        """Choose each row's next token; `rows` are the last of the batch, in slot order."""
        sampled = sample(logits_BV, rows)
        self.steps += 1
        now = time.monotonic()
        first = len(self._rows) - len(rows)
        for number in reversed(range(len(rows))):
            row, token, logprob = rows[number], sampled.tokens[number], sampled.logprobs[number]
            if token is None:
                self._cache.clear(first + number)
                self._updates.append(Update(row, "", [], [], "error", "the model's output is not finite"))
                self._release(first + number)
                continue
            self.generated_tokens += 1
            row.tokens.append(token)
            if row.constraint is not None:
                row.constraint.accept(token)
            if logprob is not None:
                row.logprobs.append(logprob)
            reason = self._end_of(row, token)
            if reason is not None:
                self._finish(row, reason)
                self._release(first + number)
            elif row.stream:
                self._maybe_flush(row, now)

    def _end_of(self, row: Generation, token: int) -> FinishReason | None:
        if token in self.eos_ids and not row.params.ignore_eos:
            return "stop"
        row.text.push((token,))
        if row.text.stopped:
            return "stop"
        return "length" if len(row.tokens) >= row.params.max_tokens else None

    def _maybe_flush(self, row: Generation, now: float) -> None:
        fresh = len(row.tokens) - row.flushed
        full = fresh >= self._limits.stream_tokens or now - row.flushed_at >= self._limits.stream_interval_s
        if row.flushed and not full:
            return
        self._updates.append(self._update(row, None))
        row.flushed_at = now

    def _finish(self, row: Generation, reason: FinishReason) -> None:
        self._updates.append(self._update(row, reason))

    def _update(self, row: Generation, reason: FinishReason | None) -> Update:
        text = row.text.take(final=reason is not None)
        update = Update(row, text, row.tokens[row.flushed :], row.logprobs[row.flushed :], reason)
        row.flushed = len(row.tokens)
        return update

    def _release(self, slot: int) -> None:
        """Free a slot; the last row moves into it."""
        last = self._rows.pop()
        if slot < len(self._rows):
            self._cache.move(len(self._rows), slot, last.length)
            self._rows[slot] = last

    def _fail(self, rows: Sequence[Generation], error: Exception) -> None:
        log.error("a step failed for %d answers: %s", len(rows), error, exc_info=error)
        self._updates.extend(Update(row, "", [], [], "error", "the engine failed on this batch") for row in rows)

    def _deliver(self) -> None:
        if self._updates:
            updates, self._updates = self._updates, []
            self._publish(updates)

    def _end(self) -> None:
        with self._wake:
            rows, self._rows = [*self._rows, *self._waiting], []
            self._waiting.clear()
            jobs, self._jobs = self._jobs, deque()
        for row in rows:
            self._finish(row, "cancelled")
        for _, future in jobs:
            future.set_exception(UnavailableError("the engine is shutting down"))
        self._deliver()

    @staticmethod
    def _owner(row: Generation) -> int:
        return row.adapter.uid if row.adapter is not None else 0
