"""One DPO step against TRL's DPOTrainer, as it comes and with a precomputed reference.

    python -m tests.bench.dpo_step [--pairs 64] [--repeats 3] [--precision bf16]

The same pairs, model, LoRA shape, batch (4 pairs, accumulated 4 times) and arithmetic on all sides, each in a
process of its own, in turn. The model has the proportions of Qwen2.5-0.5B (its head costs 0.38 of its body) at a
fiftieth of the size. Prompts are what agents have, long and of unequal length (log-normal, median 256 tokens);
answers are short (median 32). Time is that of `train()`, from the first step to the last; the reference's pass
before it is printed apart. In fp32 all sides must give the same log-probability for every answer.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGETS = {"trl": 6.0, "trl-precomputed": 5.0}
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
VOCAB = 9_400
LONGEST = 1024
BATCH, ACCUMULATION = 4, 4
CHECKED = 16  # pairs whose log-probabilities are compared
ALLOWED = 1e-4  # nats a sequence, in fp32


def make_pairs(count: int, prompt: float, answer: float, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of random tokens, with log-normal lengths around these medians."""
    rng = random.Random(seed)

    def tokens(median: float, spread: float, most: int) -> list[int]:
        length = min(most, max(4, round(rng.lognormvariate(0, spread) * median)))
        return [rng.randrange(10, VOCAB) for _ in range(length)]

    return [
        {
            "prompt_ids": tokens(prompt, 0.7, LONGEST - 256),
            "chosen_ids": tokens(answer, 0.5, 256),
            "rejected_ids": tokens(answer, 0.5, 256),
        }
        for _ in range(count)
    ]


def build_base(folder: Path) -> None:
    """The model and a tokenizer that only knows how to pad."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=4, max_position_embeddings=2048, pad_token_id=0, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)


def make_trainer(
    side: str, base: Path, pairs: list[dict[str, list[int]]], precision: str, attention: str, *, precompute: bool
) -> Any:
    """A trainer on the pairs: ours with a shared prompt, or TRL's own."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
    from trl import DPOConfig, DPOTrainer

    from train.trainers import DpoTrainer

    class Peer(DPOTrainer):  # type: ignore[misc]
        """TRL's trainer as it is, but that the rows are token ids already: only steps are compared."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _send_telemetry(self) -> None:
            """Nothing leaves this machine."""

    set_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    arguments = DPOConfig(
        output_dir=str(base.parent / side),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=1,
        learning_rate=5e-5,
        loss_type=["sigmoid", "sft"],
        max_length=LONGEST,
        bf16=precision == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        precompute_ref_log_probs=precompute,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    more: dict[str, Any] = {}
    if side == "ours":
        more = {"references": None, "shared_prompt": True, "precision": precision}
    kind = DpoTrainer if side == "ours" else Peer
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list(pairs)
    trainer = kind(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora, **more
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def policy_logps(trainer: Any, rows: list[dict[str, list[int]]]) -> list[float]:
    """Log-probability of every answer under the policy, after its adapter was moved."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(trainer.model.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    model, found = trainer.model.eval(), []
    if getattr(trainer, "shared_prompt", False):
        from train.shared_prompt import SharedPrompt

        model = SharedPrompt(trainer.model, trainer.attention)
    for start in range(0, len(rows), BATCH):
        batch = trainer.data_collator(rows[start : start + BATCH])
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad():
            out = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
        found += out.log_probs.sum(1).tolist()
    return found


def measure(side: str, base: Path, pairs: list[dict[str, list[int]]], precision: str, attention: str) -> dict[str, Any]:
    """Train one epoch; seconds of the reference's pass and of the steps."""
    begun = time.perf_counter()
    trainer = make_trainer(side, base, pairs, precision, attention, precompute=side != "trl")
    built = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - built
    steps = trainer.state.global_step
    checked = pairs[:CHECKED]
    logps = policy_logps(make_trainer(side, base, checked, "fp32", attention, precompute=False), checked)
    return {"reference_s": built - begun, "train_s": seconds, "steps": steps, "logps": logps}


def main() -> int:
    """Run the sides in turn; 1 when they disagree about a log-probability."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--prompt", type=float, default=256, help="median tokens of a prompt")
    parser.add_argument("--answer", type=float, default=32, help="median tokens of an answer")
    parser.add_argument("--attention", default="eager", help="of our side; TRL's is its default, sdpa")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    pairs = make_pairs(asked.pairs, asked.prompt, asked.answer)
    if asked.side:
        attention = asked.attention if asked.side == "ours" else "sdpa"
        print(json.dumps(measure(asked.side, asked.base, pairs, asked.precision, attention)))
        return 0
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ("ours", *TARGETS)}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        build_base(base)
        for _ in range(asked.repeats):
            for side, found in runs.items():
                command = [sys.executable, "-m", "tests.bench.dpo_step", *sys.argv[1:], "--side", side]
                done = subprocess.run([*command, "--base", str(base)], check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
    return report(asked.pairs, runs)


def report(pairs: int, runs: dict[str, list[dict[str, Any]]]) -> int:
    """Print medians and ratios."""
    median = {side: statistics.median(run["train_s"] for run in found) for side, found in runs.items()}
    first = runs["ours"][0]
    worst = 0.0
    for side, found in runs.items():
        difference = max(abs(a - b) for a, b in zip(first["logps"], found[0]["logps"], strict=True))
        worst = max(worst, difference)
        before = statistics.median(run["reference_s"] for run in found)
        print(
            f"{side:16} median {median[side]:7.2f} s for {found[0]['steps']} steps, {pairs / median[side]:7.2f} pairs/s"
            f" (set-up and reference pass before: {before:.2f} s); log-probabilities differ by at most {difference:.1e}"
        )
    for side, target in TARGETS.items():
        print(f"ratio to {side}: {median[side] / median['ours']:.2f} x (target {target:g} x)")
    return 1 if worst > ALLOWED else 0


if __name__ == "__main__":
    sys.exit(main())
