import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cluster.errors import ConflictError, DatasetError, HealthGateError, InputError
from cluster.registry import adapter_digest
from data.template import render_pair
from tests.toys import toy_feedback, write_dataset
from train.checkpoint import last_checkpoint
from train.config import TrainConfig
from train.examples import Encoder, read_data, with_kl_completions
from train.run import load_tokenizer, train


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


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_same_seed_same_adapter_another_seed_another(
    method: str, config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    digests = [
        train(config_of(method, max_steps=3, seed=seed, out=tmp_path / str(n))).adapter_sha256
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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_training_killed_half_way_resumes_to_the_same_adapter(
    method: str, config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """A process is ended with SIGKILL after a checkpoint in mid-epoch; another goes on."""
    undisturbed = train(config_of(method, epochs=3, save_steps=4, eval_steps=2, out=tmp_path / "whole"))
    config = config_of(method, epochs=3, save_steps=4, eval_steps=2, out=tmp_path / "killed")
    _train_and_kill(config, tmp_path)
    found = last_checkpoint(config.out / "checkpoints")
    assert found is not None and not (config.out / "adapter").exists()
    resumed = train(config, resume_from=found)
    assert resumed.adapter_sha256 == undisturbed.adapter_sha256
    assert resumed.metrics["best_step"] == undisturbed.metrics["best_step"]


KILLED = """
import sys, time
from pathlib import Path
from train.config import TrainConfig
from train.run import train

class Stall:
    def progress(self, step, steps, values):
        if step > 5:
            time.sleep(600)
    def checkpoint(self, folder, step):
        print(step, flush=True)

train(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()), reporter=Stall())
"""


def _train_and_kill(config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(file)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "4"
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


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
    assert "best_loss" in json.loads((folder / "state.json").read_text())
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


def test_missing_base_model_leaves_nothing_behind(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        train(config_of("sft", base_model=str(tmp_path / "nowhere")))
    assert not (tmp_path / "out").exists()


def test_gpu_where_there_is_none_is_one_clear_line(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no GPU here; use a node with one"):
        train(config_of("sft", device="cuda"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("sft", {"sft": []}, "has no sft examples"),
        ("dpo", {"preference": []}, "has no preference examples"),
        ("kto", {"unpaired": "liked"}, "one-sided.*no disliked"),
    ],
)
def test_empty_and_one_sided_datasets_are_refused(
    method: str, change: dict[str, object], message: str, config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    rows = toy_feedback(20)
    if change.get("unpaired") == "liked":
        change = {"unpaired": [row for row in rows["unpaired"] if row["label"]]}
    folder = write_dataset(tmp_path / "data", {**rows, **change})  # type: ignore[dict-item]
    with pytest.raises(DatasetError, match=message):
        train(config_of(method, dataset=folder))


def test_out_that_cannot_be_written_is_refused(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train(config_of("sft", max_steps=1, out=tmp_path / "file" / "out"))


def test_run_that_costs_too_much_is_refused_before_it_starts(config_of: Callable[..., TrainConfig]) -> None:
    with pytest.raises(InputError, match=r"exceeds training\.limits\.max_epochs"):
        config_of("sft", epochs=1000)


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
