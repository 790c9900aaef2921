"""One DPO step against TRL's DPOTrainer, as it comes and with a precomputed reference.

    python -m tests.bench.dpo_step [--pairs 64] [--repeats 3] [--precision auto] [--device cuda] [--shape 8b]

The same pairs, model, LoRA shape, batch (4 pairs, accumulated 4 times) and arithmetic on all sides, each in a
process of its own, in turn. The model has the proportions of Qwen2.5-0.5B (its head costs 0.38 of its body) at a
fiftieth of the size. Prompts are what agents have, long and of unequal length (log-normal, median 256 tokens);
answers are short (median 32). Time is that of `train()`, from the first step to the last; the reference's pass
before it is printed apart. In fp32 all sides must give the same log-probability for every answer, and the same
gradient.

`--shape 8b` has the shape of Llama 3 8B with random weights in bf16, which a GPU of 80 GB holds. Each side also prints
tokens a second (those of both answers and of the prompt before each), the highest memory on a GPU, and its share of
the rate at which the device multiplies large matrices, by the 4 operations a token and weight that training an adapter
takes; an SFT step on the chosen answers is measured beside them.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TARGETS = {"trl": 6.0, "trl-precomputed": 5.0}
SHAPES = {
    "small": {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 9_400,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
VOCAB = 9_400  # tokens that the pairs are drawn from
LONGEST = 1024
BATCH, ACCUMULATION = 4, 4
CHECKED = 16  # pairs whose log-probabilities are compared
ALLOWED = 1e-4  # nats a sequence, in fp32
ALLOWED_GRADIENT = 1e-3  # of the gradient's length
SIDES = ("ours", *TARGETS, "sft")
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Setting:
    """What is the same on all sides."""

    shape: str
    device: str
    precision: str

    @property
    def gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.device == "cuda"


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


def build_tokenizer(folder: Path) -> None:
    """A tokenizer that only knows how to pad."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)


def build_model(setting: Setting, attention: str) -> Any:
    """The model, with the same random weights in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = SHAPES[setting.shape]
    config = LlamaConfig(max_position_embeddings=2048, pad_token_id=0, attn_implementation=attention, **shape)
    with torch.device(setting.device):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16) if setting.shape == "8b" else model


def make_trainer(side: str, base: Path, pairs: list[Row], setting: Setting, attention: str, *, precompute: bool) -> Any:
    """A trainer on the pairs: ours with a shared prompt, TRL's own, or ours for SFT on the chosen answers."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, PrinterCallback, set_seed
    from trl import DPOConfig, DPOTrainer, SFTConfig

    from train.trainers import DpoTrainer, SftTrainer

    class Peer(DPOTrainer):  # type: ignore[misc]
        """TRL's trainer as it is, but that the rows are token ids already: only steps are compared."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _send_telemetry(self) -> None:
            """Nothing leaves this machine."""

    set_seed(0)
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    common: dict[str, Any] = {
        "output_dir": str(base.parent / side),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 1,
        "learning_rate": 5e-5,
        "max_length": LONGEST,
        "bf16": setting.precision == "bf16",
        "use_cpu": not setting.gpu,
        "gradient_checkpointing": setting.gpu,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if side == "sft":
        kind, more, rows = SftTrainer, {}, [_chosen(pair) for pair in pairs]
        arguments = SFTConfig(**common)
    else:
        kind, rows = DpoTrainer if side == "ours" else Peer, pairs
        more = {"references": None, "shared_prompt": True, "precision": setting.precision} if side == "ours" else {}
        arguments = DPOConfig(**common, loss_type=["sigmoid", "sft"], precompute_ref_log_probs=precompute)
    trainer = kind(
        model=build_model(setting, attention),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora,
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _chosen(pair: Row) -> Row:
    prompt, answer = pair["prompt_ids"], pair["chosen_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def move_adapter(trainer: Any) -> None:
    """Away from its start, where it does nothing and half of its gradients are 0."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(trainer.model.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    trainer.model.eval()


def policy_logps(trainer: Any, rows: list[Row]) -> list[float]:
    """Log-probability of every answer under the policy."""
    import torch

    model, found = trainer.model, []
    if getattr(trainer, "shared_prompt", False):
        from train.shared_prompt import SharedPrompt

        model = SharedPrompt(trainer.model, trainer.attention)
    for start in range(0, len(rows), BATCH):
        batch = trainer._prepare_inputs(trainer.data_collator(rows[start : start + BATCH]))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad():
            out = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
        found += out.log_probs.sum(1).tolist()
    return found


def gradient(trainer: Any) -> list[float]:
    """The gradient of the loss over all pairs: its length, then its product with a few random directions."""
    import torch

    rows = trainer.train_dataset
    for start in range(0, len(rows), BATCH):
        batch = trainer.data_collator([rows[row] for row in range(start, min(start + BATCH, len(rows)))])
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
    moved = [p.grad.flatten().double().cpu() for _, p in sorted(trainer.model.named_parameters()) if p.grad is not None]
    whole, generator = torch.cat(moved), torch.Generator().manual_seed(1)
    directions = (torch.randn(len(whole), generator=generator, dtype=torch.float64) for _ in range(8))
    return [float(whole.norm()), *(float(whole @ direction) for direction in directions)]


def matrix_rate(setting: Setting) -> float:
    """Operations a second of large matrix products in the arithmetic of the steps."""
    import torch

    size = 8192 if setting.gpu else 1024
    kind = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    one = torch.randn(size, size, device=setting.device, dtype=kind)
    best = 0.0
    for _ in range(10):
        _wait(setting)
        begun = time.perf_counter()
        one @ one
        _wait(setting)
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def _wait(setting: Setting) -> None:
    import torch

    if setting.gpu:
        torch.cuda.synchronize()


def measure(side: str, base: Path, pairs: list[Row], setting: Setting, attention: str) -> dict[str, Any]:
    """Train one epoch; seconds of the reference's pass and of the steps, and what they say of the device."""
    import torch

    begun = time.perf_counter()
    trainer = make_trainer(side, base, pairs, setting, attention, precompute=side != "trl")
    built = time.perf_counter()
    trainer.train()
    _wait(setting)
    seconds = time.perf_counter() - built
    prompts = 1 if side == "sft" else 2
    answers = ("chosen_ids",) if side == "sft" else ("chosen_ids", "rejected_ids")
    tokens = sum(prompts * len(pair["prompt_ids"]) + sum(len(pair[name]) for name in answers) for pair in pairs)
    weights = sum(parameter.numel() for parameter in trainer.model.parameters())
    found = {
        "reference_s": built - begun,
        "train_s": seconds,
        "steps": trainer.state.global_step,
        "precision": setting.precision,
        "tokens_per_s": tokens / seconds,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if setting.gpu else 0.0,
        "share": 4 * weights * tokens / seconds / matrix_rate(setting),
    }
    if side == "sft" or setting.shape != "small":
        return found
    exact, checked = replace(setting, precision="fp32"), pairs[:CHECKED]
    compared = make_trainer(side, base, checked, exact, attention, precompute=True)
    move_adapter(compared)
    return {**found, "logps": policy_logps(compared, checked), "gradient": gradient(compared)}


def main() -> int:
    """Run the sides in turn; 1 when they disagree about a log-probability."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--prompt", type=float, default=256, help="median tokens of a prompt")
    parser.add_argument("--answer", type=float, default=32, help="median tokens of an answer")
    parser.add_argument("--attention", default="eager", help="of our side; TRL's is its default, sdpa")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    pairs = make_pairs(asked.pairs, asked.prompt, asked.answer)
    if asked.side:
        from train.device import resolve_device

        attention = asked.attention if asked.side == "ours" else "sdpa"
        setting = Setting(asked.shape, asked.device, resolve_device(asked.device, asked.precision).precision)
        print(json.dumps(measure(asked.side, asked.base, pairs, setting, attention)))
        return 0
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        build_tokenizer(base)
        for _ in range(asked.repeats):
            for side, found in runs.items():
                command = [sys.executable, "-m", "tests.bench.dpo_step", *sys.argv[1:], "--side", side]
                done = subprocess.run([*command, "--base", str(base)], check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
    return report(asked.pairs, runs)


def report(pairs: int, runs: dict[str, list[dict[str, Any]]]) -> int:
    """Print medians, ratios and how far the sides agree."""
    middle = {
        side: {name: statistics.median(run[name] for run in found) for name in found[0] if name not in NO_NUMBERS}
        for side, found in runs.items()
    }
    print(f"steps in {runs['ours'][0]['precision']}")
    for side, found in middle.items():
        memory = f", {found['memory_gb']:.1f} GB" if found["memory_gb"] else ""
        print(
            f"{side:16} median {found['train_s']:7.2f} s for {found['steps']:g} steps, "
            f"{pairs / found['train_s']:7.2f} pairs/s, {found['tokens_per_s']:,.0f} tokens/s, "
            f"{found['share']:.0%} of the matrix rate{memory} "
            f"(set-up and reference pass before: {found['reference_s']:.2f} s)"
        )
    for side, target in TARGETS.items():
        ratio = middle[side]["train_s"] / middle["ours"]["train_s"]
        print(f"ratio to {side}: {ratio:.2f} x (target {target:g} x)")
    first = runs["ours"][0]
    if "logps" not in first:
        return 0
    logps = max(_furthest(first["logps"], runs[side][0]["logps"]) for side in TARGETS)
    length = first["gradient"][0]
    gradients = max(_furthest(first["gradient"], runs[side][0]["gradient"]) for side in TARGETS) / length
    print(f"log-probabilities differ by at most {logps:.1e} nats, gradients by {gradients:.1e} of their length")
    return 1 if logps > ALLOWED or gradients > ALLOWED_GRADIENT else 0


EXACT = ("logps", "gradient")
"""What a side computes in fp32, to be compared."""
NO_NUMBERS = (*EXACT, "precision")


def _furthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    sys.exit(main())
