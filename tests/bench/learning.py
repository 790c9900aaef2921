"""Every method on data that curation made: does it get better at what it is for, on held-out feedback?

The demo's base answers alerts, the demo's analysts react, and for each seed their reactions become events, the events a
dataset (`data.curate`), and the dataset an adapter of each method. Each is measured by its own objective on the
validation split, against what it started from:

    sft     nats a token of liked answers                    the base's
    dpo     DPO loss of held-out pairs                       ln 2
    kto     reward of liked over disliked answers            0
    reward  Bradley-Terry loss of held-out pairs             ln 2
    grpo    the grader's mean reward on held-out prompts     the base's

Run: `python -m tests.bench.learning [--seeds 3] [--alerts 1500]`.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from cluster.demo import world
from cluster.demo.analysts import Habits, react
from cluster.demo.plan import DemoPlan, settings_document

METHODS = ("sft", "dpo", "kto", "reward", "grpo")
USERS = 150
GRPO: dict[str, Any] = {
    "batch_size": 64,
    "group_size": 8,
    "max_steps": 40,
    "learning_rate": 4e-3,
    "max_completion_tokens": 32,
    "grader": {"type": "dataset_label", "name": "recorded_truth"},
}
MORE: dict[str, dict[str, Any]] = {"reward": {"learning_rate": 2e-3, "epochs": 4}, "grpo": GRPO}
"""Lengths and rates for a model of a million parameters; the others are the demo's own."""


def objective(method: str, metrics: Mapping[str, float]) -> tuple[float, float, bool]:
    """What a method started from, where it got to, and whether that is better."""
    if method == "sft":
        before, after = metrics["heldout/base_liked_nats_per_token"], metrics["heldout/liked_nats_per_token"]
        return before, after, after < before
    if method == "dpo":
        return math.log(2), metrics["heldout/pair_dpo_loss"], metrics["heldout/pair_dpo_loss"] < math.log(2)
    if method == "kto":
        margin = metrics["validation/rewards/chosen"] - metrics["validation/rewards/rejected"]
        return 0.0, margin, margin > 0
    if method == "reward":
        return math.log(2), metrics["heldout/loss"], metrics["heldout/loss"] < math.log(2)
    before, after = metrics["heldout/base_reward"], metrics["heldout/reward"]
    return before, after, after > before


def settings_of(root: Path, seed: int) -> Any:
    """The demo's configuration, with a log of its own for each seed."""
    from cluster.settings import load_settings

    document = settings_document(DemoPlan(seed=seed), root)
    document |= {"home": str(root / f"home-{seed}"), "ray": {"num_cpus": 4}}
    document["curation"] |= {"log_to_mlflow": False}
    del document["serve"], document["engine"], document["evaluation"]["suites"]
    return load_settings(**document)[0]


def build_base(root: Path, tickets: int) -> None:
    """The demo's base model."""
    from train.toy import build_toy_base

    chats = [row["messages"] for row in world.base_corpus(0, tickets, DemoPlan().todays_share)]
    build_toy_base(root / "base", chats, settings_of(root, 0).training.toy)


def events(base: Path, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """What the base answered at temperature 1, and what people said to it."""
    from train.generate import LocalModel, Sampling

    alerts = list(islice(world.alerts("live", seed), count))
    model = LocalModel(base, threads=1)
    answers = model.generate([world.prompt(alert) for alert in alerts], Sampling(32, 1.0, seed))
    source = Random(seed)
    for number, (alert, answer) in enumerate(zip(alerts, answers, strict=True)):
        ids = {"interaction_id": f"i{seed}-{number}", "user": f"u{number % USERS}", "session": f"s{number}"}
        ids["agent"] = world.AGENT
        response = {"role": "assistant", "content": answer.text}
        yield {
            "kind": "interaction", **ids, "messages": world.prompt(alert), "response": response,
            "finish_reason": "stop", "requested": world.AGENT,
        }  # fmt: skip
        for item in react(alert, answer.text, Habits(), source).feedback:
            yield {"kind": "feedback", **ids, **item}


def curated(settings: Any, root: Path, seed: int, count: int) -> Any:
    """The manifest of a dataset made from a seed's events."""
    from cluster.database import connect
    from data.curate import curate
    from data.importers.open import open_source
    from data.importers.run import ImportOptions, import_source
    from data.log import EventLog

    file = root / f"events-{seed}.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in events(root / "base", seed, count)), encoding="utf-8")
    log = EventLog(connect(settings))
    import_source(open_source(str(file), settings), log, settings, ImportOptions(format="events"))
    return curate(settings, agent=world.AGENT)


def learn(settings: Any, root: Path, dataset: Path, seed: int) -> list[bool]:
    """Train with every method; prints a line each."""
    from train.config import resolve_config
    from train.run import train

    held = []
    for method in METHODS:
        begun = time.perf_counter()
        config = resolve_config(
            settings,
            method,
            base_model=str(root / "base"),
            dataset=dataset,
            out=root / f"{method}-{seed}",
            seed=seed,
            **MORE.get(method, {}),
        )
        before, after, better = objective(method, train(config).metrics)
        held.append(better)
        mark, seconds = "better" if better else "NOT BETTER", time.perf_counter() - begun
        print(f"seed {seed}  {method:7} {before:8.4f} -> {after:8.4f}  {mark:10} {seconds:6.1f} s", flush=True)
    return held


def main() -> int:
    """A table; 1 when a method did not get better on a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alerts", type=int, default=1500)
    parser.add_argument("--tickets", type=int, default=8000)
    asked = parser.parse_args()
    held: list[bool] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_base(root, asked.tickets)
        for seed in range(asked.seeds):
            settings = settings_of(root, seed)
            made = curated(settings, root, seed, asked.alerts)
            counts = {kind: of.get("train", 0) for kind, of in made.counts.items()}
            print(f"seed {seed}  {made.dataset_id}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
            held += learn(settings, root, made.path, seed)
    print(f"{sum(held)} of {len(held)} got better on held-out feedback")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
