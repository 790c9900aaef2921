import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.clock import now_us
from cluster.database import connect
from cluster.errors import NotFoundError
from cluster.registry import Registry
from cluster.settings import Settings
from cluster.tables import experiments, rollouts
from data.events import Event, parse_body
from data.lineage import to_text, trace
from data.log import EventLog
from data.manifest import SCHEMA_VERSION


@pytest.fixture
def world(mlflow_settings: Settings, database_url: str) -> Settings:
    """Settings with an embedded registry and, in turn, either database."""
    database = mlflow_settings.database.model_copy(update={"url": database_url})
    return mlflow_settings.model_copy(update={"database": database})


def make_dataset(settings: Settings, interaction_ids: list[list[str]]) -> tuple[str, str]:
    folder = Path(settings.datasets_root) / "triage-abc"
    (folder / "sft" / "train").mkdir(parents=True)
    pq.write_table(pa.table({"interaction_ids": interaction_ids}), folder / "sft/train/00000.parquet")
    manifest = {
        "dataset_id": "triage-abc",
        "dataset_hash": "abc123",
        "schema_version": SCHEMA_VERSION,
        "created_at": "2026-01-01T00:00:00Z",
        "tenant": "default",
        "workspace": "default",
        "agent": "triage",
        "config": {},
        "git_commit": None,
        "sources": {"first_seq": 1, "last_seq": 9},
        "time_range": [],
        "stages": [],
        "counts": {"sft": {"train": 2, "validation": 0, "test": 0}},
        "shards": [{"path": "sft/train/00000.parquet", "rows": 2, "sha256": "s", "content_sha256": "c"}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "triage-abc", "abc123"


def make_versions(settings: Settings, tmp_path: Path, dataset_id: str, dataset_hash: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    registry = Registry(settings)
    registry.register_base("triage", base)
    registry.register_adapter("triage", adapter, base_model=base, dataset_hash=dataset_hash, dataset_id=dataset_id)


def event(kind: str, body: dict[str, Any], interaction: str | None = None, event_id: str | None = None) -> Event:
    ids = {} if event_id is None else {"event_id": event_id}
    return Event(kind, "default", "default", parse_body(kind, body), interaction_id=interaction, **ids)


def interaction(name: str, version: str) -> Event:
    body = {"messages": [{"role": "user", "content": "hi"}], "served_version": version}
    return event("interaction", body, name)


def decision(rollout_id: str, number: int) -> Event:
    body = {"rollout_id": rollout_id, "experiment_id": "x", "number": number, "outcome": "advance"}
    body |= {
        "reason": "no regression",
        "from_state": "running",
        "to_state": "running",
        "from_stage": 0,
        "to_stage": 1,
    }
    return event("rollout.decision", body | {"share_before": 0.1, "share_after": 0.25, "evidence": {"n": 400}})


def fill(settings: Settings) -> None:
    route = {
        "writer": "controller",
        "revision": 4,
        "after": {"stable": "triage/1", "arms": [{"version": "triage/2", "start": 0.0, "share": 0.25}]},
    }
    events = [
        interaction("i1", "triage/1"),
        interaction("i2", "triage/1"),
        interaction("i3", "triage/1"),
        event("feedback", {"type": "thumbs_up", "reward": 1.0}, "i1", "f1"),
        event("feedback", {"type": "correction", "text": "no", "reward": -0.5}, "i2", "f2"),
        event("feedback", {"type": "thumbs_up"}, "i3", "not in the dataset"),
        event("model.updated", {"version": "triage/2", "change": "registered"}),
        event("model.updated", {"version": "triage/9", "change": "registered"}),
        decision("r1", 1),
        decision("r2", 1),
        event("route.changed", route),
        event("route.changed", {**route, "after": {"stable": "other/1"}}),
    ]
    engine = connect(settings)
    EventLog(engine).append(events)
    common: dict[str, Any] = {"tenant": "default", "agent": "triage", "modality": "text", "config": {}}
    common |= {"state": "running", "created_at_us": now_us()}
    with engine.begin() as connection:
        for number, candidate in ((1, "triage/2"), (2, "triage/9")):
            versions = {
                "stable": "triage/1",
                "candidate": candidate,
                "salt": "s",
                "workspace": "default",
                "layer": "default",
                "bucket_low": 0.0,
                "bucket_high": 1.0,
            }
            connection.execute(experiments.insert().values(experiment_id=f"x{number}", **common, **versions))
            stage = {"stage": 1, "stage_started_us": 0, "revision": 1, "updated_at_us": 0, "progress": {}}
            ids = {"rollout_id": f"r{number}", "experiment_id": f"x{number}"}
            connection.execute(rollouts.insert().values(**ids, **common, **stage))
    engine.dispose()


def test_lineage_walks_both_ways(world: Settings, tmp_path: Path) -> None:
    make_versions(world, tmp_path, *make_dataset(world, [["i1"], ["i1", "i2"]]))
    fill(world)
    chain = json.loads(json.dumps(trace("triage/2", world)))
    assert chain["version"]["id"] == "triage/2"
    assert chain["run"]["status"] == "FINISHED"
    assert (chain["dataset"]["hash"], chain["dataset"]["hash_matches"]) == ("abc123", True)
    assert chain["interactions"]["count"] == chain["interactions"]["in_log"] == 2
    assert chain["interactions"]["served_by"] == {"triage/1": 2}
    assert chain["feedback"]["by_type"] == {"thumbs_up": 1, "correction": 1}
    assert [(f["seq"], f["event_id"], f["reward"]) for f in chain["feedback"]["sample"]] == [
        (4, "f1", 1.0),
        (5, "f2", -0.5),
    ]
    assert [e["seq"] for e in chain["registry_events"]] == [7]
    assert [(d["seq"], d["rollout_id"], d["role"]) for d in chain["decisions"]] == [(9, "r1", "candidate")]
    assert [(r["seq"], r["shares"]) for r in chain["routes"]] == [(11, {"triage/2": 0.25})]
    text = to_text(chain)
    assert "feedback  2 events (thumbs_up 1, correction 1)" in text
    assert "seq 5  f2  correction on i2" in text


def test_lineage_of_the_base_version_has_no_dataset(world: Settings, tmp_path: Path) -> None:
    make_versions(world, tmp_path, "none", "none")
    fill(world)
    chain = trace("triage@champion", world)
    assert (chain["version"]["id"], chain["dataset"], chain["feedback"]["count"]) == ("triage/1", None, 0)
    assert [(d["rollout_id"], d["role"]) for d in chain["decisions"]] == [("r1", "stable"), ("r2", "stable")]
    assert "dataset   none" in to_text(chain)


def test_lineage_says_when_the_dataset_is_elsewhere_or_another(world: Settings, tmp_path: Path) -> None:
    make_versions(world, tmp_path, "elsewhere", "abc")
    assert "elsewhere" in trace("triage/2", world)["dataset"]["missing"]


def test_lineage_tells_a_dataset_that_is_another_now(world: Settings, tmp_path: Path) -> None:
    dataset_id, _ = make_dataset(world, [["i1"]])
    make_versions(world, tmp_path, dataset_id, "another hash")
    chain = trace("triage/2", world)
    assert chain["dataset"]["hash_matches"] is False
    assert "DIFFERS" in to_text(chain)


def test_unknown_version_is_named_with_the_known_ones(world: Settings, tmp_path: Path) -> None:
    make_versions(world, tmp_path, "d", "h")
    with pytest.raises(NotFoundError, match="triage/1"):
        trace("triage/7", world)
