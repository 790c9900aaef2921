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
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that begin with the same `shared` tokens; `rows` are places in the input."""

    shared: int
    rows: list[int]


def plan(rows: Sequence[Row], min_shared: int = MIN_SHARED) -> list[Group]:
    """Groups of rows with a common beginning, each as large as saves the most tokens; the rest in one of its own."""
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    groups: list[Group] = []
    alone: list[int] = []
    place = 0
    while place < len(order):
        members, shared = [order[place]], len(rows[order[place]]) - 1  # the last token is always read
        for other in order[place + 1 :]:
            common = min(shared, _common(rows[members[0]], rows[other]), len(rows[other]) - 1)
            if common < min_shared or common * len(members) < shared * (len(members) - 1):
                break
            members.append(other)
            shared = common
        if len(members) > 1:
            groups.append(Group(shared, members))
        else:
            alone += members
        place += len(members)
    return [*groups, Group(0, alone)] if alone else groups


def buckets(rows: Sequence[Row], group: Group, budget: int = TOKEN_BUDGET) -> list[list[int]]:
    """The group's rows in order of length, cut so that rows times longest rest stays within the budget."""
    order = sorted(group.rows, key=lambda i: len(rows[i]))
    found: list[list[int]] = []
    for row in order:
        width = len(rows[row]) - group.shared
        if found and (len(found[-1]) + 1) * width <= budget:
            found[-1].append(row)
        else:
            found.append([row])
    return found


@torch.inference_mode()
def score_rows(model: Any, rows: Sequence[Sequence[int]], *, budget: int = TOKEN_BUDGET) -> list[list[float]]:
    """The output of every head for conversations given as token ids, in order; float [rows][H]."""
    places: dict[Row, list[int]] = {}
    for place, ids in enumerate(rows):
        places.setdefault(tuple(ids), []).append(place)
    unique = list(places)
    scores: list[list[float]] = [[]] * len(rows)
    for group in plan(unique):
        prefix = _read_shared(model, unique[group.rows[0]][: group.shared]) if group.shared else None
        for bucket in buckets(unique, group, budget):
            found = _score_bucket(model, [unique[i][group.shared :] for i in bucket], group.shared, prefix)
            for row, values in zip(bucket, found, strict=True):
                for place in places[unique[row]]:
                    scores[place] = values
    return scores


def _read_shared(model: Any, ids: Row) -> Any:
    """Keys and values of a beginning."""
    ids_1P = torch.tensor([ids], device=model.device)
    return model(input_ids=ids_1P, attention_mask=torch.ones_like(ids_1P), use_cache=True).past_key_values


def _score_bucket(model: Any, rests: Sequence[Row], shared: int, prefix: Any) -> list[list[float]]:
    """Scores of rows of which `shared` tokens have been read already."""
    pad = int(model.config.get_text_config().pad_token_id)
    longest = max(map(len, rests))
    ids_BT = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in rests], device=model.device)
    mask_BT = torch.tensor([[1] * (shared + len(ids)) + [0] * (longest - len(ids)) for ids in rests])
    options: dict[str, Any] = {"use_cache": False}
    if prefix is not None:
        options = {"use_cache": True, "past_key_values": _repeated(prefix, len(rests))}
    logits_BH = model(input_ids=ids_BT, attention_mask=mask_BT.to(model.device), **options).logits
    return [[float(value) for value in row] for row in logits_BH.float().tolist()]


def _repeated(prefix: Any, rows: int) -> Any:
    """The beginning's keys and values for so many rows; the original stays as it is."""
    from transformers.cache_utils import DynamicCache

    copy = DynamicCache()
    for number, layer in enumerate(prefix.layers):
        copy.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
    return copy


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

    One thread owns the model; `submit` may be called from any. While the model works, what arrives waits and is planned together; nothing waits for a batch to fill. The
    most urgent goes first, and what is past its deadline is given up instead of delaying the others.
    """

    def __init__(self, score: Callable[[Sequence[Row]], list[Any]], *, batch_tokens: int = 16 * TOKEN_BUDGET) -> None:
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
            now, tokens, batch = time.monotonic(), 0, []
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
