"""A reward model's grades: our queue against arrival-order batches of 32.

Both score the same answers with the same model (a random Llama, hidden 128, 4 layers, as large as the demo's) on
the same thread budget. The peer takes what waits in order of arrival, 32 at a time, padded to the longest, as
inference servers without a plan do. The answers are those of a GRPO round and of live traffic: eight answers to
each of some prompts with one system prompt, mixed with lone conversations; some come twice. Clients send one
answer each and wait; a grade counts only by its deadline. It fails where our side gives up an answer, its p99 is past
the deadline, or scores of both differ.

Run: python -m tests.bench.grader [--rounds 3] [--prompts 48] [--deadline 2.0]
"""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from cluster.errors import UnavailableError
from train.score_batches import BatchScorer, Row, ScoreQueue

PEER_BATCH = 32
ANSWERS = 8
SYSTEM_TOKENS = 120
SHARE_REPEATED = 0.1
VOCABULARY = 512
CLIENTS = 64
SCORES_APART = 1e-4
"""Most that two orders of summing may make of one score."""


def build_model() -> Any:
    """A random reward model of the demo's size."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, num_labels=1, max_position_embeddings=2048, **shape)
    return LlamaForSequenceClassification(config).eval()


def workload(prompts: int) -> list[Row]:
    """Rows in order of arrival."""
    draw = Random(11)

    def text(low: int, high: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(draw.randrange(low, high))]

    system = text(SYSTEM_TOKENS, SYSTEM_TOKENS + 1)
    rows: list[Row] = []
    for number in range(prompts):
        prompt = system + text(40, 400)
        rows += [tuple(prompt + text(4, 80)) for _ in range(ANSWERS if number % 4 else 1)]
    rows += draw.sample(rows, round(SHARE_REPEATED * len(rows)))
    draw.shuffle(rows)
    return rows


class ArrivalOrder:
    """The peer: a thread that takes what waits, 32 at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._queue: SimpleQueue[tuple[Row, Future[float]] | None] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, ids: Row, _deadline: float) -> "Future[float]":
        """The score of one row."""
        future: Future[float] = Future()
        self._queue.put((ids, future))
        return future

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            while len(batch) < PEER_BATCH:
                try:
                    found = self._queue.get_nowait()
                except Empty:
                    break
                if found is None:
                    return
                batch.append(found)
            for (_, future), score in zip(batch, padded_scores(self._model, [ids for ids, _ in batch]), strict=True):
                future.set_result(score)


@torch.inference_mode()
def padded_scores(model: Any, rows: Sequence[Row]) -> list[float]:
    """Scores of one batch, padded to its longest row."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    scores: list[float] = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, 0].tolist()
    return scores


def measure(
    submit: Callable[[Row, float], Any], rows: Sequence[Row], deadline_s: float
) -> tuple[float, list[float], list[Any]]:
    """Seconds in all, seconds of each answer, and the scores (`None`: given up), with `CLIENTS` clients."""
    latencies, scores = [0.0] * len(rows), [None] * len(rows)
    places = iter(range(len(rows)))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            began = time.monotonic()
            try:
                found = submit(rows[place], began + deadline_s).result()
            except UnavailableError:
                found = None
            latencies[place] = time.monotonic() - began
            scores[place] = found[0] if isinstance(found, list) else found

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, latencies, scores


def main() -> None:
    """Run both in turn and print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = build_model(), workload(options.prompts)
    found: dict[str, list[tuple[float, list[float], list[Any]]]] = {
        "arrival order": [],
        "queue": [],
        "queue, no cache": [],
    }
    measure(ArrivalOrder(model).submit, rows[:64], options.deadline)  # warm up
    for _ in range(options.rounds):
        for name, runs in found.items():
            peer = name == "arrival order"
            side: Any = ArrivalOrder(model) if peer else ScoreQueue(BatchScorer(model).score)
            distinct = list(dict.fromkeys(rows)) if name == "queue, no cache" else rows
            runs.append(measure(side.submit, distinct, options.deadline))
            side.close()
    report(rows, found, options.deadline)


def report(
    rows: Sequence[Row], found: dict[str, list[tuple[float, list[float], list[Any]]]], deadline_s: float
) -> None:
    """Rates, tails and how far the scores are apart.

    Raises:
        SystemExit: our side gave up an answer, was late, or scored differently.
    """
    rates, faults = {}, []
    for name, runs in found.items():
        count = len(runs[0][2])
        rates[name] = statistics.median(count / seconds for seconds, _, _ in runs)
        p99 = statistics.median(sorted(latencies)[int(0.99 * count)] for _, latencies, _ in runs)
        lost = sum(score is None for _, _, scores in runs for score in scores)
        state = "inside" if p99 <= deadline_s else "past"
        if name != "arrival order" and (lost or p99 > deadline_s):
            faults.append(f"{name}: {lost} given up, p99 {p99:.3f} s of {deadline_s:g} s")
        print(
            f"{name:<16} {rates[name]:8.0f} answers/s   p99 {p99:6.3f} s ({state} {deadline_s:g} s)   given up {lost}"
        )
    pairs = zip(found["arrival order"][0][2], found["queue"][0][2], strict=True)
    apart = max(abs(a - b) for a, b in pairs if a is not None and b is not None)
    print(f"{len(rows)} answers, {len(set(rows))} distinct; scores differ by {apart:.1e} at most")
    if apart > SCORES_APART:
        faults.append(f"scores differ by {apart:.1e}, more than {SCORES_APART:g}")
    ratios = [rates[name] / rates["arrival order"] for name in ("queue", "queue, no cache")]
    print(f"ratio {ratios[0]:.1f}x; without repeated answers {ratios[1]:.1f}x")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
