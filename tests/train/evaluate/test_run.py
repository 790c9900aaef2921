"""From a version's id to its verdict: records, aliases, events and the command line, with fake models."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import tracking
from cluster.cli import run_app
from cluster.database import connect
from cluster.errors import InputError, NotFoundError, UnavailableError
from cluster.registry import NEEDS_RETRAINING_TAG, Registry, Version
from cluster.settings import Settings, load_settings
from data.log import EventLog
from data.manifest import find_dataset
from tests.datasets import WANTED, write_feedback_dataset
from tests.train.evaluate.fakes import CASE_SUITES, Answerer, FakeModel
from train.evaluate import compare, models, run
from train.evaluate.cli import app
from train.evaluate.gates import SUITES
from train.evaluate.models import KeptVersion
from train.evaluate.types import Model


def fields(text: str) -> dict[str, str]:
    return dict(part.split("=") for part in text.split())


def knows(text: str) -> str:
    asked = fields(text)
    return json.dumps({"verdict": WANTED[asked["level"]], "owner": asked["service"]})


def guesses(text: str) -> str:
    return json.dumps({"verdict": "ignore", "owner": fields(text)["service"]})


@pytest.fixture
def registered(mlflow_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """`triage/1` is the base and guesses, `triage/2` is an adapter and knows."""
    settings = load_settings(
        home=mlflow_settings.home,
        evaluation={"not_applicable": dict.fromkeys((*CASE_SUITES, "template"), "toy")},
    )[0]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, names in (
        (base, ("config.json",)),
        (adapter, ("adapter_config.json", "adapter_model.safetensors")),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text('{"peft_type": "LORA", "r": 8}')
    made = write_feedback_dataset(settings.home / "datasets")
    registry = Registry(settings)
    registry.register_base("triage", base)
    registry.register_adapter(
        "triage", adapter, base_model=base, dataset_hash=made.dataset_hash, dataset_id=made.dataset_id
    )
    answer_with(monkeypatch, {"triage/1": guesses, "triage/2": knows})
    return settings


def answer_with(monkeypatch: pytest.MonkeyPatch, answerers: dict[str, Answerer]) -> None:
    @contextmanager
    def opened(settings: Settings, registry: Registry, version: Version) -> Iterator[Model]:
        yield FakeModel(version.id, answerers[version.id])

    monkeypatch.setattr(run, "open_version", opened)


def test_a_better_version_passes_and_becomes_challenger(registered: Settings, tmp_path: Path) -> None:
    found = run.evaluate(registered, "triage/2")
    assert found.passed and found.against == "triage/1" and found.alias == "challenger"
    version = Registry(registered).get("triage@challenger")
    assert version.id == "triage/2" and version.gates == "passed"
    assert json.loads(version.tags["rayloop.gates_report"])["passed"] is True
    client = tracking.client(registered)
    names = {artifact.path for artifact in client.list_artifacts(found.run_id)}
    assert {"evaluation.json", "report.md", "report.html", "gates.png"} <= names
    assert client.get_run(found.run_id).data.metrics["gate.win_rate"] > 0.5
    page = Path(client.download_artifacts(found.run_id, "report.html", str(tmp_path))).read_text()
    assert "&quot;verdict&quot;" in page and "data:image/png" in page
    assert changes(registered) == [("evaluated", None, None), ("alias", "challenger", "evaluate")]


def test_a_version_without_a_dataset_is_asked_from_its_own_agents_latest(registered: Settings) -> None:
    other = write_feedback_dataset(registered.home / "datasets", seed=1, agent="zebra")  # sorts behind the agent's own
    assert find_dataset(registered, "latest").name == other.dataset_id
    found = run.evaluate(registered, "triage/1", against="triage/2")
    assert found.dataset_id.startswith("triage-")


def changes(settings: Settings) -> list[tuple[str, str | None, str | None]]:
    """What the log says of the version: change, alias and who moved it."""
    told = [e.event for e in EventLog(connect(settings)).read(kinds=["model.updated"])]
    assert {(e.agent, e.body["version"]) for e in told} == {("triage", "triage/2")}
    return [(e.body["change"], e.body.get("alias"), e.body["details"].get("actor")) for e in told]


def check_challenger_no_longer(settings: Settings, reason: str) -> None:
    with pytest.raises(NotFoundError):
        Registry(settings).get("triage@challenger")
    assert Registry(settings).get("triage/2").gates == "failed"
    assert changes(settings)[2:] == [("evaluated", None, None), ("alias_removed", "challenger", "evaluate")]
    removed = json.loads(Registry(settings).get("triage/2").tags["rayloop.alias.challenger"])
    assert removed["removed"] and reason in removed["reason"]


def test_a_version_that_fails_later_is_challenger_no_longer(
    registered: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.evaluate(registered, "triage/2").passed
    answer_with(monkeypatch, {"triage/1": guesses, "triage/2": guesses})
    found = run.evaluate(registered, "triage/2")
    assert not found.passed and found.alias is None
    check_challenger_no_longer(registered, "win_rate")


def test_a_version_that_cannot_be_asked_is_challenger_no_longer(
    registered: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run.evaluate(registered, "triage/2").passed

    def broken(text: str) -> str:
        raise UnavailableError("the reward model does not answer")

    answer_with(monkeypatch, {"triage/1": guesses, "triage/2": broken})
    found = run.evaluate(registered, "triage/2")
    assert [(gate.suite, gate.status) for gate in found.gates] == [("answers", "could_not_run")] and not found.passed
    check_challenger_no_longer(registered, "answers")
    client = tracking.client(registered)
    text = Path(client.download_artifacts(found.run_id, "report.md", str(tmp_path))).read_text()
    assert "could not run" in text and "the reward model does not answer" in text


def test_an_alias_is_announced_before_it_moves(registered: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*given: Any, **more: Any) -> None:
        raise RuntimeError("MLflow is gone")

    monkeypatch.setattr(Registry, "set_alias", crash)
    with pytest.raises(RuntimeError):
        run.evaluate(registered, "triage/2")
    assert changes(registered) == [("evaluated", None, None), ("alias", "challenger", "evaluate")]


def test_a_version_that_needs_retraining_passes_and_becomes_no_challenger(registered: Settings) -> None:
    Registry(registered).tag("triage/2", NEEDS_RETRAINING_TAG, "{}")
    found = run.evaluate(registered, "triage/2")
    assert found.passed and found.alias is None and changes(registered) == [("evaluated", None, None)]


def test_evaluate_refuses_to_compare_a_version_with_itself(registered: Settings) -> None:
    with pytest.raises(InputError, match=r"is triage/1 itself"):
        run.evaluate(registered, "triage/1")
    with pytest.raises(NotFoundError, match=r"there are triage/1"):
        run.evaluate(registered, "triage/7")
    with pytest.raises(NotFoundError, match="names 0 datasets"):
        run.evaluate(registered, "triage/2", dataset_ref="nope")


def test_the_command_prints_one_object_and_says_no_by_its_exit_code(
    registered: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYLOOP_HOME", str(registered.home))
    reasons = json.dumps(registered.evaluation.not_applicable)
    monkeypatch.setenv("RAYLOOP_EVALUATION__NOT_APPLICABLE", reasons)
    for better, code in ((knows, 0), (guesses, 1)):
        answer_with(monkeypatch, {"triage/1": guesses, "triage/2": better})
        monkeypatch.setattr("sys.argv", ["rayloop", "evaluate", "triage/2", "--json"])
        with pytest.raises(SystemExit) as stop:
            run_app(app)
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert (stop.value.code or 0) == code and report["passed"] is (code == 0)
        assert {
            "suite",
            "passed",
            "status",
            "value",
            "threshold",
            "interval",
            "detail",
            "changed_cases",
        } <= set(report["gates"][0])


def test_several_versions_ask_the_one_they_are_compared_with_once(
    registered: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(registered)
    second = registry.get("triage/2")
    registry.register_adapter(
        "triage", registry.adapter_dir(second), base_model=second.base_model, dataset_id=second.dataset_id
    )
    opened = []

    @contextmanager
    def noted(settings: Settings, registry: Registry, version: Version) -> Iterator[Model]:
        opened.append(version.id)
        yield FakeModel(version.id, knows if version.id == "triage/2" else guesses)

    monkeypatch.setattr(run, "open_version", noted)
    monkeypatch.setenv("RAYLOOP_HOME", str(registered.home))
    monkeypatch.setenv("RAYLOOP_EVALUATION__NOT_APPLICABLE", json.dumps(registered.evaluation.not_applicable))
    monkeypatch.setattr("sys.argv", ["rayloop", "evaluate", "triage/2", "triage/3", "--json"])
    with pytest.raises(SystemExit) as stop:
        run_app(app)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert opened == ["triage/1", "triage/2", "triage/3"]
    assert [(e["version"], e["against"], e["passed"]) for e in report["evaluations"]] == [
        ("triage/2", "triage/1", True),
        ("triage/3", "triage/1", False),
    ]
    assert stop.value.code == 1 and report["passed"] is False


def test_compare_shows_gates_answers_configurations_and_datasets(registered: Settings, tmp_path: Path) -> None:
    found = compare.compare(registered, "triage/1", "triage/2")
    assert found["measured"][0]["suite"] == "win_rate" and found["measured"][0]["value"] > 0.5
    assert len(found["answers"]) == 5 and found["configuration"]["rank"] == [None, "8"]
    assert found["datasets"]["sft.train"][0] is None
    json.dumps(found)
    client = tracking.client(registered)
    logged = client.get_run(found["run_id"])
    assert logged.data.tags["rayloop.kind"] == "comparison" and logged.data.metrics["gate.win_rate"] > 0.5
    page = Path(client.download_artifacts(found["run_id"], "comparison.html", str(tmp_path))).read_text()
    assert "last evaluation of each" in page


def test_compare_shows_the_gates_of_each_and_survives_a_suite_that_breaks(
    registered: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.evaluate(registered, "triage/2")
    asked: list[str] = []

    def noted(text: str) -> str:
        asked.append(text)
        return knows(text)

    def broken(evidence: Any) -> Any:
        raise RuntimeError("the judge is down")

    answer_with(monkeypatch, {"triage/1": guesses, "triage/2": noted})
    monkeypatch.setitem(SUITES, "win_rate", replace(SUITES["win_rate"], measure=broken))
    chosen = registered.evaluation.model_copy(update={"not_applicable": {}})
    found = compare.compare(registered.model_copy(update={"evaluation": chosen}), "triage/1", "triage/2")
    assert all("level=" in text for text in asked)  # no case is asked that no shown suite reads
    assert found["measured"][0]["status"] == "could_not_run"
    console = Console(record=True, file=io.StringIO(), width=160)
    compare.print_comparison(found, console)
    shown = console.export_text()
    assert "not evaluated" in shown and "passed" in shown


def test_kept_answers_are_asked_for_once(tmp_path: Path) -> None:
    from tests.train.evaluate.fakes import make_truths

    asked: list[str] = []

    def answerer(text: str) -> str:
        asked.append(text)
        return text.upper()

    truths = make_truths(3)
    for _ in range(2):
        kept = KeptVersion(FakeModel("t/1", answerer), tmp_path / "kept.json")
        assert kept.answer([truth.prompt for truth in truths]) == ["ALERT 0", "ALERT 1", "ALERT 2"]
        assert kept.losses(truths) == [(5.0, 10)] * 3
    assert len(asked) == 3


def test_local_version_answers_and_scores_the_toy(toy_base: Path) -> None:
    from train.evaluate.types import Prompt, Truth

    source = models.Source("t/1", str(toy_base), None, 32, 16, 0)
    version = models.LocalVersion(source)
    prompts = [Prompt(({"role": "user", "content": f"service={s} level=low hour=3"},)) for s in ("api", "mail")]
    answers = version.answer(prompts)
    assert len(answers) == 2
    truths = [Truth(str(i), "u", p, a, "liked") for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    unlikely = [Truth("x", "u", prompts[0], "zzzz", "liked")]
    own, other = version.losses(truths), version.losses(unlikely)
    assert all(nats > 0 and tokens > 5 for nats, tokens in own)
    assert other[0][0] / other[0][1] > own[0][0] / own[0][1]


@pytest.mark.ray
def test_answers_spread_over_ray_are_those_of_one_process(toy_base: Path, ray_session: None) -> None:
    from tests.train.evaluate.fakes import make_truths

    source = models.Source("t/1", str(toy_base), None, 16, 16, 0)
    truths = make_truths(5)
    prompts = [truth.prompt for truth in truths]
    here, spread = models.LocalVersion(source), models.RayVersion(source, workers=2, num_gpus=0)
    try:
        assert spread.answer(prompts) == here.answer(prompts)
        for (nats, tokens), (own_nats, own_tokens) in zip(spread.losses(truths), here.losses(truths), strict=True):
            assert tokens == own_tokens and nats == pytest.approx(own_nats, rel=1e-4)
    finally:
        spread.close()
