"""What a training refuses, in one line and before anything is left behind."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import DatasetError, InputError
from cluster.settings import Settings
from data.manifest import find_dataset, list_datasets, load_manifest
from tests.serve.engines.models import build_adapter, build_base
from tests.toys import toy_feedback, write_dataset
from train import checkpoint
from train.checkpoint import last_checkpoint
from train.config import TrainConfig
from train.evaluate.truth import read_truths
from train.generate import LocalModel
from train.run import train


def test_qlora_without_a_gpu_is_refused(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.weights='qlora' needs a GPU.*use lora"):
        train(config_of("sft", weights="qlora", device="cpu"))
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_base_is_refused(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", hidden=32)
    adapter = build_adapter(other, tmp_path / "adapter", seed=0)
    with pytest.raises(InputError, match="does not fit base model"):
        train(config_of("sft", init_adapter=str(adapter)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="cannot go on from an adapter"):
        config_of("sft", init_adapter=str(adapter), weights="full")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut off", r"cannot be loaded \(.*header"),
        ("of another shape", r"cannot be loaded \("),
        ("incomplete", r"lacks 9 of its weights \(model\.layers\.1\."),
    ],
)
def test_a_base_that_is_not_whole_is_refused(
    damage: str, message: str, config_of: Callable[..., TrainConfig], toy_base: Path, tmp_path: Path
) -> None:
    base, weights = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    shutil.copytree(toy_base, base)
    if damage == "cut off":
        weights.write_bytes(b"x" * 50)
    elif damage == "incomplete":
        kept = {name: tensor for name, tensor in load_file(weights).items() if "layers.1." not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    else:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    for use in (lambda: train(config_of("sft", base_model=str(base))), lambda: LocalModel(base)):
        with pytest.raises(InputError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", [["query_key_value"], ["q_proj", "query_key_value"]])
def test_layers_that_the_base_has_not_are_refused(
    targets: list[str], config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"'query_key_value' is no linear layer of .*; name some of .*down_proj, .*q_proj"
    ):
        train(config_of("sft", lora={"target_modules": targets}))
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_never_read(config_of: Callable[..., TrainConfig], toy_base: Path, tmp_path: Path) -> None:
    base, adapter = tmp_path / "pickled", build_adapter(toy_base, tmp_path / "adapter", seed=0)
    shutil.copytree(toy_base, base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot be loaded .*no file named model\.safetensors"):
        train(config_of("sft", base_model=str(base)))
    with pytest.raises(InputError, match=r"cannot be loaded .*no file named model\.safetensors"):
        LocalModel(base)
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    for use in (lambda: train(config_of("sft", init_adapter=str(adapter))), lambda: LocalModel(toy_base, adapter)):
        with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
            use()


def test_an_adapter_of_a_rank_that_no_engine_loads_is_refused(
    config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1024}))
    with pytest.raises(InputError, match=r"init_adapter=1024 is over engine\.max_rank"):
        config_of("sft", init_adapter=str(tmp_path))
    config_of("sft", weights="full", lora={"r": 512})
    config_of("reward", lora={"r": 512})
    with pytest.raises(InputError, match=r"training\.lora\.r=512 is over engine\.max_rank"):
        config_of("sft", lora={"r": 512})


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


@pytest.mark.parametrize("cell", ["not json", "[]", '{"role": "user"}', "[1, 2]", "[null]"])
def test_example_that_is_no_conversation_is_named(
    cell: str, config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    rows = toy_feedback(20)
    rows["sft"][3]["messages"] = cell
    folder = write_dataset(tmp_path / "data", rows)
    with pytest.raises(DatasetError, match="example 'e00003' is not a conversation"):
        train(config_of("sft", dataset=folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": 5}', '{"schema_version": 4}'])
def test_a_damaged_manifest_is_named_and_hides_no_other_dataset(text: str, settings: Settings) -> None:
    root = settings.home / "datasets"
    good, bad = (write_dataset(root / name, toy_feedback(8)) for name in ("good", "bad"))
    (bad / "manifest.json").write_text(text)
    with pytest.raises(DatasetError, match=r"bad/manifest\.json (is damaged|has schema)"):
        load_manifest(bad)
    assert find_dataset(settings, "latest") == find_dataset(settings, "good") == good
    with pytest.raises(DatasetError):  # an erasure must see them all
        list_datasets(settings)


def test_out_that_cannot_be_written_is_refused(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train(config_of("sft", max_steps=1, out=tmp_path / "file" / "out"))


def test_run_that_costs_too_much_is_refused_before_it_starts(config_of: Callable[..., TrainConfig]) -> None:
    with pytest.raises(InputError, match=r"exceeds training\.limits\.max_epochs"):
        config_of("sft", epochs=1000)


def test_disk_full_during_a_checkpoint_keeps_the_one_before(
    config_of: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("sft", epochs=3, save_steps=2)
    real, written = checkpoint.save_file, []

    def fill_up(tensors: object, file: Path, *rest: object, **named: object) -> None:
        if file.name == checkpoint.OPTIMIZER:
            written.append(file)
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(file))
        real(tensors, file, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_file", fill_up)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        train(config)
    left = last_checkpoint(config.out / "checkpoints")
    assert left is not None and left.name == "step-00000002"
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == [left.name]
    monkeypatch.undo()
    assert train(config, resume_from=left).steps == 18


@pytest.mark.parametrize("cell", [None, "not json", "[]", "[1]", "5"])
def test_recorded_answer_that_is_no_conversation_is_named_before_anything_is_judged_by_it(
    cell: str | None, tmp_path: Path
) -> None:
    rows = toy_feedback(20)
    rows["sft"][17]["messages"] = cell
    folder = write_dataset(tmp_path / "data", rows)
    with pytest.raises(DatasetError, match="example 'e00017': `messages` holds no messages; curate the dataset again"):
        read_truths(folder, split="validation", limit=10)
