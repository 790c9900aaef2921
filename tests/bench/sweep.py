"""A sweep of 16 configurations against Ray Tune with one function trainable a trial.

    python -m tests.bench.sweep [--trials 16] [--epochs 3] [--rungs 3] [--reduction 4]

Both draw the same configurations from the same space, train DPO on the same toy feedback and judge by the same
measurement, two trials at a time. The peer is what Ray's documentation shows: a function that trains and reports,
a process for each trial, all trials to their end. Ours is `rayloop tune run`: actors that stay, token ids, reference
log-probabilities and the compared model shared, successive halving. Each side starts its own cluster, in its own
process. The same configuration must win, and a trial that both ran to its end must have the same losses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 5.0
CONCURRENCY, CPUS = 2, 4
LOSS, VALIDATION = "loss.json", "validation/loss"
ALLOWED = 1e-6


def settings_of(root: Path, asked: argparse.Namespace, side: str) -> Any:
    """The settings of both sides, each with a home of its own."""
    from cluster.settings import load_settings

    training = {"batch_size": 16, "gradient_accumulation": 1, "warmup_steps": 5}
    training |= {"dpo": {"learning_rate": 2e-3, "epochs": asked.epochs}, "seed": 1}
    sweep = {"trials": asked.trials, "concurrency": CONCURRENCY, "learning_rate_spread": 300.0, "kl_limit": 0.2}
    sweep |= {"rungs": asked.rungs, "reduction": asked.reduction, "validation_prompts": 64, "kl_samples": 1}
    return load_settings(
        home=root / side,
        training=training,
        sweep=sweep,
        evaluation={"max_new_tokens": 32},
        storage={"datasets": str(root / "datasets")},
        ray={"num_cpus": CPUS},
    )[0]


def build(root: Path) -> None:
    """A toy base and people's feedback on it."""
    from cluster.settings.training import ToySettings
    from tests.datasets import write_feedback_dataset
    from tests.toys import toy_examples
    from train.toy import build_toy_base

    shape = ToySettings(vocab=400, epochs=4, hidden=128, layers=4)
    build_toy_base(root / "base", toy_examples(1000, seed=1, outdated=0.8), shape)
    write_feedback_dataset(root / "datasets", users=120)


def ours(root: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """`rayloop tune run`, in this process."""
    from tune.spec import new_sweep
    from tune.sweep import run_sweep

    settings = settings_of(root, asked, "ours")
    found = run_sweep(settings, new_sweep(settings, method="dpo", dataset="latest", base=str(root / "base")))
    return [{**trial, "adapter": trial["adapter_dir"]} for trial in found.to_json()["trials"]]


def peer(root: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Ray Tune, one function trainable a trial."""
    import ray.tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from cluster.runtime import ray_session
    from tune.objective import load_start
    from tune.space import to_ray
    from tune.spec import new_sweep
    from tune.sweep import make_plan, pin

    settings = settings_of(root, asked, "peer")
    sweep = pin(
        settings, new_sweep(settings, method="dpo", dataset="latest", base=str(root / "base"), scheduler="none")
    )
    plan, first = make_plan(settings, sweep, Path(sweep.dataset))
    answers = load_start(plan.target, plan.threads).answers

    def trial(config: dict[str, Any]) -> None:
        from train.config import TrainConfig
        from train.generate import LocalModel
        from train.run import train
        from tune.objective import Start, measure

        out = Path(plan.folder) / ray.tune.get_context().get_trial_id()
        result = train(TrainConfig(**{**plan.train_config, **config, "out": out, "reference_cache": None}))
        start = Start(LocalModel(plan.target.base_model, None, threads=plan.threads), answers)
        found = measure(plan.target, str(result.adapter_dir), start, plan.threads)
        ray.tune.report({"value": found.value, "cost": found.cost, "adapter": str(result.adapter_dir)})

    with ray_session(settings):
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(trial, {"cpu": settings.sweep.cpus_per_trial}),
            param_space=to_ray(sweep.space),
            tune_config=ray.tune.TuneConfig(
                metric="value",
                mode="max",
                num_samples=asked.trials,
                search_alg=BasicVariantGenerator([first], max_concurrent=CONCURRENCY, random_state=settings.sweep.seed),
            ),
            run_config=ray.tune.RunConfig(name="peer", storage_path=str(root / "results"), verbose=0),
        )
        results = tuner.fit()
    return [{**result.metrics, "config": result.config, "status": "completed"} for result in results]


def outcome(trials: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Who won, and what each finished trial's training and validation losses were, by configuration."""
    done = [trial for trial in trials if trial["status"] == "completed" and trial.get("value") is not None]
    within = [trial for trial in done if trial["cost"] <= limit] or done
    best = max(within, key=lambda trial: (trial["value"], -trial["cost"]))
    losses = {}
    for trial in done:
        metrics = json.loads((Path(trial["adapter"]).parent / "result.json").read_text())["metrics"]
        losses[key_of(trial["config"])] = [metrics["train_loss"], metrics[VALIDATION], trial["value"], trial["cost"]]
    return {"winner": key_of(best["config"]), "losses": losses, "values": [t["value"] for t in done]}


def key_of(config: dict[str, Any]) -> str:
    """A configuration as text."""
    return json.dumps({name: round(value, 12) for name, value in sorted(config.items())})


def main() -> int:
    """Run both sides; 1 when they disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rungs", type=int, default=3)
    parser.add_argument("--reduction", type=float, default=4)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        begun = time.perf_counter()
        trials = {"ours": ours, "peer": peer}[asked.side](asked.root, asked)
        seconds = time.perf_counter() - begun
        found = outcome(trials, settings_of(asked.root, asked, asked.side).sweep.kl_limit)
        print(json.dumps({"seconds": seconds, **found}))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        for side in ("ours", "peer"):
            command = [sys.executable, "-m", "tests.bench.sweep", *sys.argv[1:], "--side", side, "--root", folder]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found[side] = json.loads(done.stdout.splitlines()[-1])
    return report(found)


def report(found: dict[str, dict[str, Any]]) -> int:
    """Print times, ratio, winners and how far the losses of trials that both finished differ."""
    for side, result in found.items():
        print(f"{side:5} {result['seconds']:7.1f} s   {len(result['losses'])} trials to the end   {result['winner']}")
    ratio = found["peer"]["seconds"] / found["ours"]["seconds"]
    own, theirs = found["ours"]["losses"], found["peer"]["losses"]
    shared = sorted(set(own) & set(theirs))
    worst = max((abs(a - b) for key in shared for a, b in zip(own[key], theirs[key], strict=True)), default=0.0)
    same = found["ours"]["winner"] == found["peer"]["winner"]
    print(f"ratio {ratio:.1f} x (target {TARGET:g} x); the same winner: {same}")
    print(f"{len(shared)} trials that both finished; their losses and measurements differ by at most {worst:.1e}")
    return 0 if same and shared and worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
