import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import ConflictError, HealthGateError
from cluster.model_files import adapter_digest, describe_base
from cluster.settings import load_settings
from data.template import render_pair
from tests.toys import toy_feedback, write_dataset
from train import checkpoint
from train.checkpoint import last_checkpoint
from train.config import TrainConfig, resolve_config
from train.examples import Encoder, read_data, with_kl_completions
from train.files import own_folder
from train.generate import LocalModel
from train.models import load_tokenizer
from train.run import build_trainer, prepare, train

UNLOOKED: dict[str, object] = {"report_examples": 0, "health": {"length_samples": 0}}
"""For runs whose weights alone are compared: no report on held-out feedback, no sampled answers."""


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_each_method_improves_its_own_objective_on_held_out_feedback(
    method: str, config_of: Callable[..., TrainConfig]
) -> None:
    result = train(config_of(method, epochs=4))
    metrics = result.metrics
    if method == "sft":
        assert metrics["heldout/liked_nats_per_token"] < 0.8 * metrics["heldout/base_liked_nats_per_token"]
    if method == "dpo":
        assert metrics["heldout/pair_dpo_loss"] < 0.68  # ln 2 is the base's
        assert metrics["heldout/pair_accuracy"] > 0.7
    if method == "kto":
        assert metrics["validation/rewards/chosen"] > metrics["validation/rewards/rejected"] + 0.05
    assert result.adapter_sha256 == adapter_digest(result.adapter_dir)
    assert metrics["heldout/kl_to_base"] > 0


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "grpo"])
def test_same_seed_same_adapter_another_seed_another(
    method: str, config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    digests = [
        train(config_of(method, **UNLOOKED, max_steps=3, seed=seed, out=tmp_path / str(n))).adapter_sha256
        for n, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_trainer_reads_the_same_ids_as_the_engine(toy_base: Path, toy_dataset: Path) -> None:
    tokenizer = load_tokenizer(str(toy_base))
    table = read_data(toy_dataset, "preference").train
    row, ids = table.to_pylist()[0], Encoder(tokenizer, 256).preference(table).rows[0]
    prompt, chosen = render_pair(tokenizer, json.loads(row["prompt"]), json.loads(row["chosen"]))
    assert (ids["prompt_ids"], ids["chosen_ids"]) == (prompt, chosen)
    assert chosen[-1] == tokenizer.eos_token_id


def test_a_run_reads_rows_by_their_weight(config_of: Callable[..., TrainConfig], toy_dataset: Path) -> None:
    data = read_data(toy_dataset, "sft")
    capped = [0.1 if n % 2 else 1.0 for n in range(data.train.num_rows)]
    table = data.train.set_column(data.train.column_names.index("weight"), "weight", [capped])
    read = [prepare(config_of("sft", seed=seed), replace(data, train=table)).data.train for seed in (0, 0, 1)]
    assert read[0].equals(read[1]) and not read[0].equals(read[2])
    assert read[0]["weight"].to_pylist().count(1.0) == capped.count(1.0)
    assert 0 < read[0]["weight"].to_pylist().count(0.1) < 0.3 * capped.count(0.1)


def test_sft_learns_from_the_judged_answer_alone(toy_base: Path) -> None:
    tokenizer = load_tokenizer(str(toy_base))
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "unjudged"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "judged"},
    ]
    row = {"messages": json.dumps(chat), "tools": None}
    for loss, learned in (("answer", "judged<|end|>"), ("assistant", "unjudged<|end|>judged<|end|>")):
        encoded, _, _ = Encoder(tokenizer, 256, loss)._sft_row(row)
        assert tokenizer.decode([label for label in encoded["labels"] if label != -100]) == learned


def test_kl_completions_come_from_the_same_batch() -> None:
    rows = with_kl_completions([{"completion_ids": [n]} for n in range(5)], 3)
    assert [row["KL_completion_ids"][0] for row in rows] == [2, 0, 1, 4, 3]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("sft", {}),
        ("kto", {}),
        ("reward", {}),
        ("grpo", {"batch_size": 64}),
        ("dpo", {"weights": "full", "learning_rate": 1e-4, "shared_prompt": True}),
    ],
)
def test_interrupted_training_resumes_to_the_same_weights(
    method: str, more: dict[str, object], config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    class Stop:
        def progress(self, step: int, steps: int, values: object) -> None:
            if step == 6:
                raise KeyboardInterrupt

        def checkpoint(self, folder: Path, step: int) -> None:
            """Nothing."""

    shape = {"max_steps": 9, "epochs": 3, "save_steps": 4, "eval_steps": 2, **UNLOOKED, **more}
    undisturbed = train(config_of(method, **shape, out=tmp_path / "whole"))
    config = config_of(method, **shape, out=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train(config, reporter=Stop())
    assert [path.name for path in config.out.iterdir()] == ["checkpoints"]
    found = last_checkpoint(config.out / "checkpoints")
    assert found is not None
    resumed = train(config, resume_from=found)
    assert resumed.adapter_sha256 == undisturbed.adapter_sha256
    assert resumed.metrics["best_step"] == undisturbed.metrics["best_step"]


def test_a_run_goes_on_from_the_checkpoint_of_another_with_a_rate_of_its_own(
    config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    class Stop:
        def progress(self, step: int, steps: int, values: object) -> None:
            """Nothing."""

        def checkpoint(self, folder: Path, step: int) -> None:
            raise KeyboardInterrupt

    shape: dict[str, Any] = {"max_steps": 6, "epochs": 3, "save_steps": 4, "schedule": "constant", **UNLOOKED}
    first = config_of("sft", **shape, out=tmp_path / "first")
    with pytest.raises(KeyboardInterrupt):
        train(first, reporter=Stop())
    found = last_checkpoint(first.out / "checkpoints")
    assert found is not None
    second = config_of("sft", **shape, out=tmp_path / "second", learning_rate=first.learning_rate / 4)
    adopted = checkpoint.adopt(found, second.out / "checkpoints", prepare(second).digest, second.learning_rate)
    name = "adapter_model.safetensors"
    assert (adopted / name).read_bytes() == (found / name).read_bytes()
    result = train(second, resume_from=adopted)
    assert result.steps == 6 and result.metrics["learning_rate"] == pytest.approx(second.learning_rate)


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import train.run
from train.config import TrainConfig

write = train.run.write_result

def die(folder, *rest):
    write(folder, *rest)
    os.kill(os.getpid(), signal.SIGKILL)

train.run.write_result = die
train.run.train(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))
"""


@pytest.mark.slow
def test_training_killed_while_it_writes_its_result_resumes_to_the_same_adapter(
    config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """`tests/bench/resume_kills.py` kills at any moment."""
    shape = {"max_steps": 3, "save_steps": 2, **UNLOOKED}
    undisturbed = train(config_of("sft", **shape, out=tmp_path / "whole"))
    config = config_of("sft", **shape, out=tmp_path / "killed")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / "config.json")], env=environment
    )
    assert process.returncode == -signal.SIGKILL
    left = sorted(path.name for path in config.out.iterdir())
    assert len(left) == 2 and left[0].startswith(".adapter.scratch-") and left[1] == "checkpoints"
    found = last_checkpoint(config.out / "checkpoints")
    assert found is not None and found.name == "step-00000002"
    assert train(config, resume_from=found).adapter_sha256 == undisturbed.adapter_sha256
    assert sorted(path.name for path in config.out.iterdir()) == ["adapter", "result.json"]


def test_resume_refuses_another_configuration(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    class Stop:
        def progress(self, step: int, steps: int, values: object) -> None:
            """Nothing."""

        def checkpoint(self, folder: Path, step: int) -> None:
            raise KeyboardInterrupt

    config = config_of("sft")
    with pytest.raises(KeyboardInterrupt):
        train(config, reporter=Stop())
    folder = last_checkpoint(config.out / "checkpoints")
    assert folder is not None
    assert not list(folder.glob("*.pt*")) and not list(folder.glob("*.bin"))
    assert {"best_loss", "health", "scaler"} <= json.loads((folder / "state.json").read_text()).keys()
    with pytest.raises(ConflictError, match="another configuration"):
        train(config_of("sft", learning_rate=1e-4), resume_from=folder)


def test_a_candidate_can_start_from_the_champions_adapter(
    config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    first = train(config_of("sft", max_steps=4, out=tmp_path / "first"))
    second = train(config_of("dpo", max_steps=2, init_adapter=str(first.adapter_dir), out=tmp_path / "second"))
    names = load_file(second.adapter_dir / "adapter_model.safetensors")
    assert set(names) == set(load_file(first.adapter_dir / "adapter_model.safetensors"))
    assert second.adapter_sha256 != first.adapter_sha256


@pytest.mark.parametrize(("method", "rate"), [("sft", 2e-3), ("dpo", 5e-4)])
def test_full_fine_tuning_moves_all_weights_and_leaves_a_whole_model(
    method: str, rate: float, config_of: Callable[..., TrainConfig], toy_base: Path
) -> None:
    result = train(config_of(method, weights="full", learning_rate=rate, max_steps=10))
    assert result.adapter_dir.name == "model" and not (result.adapter_dir.parent / "adapter").exists()
    before, after = load_file(toy_base / "model.safetensors"), load_file(result.adapter_dir / "model.safetensors")
    assert set(after) == set(before) and not any(torch.equal(after[name], before[name]) for name in before)
    assert result.adapter_sha256 == describe_base(result.adapter_dir)[1].removeprefix("sha256:")
    metrics = result.metrics
    assert metrics["heldout/kl_to_base"] > 0
    if method == "sft":
        answers = LocalModel(result.adapter_dir).logprobs([[{"role": "user", "content": "a"}]], ["b"])
        assert answers[0].total < 0
        assert metrics["heldout/liked_nats_per_token"] < metrics["heldout/base_liked_nats_per_token"]
    else:
        assert metrics["heldout/pair_dpo_loss"] < math.log(2)


def test_full_fine_tuning_takes_rates_of_its_own(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    settings, _ = load_settings(home=tmp_path)
    common = {"base_model": "o/m", "dataset": tmp_path, "out": tmp_path}
    assert resolve_config(settings, "dpo", weights="full", **common).learning_rate == 5e-7
    assert resolve_config(settings, "dpo", **common).learning_rate == 5e-5
    assert resolve_config(settings, "dpo", weights="full", learning_rate=1e-4, **common).learning_rate == 1e-4
    sizes = [
        resolve_config(settings, m, weights=w, **common).batch_size for m in ("dpo", "sft") for w in ("full", "lora")
    ]
    assert sizes == [2, 4, 4, 4]
    assert resolve_config(settings, "dpo", weights="full", batch_size=3, **common).batch_size == 3


def test_learning_rate_that_does_nothing_is_noticed(config_of: Callable[..., TrainConfig]) -> None:
    result = train(config_of("sft", learning_rate=1e-9, max_steps=2))
    assert any("hardly does anything" in warning for warning in result.warnings)


def test_swapped_pairs_stop_the_run(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    rows = toy_feedback(40)
    rows["preference"] = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows["preference"]]
    folder = write_dataset(tmp_path / "swapped", rows)
    with pytest.raises(HealthGateError, match="pairs are swapped: in 100%"):
        train(config_of("dpo", dataset=folder))


def test_truncated_examples_stop_the_run(config_of: Callable[..., TrainConfig]) -> None:
    with pytest.raises(HealthGateError, match="do not fit max_length=16"):
        train(config_of("sft", max_length=16))


def test_collapse_of_both_answers_stops_the_run_and_the_sft_term_prevents_it(
    config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Pairs of nearly the same text: plain DPO pushes both down to part them (Razin et al. 2024, 2410.08847)."""
    rows = toy_feedback(160)
    for row in rows["preference"]:
        (answer,) = json.loads(row["chosen"])
        chosen, rejected = ({**answer, "content": answer["content"] + end} for end in ("!", "!!"))
        row |= {"chosen": json.dumps([chosen]), "rejected": json.dumps([rejected])}
    folder = write_dataset(tmp_path / "alike", {**rows, "sft": []})
    health = {"window_steps": 3, "collapse_nats_per_token": 0.2, "length_samples": 0}
    shape = {"dataset": folder, "learning_rate": 2e-2, "epochs": 4, "health": health}
    with pytest.raises(HealthGateError, match=r"lost .* nats a token by step .* while the margin grew"):
        train(config_of("dpo", **shape, sft_weight=0.0))
    train(config_of("dpo", **shape, sft_weight=1.0, out=tmp_path / "with-sft"))


def test_answers_that_grow_long_stop_the_run(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Training on rambling answers, judged beside short ones."""
    rows = toy_feedback(160)
    for row in rows["sft"][:120]:
        prompt, answer = json.loads(row["messages"])
        row["messages"] = json.dumps([prompt, {**answer, "content": answer["content"] + " and" * 12}])
    folder = write_dataset(tmp_path / "rambling", rows)
    config = config_of("sft", dataset=folder, epochs=8, learning_rate=1e-2)
    prepared = prepare(config)
    short = replace(prepared, rows=replace(prepared.rows, lengths=prepared.validation.lengths))
    with own_folder(config.out), pytest.raises(HealthGateError, match="answers drifted to"):
        build_trainer(short, None).train()


def test_loss_that_is_no_number_stops_the_run(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(HealthGateError, match=r"is (nan|inf) at step"):
        train(config_of("sft", learning_rate=1.0, max_grad_norm=1e30, weight_decay=1e30, precision="fp32", epochs=4))
    assert not (tmp_path / "out" / "adapter").exists()


def test_run_that_changes_nothing_is_an_error(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(HealthGateError, match="training changed nothing"):
        train(config_of("sft", learning_rate=1e-60, weight_decay=0.0, max_steps=2))
    assert not (tmp_path / "out" / "adapter").exists()
