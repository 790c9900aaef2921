"""Scores many conversations with little arithmetic: equal ones once, a shared beginning once, no padding to speak of.

Answers to one prompt arrive together (GRPO's groups, shadow pairs, a batch to the grader). Their common beginning
is read once and its keys and values are given to every row; what follows is cut into buckets of similar length
that hold a bounded number of tokens. The scores are those of each row alone, up to rounding.

Shape letters: B rows of a bucket, T tokens of a row, P tokens of the shared beginning, H score heads.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.errors import UnavailableError

Row = tuple[int, ...]
TOKEN_BUDGET = 4096
"""Tokens of one forward pass, padding included."""
MIN_SHARED = 16
"""A shorter beginning is not worth a pass of its own."""
CACHED_SCORES = 50_000
KEPT_MB = 256
"""Memory for the keys and values of beginnings that may come again."""


@dataclass(frozen=True, slots=True)
class Node:
    """Rows with one beginning of `shared` tokens: those that go on by themselves, and groups that share more."""

    shared: int
    rows: list[int]
    groups: list["Node"]
    first: int
    """A row that begins so."""


def plan(rows: Sequence[Row], places: Sequence[int], read: int = 0, min_shared: int = MIN_SHARED) -> Node:
    """The tree of what the rows at `places` share, beyond `read` tokens that all of them begin with."""
    order = sorted(places, key=lambda i: rows[i])
    alone: list[int] = []
    groups: list[Node] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and _shared(rows[order[end - 1]], rows[order[end]]) >= read + min_shared:
            continue
        members, start = order[start:end], end
        if len(members) == 1:
            alone += members
        else:  # in sorted order the outermost two share the least
            common = min(_shared(rows[members[0]], rows[members[-1]]), *(len(rows[i]) - 1 for i in members))
            groups.append(plan(rows, members, common, min_shared))
    return Node(read, alone, groups, order[0])


def buckets(rows: Sequence[Row], places: Sequence[int], shared: int, budget: int = TOKEN_BUDGET) -> list[list[int]]:
    """The rows in order of length, cut so that rows times longest rest stays within the budget."""
    found: list[list[int]] = []
    for row in sorted(places, key=lambda i: len(rows[i])):
        width = len(rows[row]) - shared
        if found and (len(found[-1]) + 1) * width <= budget:
            found[-1].append(row)
        else:
            found.append([row])
    return found


class BatchScorer:
    """Scores rows by one model, and remembers beginnings that several rows had. Not thread-safe."""

    def __init__(self, model: Any, *, budget: int = TOKEN_BUDGET, kept_mb: int = KEPT_MB) -> None:
        self._model, self._budget = model, budget
        self._kept_bytes = kept_mb * 2**20
        self._known: OrderedDict[Row, Any] = OrderedDict()  # beginning -> its keys and values
        self._bytes = 0

    @torch.inference_mode()
    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The output of every head for conversations given as token ids, in order; float [rows][H]."""
        places: dict[Row, list[int]] = {}
        for place, ids in enumerate(rows):
            places.setdefault(tuple(ids), []).append(place)
        unique, scores = list(places), [[0.0]] * len(rows)
        by_beginning: dict[Row, list[int]] = {}
        for number, row in enumerate(unique):
            by_beginning.setdefault(self._longest_known(row), []).append(number)
        known = {beginning: self._known.get(beginning) for beginning in by_beginning}  # what comes may push them out
        for beginning, members in by_beginning.items():
            prefix = known[beginning]
            for number, values in self._walk(plan(unique, members, len(beginning)), unique, prefix):
                for place in places[unique[number]]:
                    scores[place] = values
        return scores

    def _walk(self, node: Node, rows: Sequence[Row], prefix: Any) -> Iterator[tuple[int, list[float]]]:
        """Scores of every row of a node, whose beginning `prefix` holds."""
        for bucket in buckets(rows, node.rows, node.shared, self._budget):
            yield from zip(bucket, self._bucket([rows[i] for i in bucket], node.shared, prefix), strict=True)
        for group in node.groups:
            beginning = rows[group.first][: group.shared]
            yield from self._walk(group, rows, self._read(beginning, node.shared, prefix))

    def _read(self, beginning: Row, known: int, prefix: Any) -> Any:
        """Keys and values of a beginning, of which `known` tokens are in `prefix`."""
        ids_1P = torch.tensor([beginning[known:]], device=self._model.device)
        mask_1P = torch.ones(1, len(beginning), dtype=torch.long, device=self._model.device)
        cache = _repeated(prefix, 1)
        read = self._model(input_ids=ids_1P, attention_mask=mask_1P, past_key_values=cache, use_cache=True)
        self._keep(beginning, read.past_key_values)
        return read.past_key_values

    def _keep(self, beginning: Row, prefix: Any) -> None:
        replaced = self._known.pop(beginning, None)
        self._bytes += _size(prefix) - (_size(replaced) if replaced is not None else 0)
        self._known[beginning] = prefix
        while self._bytes > self._kept_bytes and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _size(oldest)

    def _longest_known(self, row: Row) -> Row:
        found = max((b for b in self._known if len(b) < len(row) and row[: len(b)] == b), key=len, default=())
        if found:
            self._known.move_to_end(found)
        return found

    def _bucket(self, rows: Sequence[Row], shared: int, prefix: Any) -> list[list[float]]:
        """Scores of rows of which `shared` tokens have been read already."""
        pad = int(self._model.config.get_text_config().pad_token_id)
        longest, device = max(map(len, rows)), self._model.device
        ids_BT = torch.tensor([[*row[shared:], *[pad] * (longest - len(row))] for row in rows], device=device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        cache = _repeated(prefix, len(rows)) if prefix is not None else None
        options = {"past_key_values": cache, "use_cache": cache is not None}
        logits_BH = self._model(input_ids=ids_BT, attention_mask=mask_BT, **options).logits
        return [[float(value) for value in row] for row in logits_BH.float().tolist()]


def _repeated(prefix: Any, rows: int) -> Any:
    """The beginning's keys and values for so many rows; the original stays as it is."""
    from transformers.cache_utils import DynamicCache

    copy = DynamicCache()
    for number, layer in enumerate(prefix.layers if prefix is not None else ()):
        copy.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
    return copy


def _size(prefix: Any) -> int:
    return sum(t.numel() * t.element_size() for layer in prefix.layers for t in (layer.keys, layer.values))


def _shared(left: Row, right: Row) -> int:
    """Length of the common beginning, without the last token of either: that is always read."""
    return min(_common(left, right), len(left) - 1, len(right) - 1)


def _common(left: Row, right: Row) -> int:
    """Length of the common beginning."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))


@dataclass(slots=True)
class _Waiting:
    ids: Row
    deadline: float
    future: "Future[Any]" = field(default_factory=Future)


class ScoreQueue:
    """Gathers what many callers want scored; `score` gives one result a row.

    One thread owns the model; `submit` may be called from any. While the model works, what arrives waits and is
    planned together; nothing waits for a batch to fill. The most urgent goes first, and what is past its deadline
    is given up instead of delaying the others.
    """

    def __init__(self, score: Callable[[Sequence[Row]], list[Any]], *, batch_tokens: int = 8 * TOKEN_BUDGET) -> None:
        self._score, self._batch_tokens = score, batch_tokens
        self._known: OrderedDict[Row, Any] = OrderedDict()
        self._queue: list[_Waiting] = []
        self._changed = threading.Condition()
        self._closing = False
        self.passes = 0
        self._thread = threading.Thread(target=self._run, name="scores", daemon=True)
        self._thread.start()

    def submit(self, ids: Sequence[int], deadline: float) -> "Future[Any]":
        """The scores of one conversation by `deadline` (time.monotonic); fails with `UnavailableError` past it."""
        waiting = _Waiting(tuple(ids), deadline)
        with self._changed:
            known = self._known.get(waiting.ids)
            if known is not None:
                self._known.move_to_end(waiting.ids)
                waiting.future.set_result(known)
            elif self._closing:
                waiting.future.set_exception(UnavailableError("the reward model is shutting down"))
            else:
                self._queue.append(waiting)
                self._changed.notify()
        return waiting.future

    async def score(self, ids: Sequence[int], deadline: float) -> Any:
        """`submit` for an event loop."""
        return await asyncio.wrap_future(self.submit(ids, deadline))

    def close(self) -> None:
        """Give up what waits, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            try:
                scores = self._score([waiting.ids for waiting in batch])
            except Exception as error:
                for waiting in batch:
                    _fail(waiting, UnavailableError(f"the reward model failed ({type(error).__name__}: {error})"))
                continue
            self.passes += 1
            self._deliver(batch, scores)

    def _next(self) -> list[_Waiting] | None:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            queue, self._queue = sorted(self._queue, key=lambda w: w.deadline), []
            if self._closing:
                for waiting in queue:
                    _fail(waiting, UnavailableError("the reward model is shutting down"))
                return None
            now, tokens = time.monotonic(), 0
            batch: list[_Waiting] = []
            for waiting in queue:
                if waiting.deadline <= now:
                    _fail(waiting, UnavailableError("the reward model had no time for it"))
                elif batch and tokens + len(waiting.ids) > self._batch_tokens:
                    self._queue.append(waiting)
                else:
                    batch.append(waiting)
                    tokens += len(waiting.ids)
            return batch

    def _deliver(self, batch: list[_Waiting], scores: Sequence[Any]) -> None:
        with self._changed:
            for waiting, values in zip(batch, scores, strict=True):
                self._known[waiting.ids] = values
            while len(self._known) > CACHED_SCORES:
                self._known.popitem(last=False)
        for waiting, values in zip(batch, scores, strict=True):
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_result(values)


def _fail(waiting: _Waiting, error: Exception) -> None:
    if waiting.future.set_running_or_notify_cancel():
        waiting.future.set_exception(error)
