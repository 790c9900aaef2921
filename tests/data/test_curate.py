import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from cluster.database import connect
from cluster.errors import DatasetError, InputError, NotFoundError
from cluster.runtime import RaySession
from cluster.settings import Settings, load_settings
from data.card import dataset_card
from data.curate import curate
from data.events import Event, parse_body
from data.log import EventLog
from data.manifest import COLUMNS, Manifest, find_dataset, load_manifest, read_examples
from data.mlflow_datasets import log_to_mlflow
from data.publish import check_usable
from data.ray_data import task_cpus
from data.split import SPLITS
from data.validate import validate
from tests.data.dying import dying_once
from tests.data.traffic import START_US, answer, feedback, interaction, traffic

MakeLog = Callable[..., Settings]
STORY = (
    "Every night at two the exporter stops answering and the queue behind it grows until somebody restarts "
    "the process by hand, which helps for a few hours and then the same thing happens again without a trace"
)


@pytest.fixture
def with_log(tmp_path: Path) -> MakeLog:
    """Settings of a home whose log holds the events; short answers are allowed, as in the demo."""

    def make(events: list[Event], home: str = "home", **curation: Any) -> Settings:
        options = {"filter": {"min_answer_tokens": 2}, "split": {"train": 0.6, "validation": 0.2}} | curation
        options |= {"log_to_mlflow": False}
        settings = load_settings(home=tmp_path / home, curation=options)[0]
        engine = connect(settings)
        if events:
            EventLog(engine).append(events)
        engine.dispose()
        return settings

    return make


def asked_with_a_tool(number: int) -> list[Event]:
    """An answer that was liked, and the tool call behind it as an event of its own."""
    body = {"name": "find_order", "call_id": "c1", "arguments": {"order": 77}, "result": {"state": "sent"}}
    ids = {"event_id": f"t{number}", "occurred_at_us": START_US, "interaction_id": f"i{number}"}
    return [
        interaction(number, "Where is order seventy-seven?", "It was sent this morning.", user="user1"),
        Event("tool_call", "default", "default", parse_body("tool_call", body), **ids),  # type: ignore[arg-type]
        feedback(number, "thumbs_up", 1.0, user="user1"),
    ]


@pytest.fixture(scope="module")
def dataset(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Manifest]:
    """A dataset of 441 interactions, some about nearly the same long story, one with a tool, by many users."""
    events = traffic(400)
    for n in range(40):
        question = f"{STORY} number {n}" if n % 2 else f"{STORY}: case {n}"
        events.append(interaction(1000 + n, question, f"restart it {n}", user=f"user{n}"))
        kind, reward = ("thumbs_up", 1.0) if n % 3 else ("thumbs_down", -1.0)
        events.append(feedback(1000 + n, kind, reward, user=f"user{n}"))
    events += asked_with_a_tool(2000)
    home = tmp_path_factory.mktemp("curate")
    curation: dict[str, Any] = {"filter": {"min_answer_tokens": 2}, "split": {"train": 0.6, "validation": 0.2}}
    curation |= {"log_to_mlflow": False, "balance": {"topics": 4}}
    settings = load_settings(home=home, curation=curation)[0]
    engine = connect(settings)
    EventLog(engine).append(events)
    engine.dispose()
    return settings, curate(settings, agent="triage", parallelism=2)


def references() -> set[bytes]:
    """The objects that this process keeps in Ray's store."""
    gc.collect()
    return set(ray._private.worker.global_worker.core_worker.get_all_reference_counts())


@pytest.mark.ray
@pytest.mark.slow
def test_neither_parallelism_nor_killed_workers_change_the_dataset(
    dataset: tuple[Settings, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, made = dataset
    one = curate(settings, agent="triage", parallelism=1, out=tmp_path / "one")
    tasks = {  # one that cuts blocks, one that joins pieces, one of Ray Data, one that all others wait for
        "read": "data.curate.read_block",
        "join": "data.curate.join_events",
        "scrub": "data.curate.scrub",
        "groups": "data.near.candidate_groups",
    }
    for name, function in tasks.items():
        monkeypatch.setattr(function, dying_once(resolve_name(function), tmp_path / name))
    monkeypatch.setattr("data.exchange.MOST_PIECES", 32)  # exchanges take two rounds
    eight = curate(settings, agent="triage", parallelism=8, out=tmp_path / "eight")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "eight", *tasks}
    assert one.dataset_hash == eight.dataset_hash == made.dataset_hash
    assert [shard.sha256 for shard in one.shards] == [shard.sha256 for shard in eight.shards]
    assert one.stages == eight.stages == made.stages


@pytest.mark.ray
@pytest.mark.slow
def test_curating_again_reuses_the_dataset_and_announces_it_once(dataset: tuple[Settings, Manifest]) -> None:
    settings, made = dataset
    again = curate(settings, agent="triage")
    assert (again.path, again.created_at) == (made.path, made.created_at)
    engine = connect(settings)
    ready = [recorded.event for recorded in EventLog(engine).scan(kinds=("dataset.ready",))]
    engine.dispose()
    assert [event.body["dataset_hash"] for event in ready] == [made.dataset_hash]
    folders = {p.name for p in Path(settings.datasets_root).iterdir()}
    assert folders == {made.dataset_id, "test_sketches"}


@pytest.mark.ray
def test_no_user_and_no_near_duplicate_crosses_splits(dataset: tuple[Settings, Manifest]) -> None:
    settings, made = dataset
    users: dict[str, set[str]] = {}
    stories: set[str] = set()
    for kind in COLUMNS:
        for split in SPLITS:
            for row in read_examples(made.path, kind, split).to_pylist():
                users.setdefault(row["user_id"], set()).add(split)
                if STORY in (row.get("messages") or row.get("prompt")):
                    stories.add(split)
    assert all(len(splits) == 1 for splits in users.values())
    assert len(stories) == 1
    statuses = {check.name: check.status for check in validate(made, settings)}
    assert "failed" not in statuses.values(), statuses
    lost = next(stage for stage in made.stages if stage.name == "split").dropped
    assert any(reason.startswith("near duplicate in") for reason in lost)


@pytest.mark.ray
def test_stages_count_rows_in_and_out(dataset: tuple[Settings, Manifest]) -> None:
    _, made = dataset
    stages = {stage.name: stage for stage in made.stages}
    assert list(stages) == [
        "join", "behaviour", "weigh", "score", "filter", "scrub", "fingerprint", "cluster", "deduplicate",
        "examples", "balance", "augment", "curriculum", "split",
    ]  # fmt: skip
    assert stages["join"].rows_out == 441
    for name in ("score", "filter", "scrub", "deduplicate", "split"):
        assert stages[name].rows_in - stages[name].rows_out == sum(stages[name].dropped.values()), name
    assert stages["split"].rows_out == sum(made.total(kind) for kind in COLUMNS)


@pytest.mark.ray
def test_examples_have_the_columns_of_their_kind_in_order_of_the_curriculum(
    dataset: tuple[Settings, Manifest],
) -> None:
    _, made = dataset
    for kind, columns in COLUMNS.items():
        table = read_examples(made.path, kind, "train")
        assert tuple(table.column_names) == columns
        assert len(table) == made.counts[kind]["train"] and (len(table) > 0 or kind in ("trajectory", "task"))
        assert table["order"].to_pylist() == sorted(table["order"].to_pylist())
    pair = read_examples(made.path, "preference", "train").to_pylist()[0]
    assert [m["role"] for m in json.loads(pair["chosen"])] == ["assistant"]
    assert json.loads(pair["prompt"])[-1]["role"] == "user"


@pytest.mark.ray
def test_a_tool_call_that_came_as_an_event_ends_as_tool_messages(dataset: tuple[Settings, Manifest]) -> None:
    _, made = dataset
    rows = [row for split in SPLITS for row in read_examples(made.path, "sft", split).to_pylist()]
    (row,) = [row for row in rows if row["interaction_ids"] == ["i2000"]]
    messages = json.loads(row["messages"])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"][0]["function"] == {"name": "find_order", "arguments": '{"order":77}'}
    assert (messages[3]["tool_call_id"], messages[3]["content"]) == ("c1", '{"state":"sent"}')


@pytest.mark.ray
def test_a_dataset_is_found_by_id_hash_path_and_latest(dataset: tuple[Settings, Manifest]) -> None:
    settings, made = dataset
    for ref in (made.dataset_id, made.dataset_hash[:10], made.path, "latest"):
        assert find_dataset(settings, ref) == Path(made.path)
    assert find_dataset(settings, "latest", agent="triage") == Path(made.path)
    with pytest.raises(NotFoundError, match=made.dataset_id):
        find_dataset(settings, "nothing")
    with pytest.raises(InputError, match="must be one of sft"):
        read_examples(made.path, "dpo", "train")


@pytest.mark.ray
def test_plots_lie_beside_the_card_and_topics_are_named(dataset: tuple[Settings, Manifest]) -> None:
    _, made = dataset
    card = (Path(made.path) / "card.md").read_text()
    for name in ("stages.png", "scores.png", "lengths.png"):
        assert f"({name})" in card
        assert (Path(made.path) / name).read_bytes().startswith(b"\x89PNG")
    assert sum(made.topics.values()) == pytest.approx(1, abs=1e-3) and len(made.topics) > 1
    assert next(iter(made.topics)) in card


@pytest.mark.ray
def test_a_dataset_is_logged_to_mlflow_once(dataset: tuple[Settings, Manifest], mlflow_settings: Settings) -> None:
    from cluster import tracking

    _, made = dataset
    for _ in range(2):
        log_to_mlflow(mlflow_settings, made)
    client = tracking.client(mlflow_settings)
    (run,) = client.search_runs([tracking.experiment_id(mlflow_settings)])
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == (made.dataset_id, made.dataset_hash[:36])
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"manifest.json", "card.md", "stages.png"} <= files
    assert run.data.metrics["sft.train"] == made.counts["sft"]["train"]


@pytest.mark.ray
def test_card_shows_stages_and_the_split_salt_is_not_in_the_manifest(
    dataset: tuple[Settings, Manifest],
) -> None:
    settings, made = dataset
    assert "| deduplicate |" in dataset_card(made)
    assert settings.curation.split.salt not in (Path(made.path) / "manifest.json").read_text()


@pytest.mark.ray
def test_validation_finds_altered_files_and_leaked_users(dataset: tuple[Settings, Manifest], tmp_path: Path) -> None:
    settings, made = dataset
    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    shard = copy / "sft/test/00000.parquet"
    shard.write_bytes((Path(made.path) / "sft/train/00000.parquet").read_bytes())
    (check,) = validate(load_manifest(copy), settings)
    assert check.status == "failed" and "altered" in check.detail
    manifest = json.loads((copy / "manifest.json").read_text())
    leak(copy, manifest)
    names = {c.name for c in validate(load_manifest(copy), settings) if c.status == "failed"}
    assert names == {"users apart", "clusters apart", "near duplicates"}


def leak(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the manifest agree with files whose test split is the training split."""
    from data.manifest import Shard, content_digest, dataset_hash

    for shard in manifest["shards"]:
        file = folder / shard["path"]
        table = pq.read_table(file)
        shard |= {
            "rows": len(table),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "content_sha256": content_digest(table),
        }
    manifest["dataset_hash"] = dataset_hash(Shard(**shard) for shard in manifest["shards"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def clusters_in(made: Manifest, *splits: str) -> set[str]:
    tables = [read_examples(made.path, kind, split) for kind in COLUMNS for split in splits]
    return {cluster for table in tables for cluster in table["cluster_id"].to_pylist()}


@pytest.mark.ray
@pytest.mark.slow
def test_what_was_in_test_stays_out_of_later_training_sets(ray_session: None, with_log: MakeLog) -> None:
    settings = with_log(traffic(120, users=30))
    first = curate(settings)
    held_out = {row["cluster_id"] for kind in COLUMNS for row in read_examples(first.path, kind, "test").to_pylist()}
    other = settings.curation.model_copy(
        update={"split": settings.curation.split.model_copy(update={"salt": "another"})}
    )
    second = curate(settings.model_copy(update={"curation": other}))
    later = clusters_in(second, "train", "validation")
    assert held_out and not held_out & later
    lost = next(stage for stage in second.stages if stage.name == "split").dropped
    assert lost["was in an earlier test set"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_behaviour_becomes_implicit_signals_when_that_is_on(ray_session: None, with_log: MakeLog) -> None:
    events = traffic(60, users=12)
    for number in range(60):
        at_us = START_US + number * 60_000_000 + 2_000_000
        ids = {"event_id": f"b{number}", "user_id": "x", "interaction_id": f"i{number}"}
        action = {"action": "copy", "duration_s": 2.0}
        events.append(Event("behaviour", "default", "default", action, occurred_at_us=at_us, **ids))
    settings = with_log(events)
    off = curate(settings)
    on = curate(settings.model_copy(update={"feedback": settings.feedback.model_copy(update={"implicit": True})}))
    assert not off.calibration and on.calibration["rows"] > 0
    copied = next(weight for weight in on.calibration["weights"] if weight["signal"] == "copy_response")
    assert (copied["configured"], copied["rows"]) == (0.4, on.calibration["rows"])
    assert f"| copy_response | {copied['rows']} | +0.40 |" in dataset_card(on)
    no_signal = [next(s for s in m.stages if s.name == "score").dropped.get("no signal", 0) for m in (off, on)]
    assert no_signal[0] > 0 and no_signal[1] == 0


def test_an_empty_log_is_refused_and_nothing_is_written(with_log: MakeLog) -> None:
    settings = with_log([])
    with pytest.raises(DatasetError, match="the event log is empty"):
        curate(settings)
    assert not Path(settings.datasets_root).exists()


def test_an_agent_that_nobody_asked_is_refused_with_those_there_are(with_log: MakeLog) -> None:
    settings = with_log(traffic(3))
    with pytest.raises(
        DatasetError, match="no interaction is of agent 'math'; the log of default/default knows triage:"
    ):
        curate(settings, agent="math")
    assert not Path(settings.datasets_root).exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thumbs_up", "thumbs_down", None])
def test_one_sided_feedback_is_refused_and_nothing_is_written(
    kind: str | None, ray_session: None, with_log: MakeLog
) -> None:
    events = [interaction(n, f"question {n}", answer("page", "data"), user=f"u{n}") for n in range(20)]
    if kind is not None:
        reward = 1.0 if kind == "thumbs_up" else -1.0
        events += [feedback(n, kind, reward, user=f"u{n}") for n in range(20)]
    settings = with_log(events)
    with pytest.raises(DatasetError, match="one-sided" if kind else "no signal 20"):
        curate(settings)
    assert not list(Path(settings.datasets_root).glob("**/*"))


def test_usable_needs_two_sides() -> None:
    def counts(sft: int, preference: int, unpaired: int) -> dict[str, dict[str, int]]:
        return {"sft": {"train": sft}, "preference": {"train": preference}, "unpaired": {"train": unpaired}}

    check_usable(counts(1, 0, 2), {True, False}, [])
    check_usable(counts(1, 1, 1), {False}, [])
    check_usable(counts(1, 0, 0), set(), [])
    with pytest.raises(DatasetError, match="all feedback is negative"):
        check_usable(counts(0, 0, 3), {False}, [])
    with pytest.raises(DatasetError, match="score: no signal 7"):
        check_usable(counts(0, 0, 0), set(), [("score", {"no signal": 7})])


def test_pyarrow_keeps_the_schema_of_an_empty_shard_list() -> None:
    from data.manifest import SHARDS, write_shards

    empty = pa.table({"shard": pa.array([], pa.string())})
    assert write_shards(empty, Path("/nonexistent")).schema.equals(SHARDS)


def test_a_task_has_a_core_where_the_cluster_is_there_for_it_alone(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, ray={"num_cpus": 600})[0]
    assert task_cpus(settings, RaySession("127.0.0.1:1", started=False)) == settings.curation.stage_cpus
    assert task_cpus(settings, RaySession("127.0.0.1:1", started=True)) == 600 / (os.cpu_count() or 1)
