"""Every way an adapter can be wrong is refused with its reason, and the engine goes on."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.engines.adapter_files import read_adapter
from serve.engines.adapter_source import AdapterError
from serve.engines.generation import SamplingParams
from serve.engines.local import LocalEngine
from train.canary import write_canary


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def append_bytes(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b"extra")


def break_numbers(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, file)


def drop_a_matrix(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors[next(key for key in tensors if "lora_B" in key)]
    safetensors.torch.save_file(tensors, file)


def other_shapes(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {
        k: torch.randn(v.shape[0], 64) if "lora_A" in k else v for k, v in safetensors.torch.load_file(file).items()
    }
    safetensors.torch.save_file(tensors, file)


def other_layers(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {k.replace("layers.0", "layers.9"): v for k, v in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file)


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (shutil.rmtree, "does not exist"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model.safetensors does not exist"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    (lambda f: edit_config(f, peft_type="IA3"), "does not describe a LoRA"),
    (lambda f: edit_config(f, use_dora=True), "uses use_dora"),
    (lambda f: edit_config(f, bias="all"), "uses bias"),
    (lambda f: edit_config(f, r=4096), "rank 4096 is over"),
    (lambda f: edit_config(f, r=None), "has no rank"),
    (truncate, "is truncated"),
    (cut_header, "is truncated"),
    (append_bytes, "longer than its header says"),
    (break_numbers, "not finite"),
    (drop_a_matrix, "only one of its two matrices"),
    (other_shapes, "made for another base model"),
    (other_layers, "does not have as a linear layer"),
]


@pytest.mark.parametrize(("damage", "reason"), WRONG)
def test_wrong_adapter_is_refused_with_its_reason(
    engine: LocalEngine,
    adapters: dict[str, Path],
    tmp_path: Path,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["red"], folder)
    damage(folder)
    before = [m.name for m in engine.models()]
    with pytest.raises(AdapterError, match=reason):
        engine.load_adapter("wrong", folder)
    assert [m.name for m in engine.models()] == before

    async def ask() -> list[object]:
        return [u.error async for u in engine.generate("red", [5, 6, 7], SamplingParams(max_tokens=2))]

    assert asyncio.run(ask()) == [None]


def test_adapter_over_rank_in_its_weights_is_refused(engine: LocalEngine, make_adapter, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "wide", seed=1, rank=80)
    edit_config(folder, r=4)
    with pytest.raises(AdapterError, match=r"rank 80 at .* is over the engine's 64"):
        engine.load_adapter("wide", folder)


def test_adapter_that_does_nothing_fails_its_canary(engine: LocalEngine, make_adapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="it changes nothing"):
        engine.load_adapter("idle", make_adapter(tmp_path / "idle", seed=1, zero=True))


def test_adapter_is_held_to_what_its_training_found(
    engine: LocalEngine, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(adapters["red"], folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    write_canary(folder, model, AutoTokenizer.from_pretrained(base))
    engine.load_adapter("trained", folder)
    engine.unload_adapter("trained")
    edit_config(folder, lora_alpha=json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] * 20)
    with pytest.raises(AdapterError, match=r"not as it was trained: log-probs .* nats a token"):
        engine.load_adapter("trained", folder)
    (folder / "canary.json").write_text('[{"ids": [1, 2]}]')
    with pytest.raises(AdapterError, match=r"canary\.json does not hold"):
        engine.load_adapter("trained", folder)


def test_adapter_with_another_digest_is_refused(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    with pytest.raises(AdapterError, match="the registry recorded 00ff"):
        engine.load_adapter("red-again", adapters["red"], expected_sha256="00ff")


def test_rank_and_alpha_patterns_scale_as_in_peft(base: Path, make_adapter, tmp_path: Path) -> None:
    folder = make_adapter(
        tmp_path / "patterns",
        seed=1,
        rank=4,
        rank_pattern={"q_proj": 8},
        alpha_pattern={"v_proj": 1},
        use_rslora=True,
    )
    files = read_adapter(folder, max_rank=64)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    for name, pair in files.pairs.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(pair.b @ pair.a, layer.get_delta_weight("default"))
    assert files.rank == 8
