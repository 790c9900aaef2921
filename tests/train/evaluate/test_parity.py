"""A version is rendered with the template it was trained with, or it is not promoted."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConflictError
from cluster.registry import Registry, Version
from cluster.settings import Settings, load_settings
from data.template import template_digest
from tests.datasets import write_feedback_dataset
from tests.serve.engines.models import build_adapter
from tests.train.evaluate.fakes import CASE_SUITES, FakeModel
from tests.train.evaluate.test_run import guesses, knows
from train.evaluate import run
from train.evaluate.evidence import Evidence
from train.evaluate.parity import template_parity
from train.evaluate.types import Model
from train.models import load_tokenizer


@pytest.fixture
def registered(
    mlflow_settings: Settings, toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Settings, Path]:
    """`triage/1` is a real base, `triage/2` an adapter of it with the digest its training recorded."""
    suites = dict.fromkeys(CASE_SUITES, "toy")
    settings = load_settings(home=mlflow_settings.home, evaluation={"not_applicable": suites})[0]
    base = tmp_path / "base"
    shutil.copytree(toy_base, base)
    adapter = build_adapter(base, tmp_path / "adapter", seed=0)
    made = write_feedback_dataset(settings.home / "datasets")
    registry = Registry(settings)
    registry.register_base("triage", base)
    digest = template_digest(load_tokenizer(str(base)))
    registry.register_adapter(
        "triage", adapter, base_model=base, dataset_id=made.dataset_id, lineage={"template_digest": digest}
    )

    @contextmanager
    def opened(settings: Settings, registry: Registry, version: Version) -> Iterator[Model]:
        yield FakeModel(version.id, knows if version.number == 2 else guesses)

    monkeypatch.setattr(run, "open_version", opened)
    return settings, base


def test_unchanged_template_passes(registered: tuple[Settings, Path]) -> None:
    found = run.evaluate(registered[0], "triage/2")
    assert found.passed and {g.suite: g.status for g in found.gates}["template"] == "passed"


def test_a_training_that_recorded_no_template_proves_nothing(make_evidence: Callable[..., Evidence]) -> None:
    made = replace(make_evidence(guesses, guesses), template=None)
    assert template_parity(made).status == "no_data"
    assert template_parity(replace(made, trained=False)).status == "not_applicable"


@pytest.mark.parametrize("change", ["template", "special tokens"])
def test_planted_change_blocks_promotion(change: str, registered: tuple[Settings, Path]) -> None:
    settings, base = registered
    tokenizer = load_tokenizer(str(base))
    if change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("'<|' + message.role", "' <|' + message.role")
    else:
        tokenizer.eos_token = "<|user|>"
    tokenizer.save_pretrained(base)
    found = run.evaluate(settings, "triage/2")
    (gate,) = [gate for gate in found.gates if gate.suite == "template"]
    assert gate.status == "failed" and "trained with" in gate.detail
    assert not found.passed and found.alias is None
    with pytest.raises(ConflictError, match="may not be challenger"):
        Registry(settings).set_alias("triage", "challenger", "triage/2", actor="test", reason="anyway")


def test_a_whole_model_that_was_trained_is_held_to_its_template_and_prompt(
    registered: tuple[Settings, Path], tmp_path: Path
) -> None:
    settings, base = registered
    whole = tmp_path / "whole"
    shutil.copytree(base, whole)
    (whole / "config.json").write_text((whole / "config.json").read_text() + "\n")
    known = Registry(settings).get("triage/2").tags
    lineage = {"rayloop.method": "sft", "prompt_digest": "0" * 64, "template_digest": known["template_digest"]}
    version = Registry(settings).register_base("triage", whole, lineage)
    gates = {gate.suite: gate for gate in run.evaluate(settings, version.id, dataset_ref="latest").gates}
    assert gates["template"].status == "passed"
    assert gates["prompt"].status == "failed"
    assert gates["prompt"].detail == "trained behind 000000000000, served behind no prompt"
