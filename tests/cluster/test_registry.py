"""The registry on an embedded MLflow."""

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import tracking
from cluster.errors import ConflictError, InputError, NotFoundError, UnavailableError
from cluster.model_files import adapter_digest
from cluster.registry import Registry, Version
from cluster.settings import Settings, load_settings


def make_adapter(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "optimizer.pt").write_bytes(b"never uploaded")
    return folder


def make_base(folder: Path, weights: bytes = b"base") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def register(registry: Registry, folder: Path) -> Version:
    return registry.register_adapter("triage", make_adapter(folder / "a"), base_model=make_base(folder / "b"))


def test_registry_keeps_a_version_with_its_lineage(mlflow_settings: Settings, tmp_path: Path) -> None:
    registry, base = Registry(mlflow_settings), make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter")
    first = registry.register_base("triage", base)
    assert (first.id, first.aliases, first.served_name) == ("triage/1", ("champion",), "base")
    assert registry.register_base("triage", base).id == "triage/1"
    second = registry.register_adapter(
        "triage",
        adapter,
        base_model=base,
        dataset_hash="abc",
        dataset_id="ds",
        lineage={"rayloop.job_id": "j1"},
    )
    assert second.id == "triage/2" and second.rank == 16 and second.dataset_hash == "abc"
    assert second.adapter_sha256 == adapter_digest(adapter)
    assert second.tags["rayloop.job_id"] == "j1" and second.tags["base_revision"].startswith("sha256:")
    assert second.served_name == f"triage-2-{adapter_digest(adapter)[:12]}"
    assert re.fullmatch(r"v1\.\d{4}\.1", first.name) and re.fullmatch(r"v1\.\d{4}\.2", second.name)
    assert registry.models() == ["triage"] and registry.get("triage@champion").id == "triage/1"


def test_registry_gives_back_exactly_the_two_adapter_files(mlflow_settings: Settings, tmp_path: Path) -> None:
    registry = Registry(mlflow_settings)
    adapter = make_adapter(tmp_path / "adapter")
    version = registry.register_adapter("triage", adapter, base_model=make_base(tmp_path / "base"))
    folder = registry.adapter_dir(version)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert registry.adapter_dir("triage/1") == folder == registry.get("triage/1").adapter_path


def test_adapter_dir_refuses_altered_files(mlflow_settings: Settings, tmp_path: Path) -> None:
    registry = Registry(mlflow_settings)
    version = registry.register_adapter("triage", make_adapter(tmp_path / "a"), base_model=make_base(tmp_path / "b"))
    stored = next((mlflow_settings.home / "mlartifacts").rglob("adapter_model.safetensors"))
    stored.write_bytes(b"tampered")
    with pytest.raises(ConflictError, match="was altered"):
        registry.adapter_dir(version)


def test_adapter_dir_mends_a_damaged_copy(mlflow_settings: Settings, tmp_path: Path) -> None:
    registry = Registry(mlflow_settings)
    version = registry.register_adapter("triage", make_adapter(tmp_path / "a"), base_model=make_base(tmp_path / "b"))
    (registry.adapter_dir(version) / "adapter_model.safetensors").write_bytes(b"half")
    assert adapter_digest(registry.adapter_dir(version)) == version.adapter_sha256


def test_challenger_only_after_the_gates(mlflow_settings: Settings, tmp_path: Path) -> None:
    registry = Registry(mlflow_settings)
    version = registry.register_adapter("triage", make_adapter(tmp_path / "a"), base_model=make_base(tmp_path / "b"))
    with pytest.raises(ConflictError, match="gates are not_run"):
        registry.set_alias("triage", "challenger", version, actor="me", reason="hope")
    registry.tag(version, "rayloop.gates", "passed")
    registry.set_alias("triage", "challenger", version, actor="me", reason="passed")
    found = registry.get("triage@challenger")
    assert found.id == version.id and json.loads(found.tags["rayloop.alias.challenger"])["actor"] == "me"
    registry.remove_alias("triage", "challenger", actor="me", reason="worse")
    removed = json.loads(registry.get(version.id).tags["rayloop.alias.challenger"])
    assert removed["removed"] is True and (removed["actor"], removed["reason"]) == ("me", "worse")
    with pytest.raises(NotFoundError, match=r"there are triage/1"):
        registry.get("triage@challenger")


@pytest.mark.parametrize("ref", ["", "triage", "triage/", "triage/x", "@champion"])
def test_get_refuses_what_is_no_reference(mlflow_settings: Settings, ref: str) -> None:
    with pytest.raises(InputError, match="MODEL/NUMBER"):
        Registry(mlflow_settings).get(ref)


def test_register_adapter_refuses_what_is_no_adapter(mlflow_settings: Settings, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(InputError, match=r"no readable adapter_config\.json"):
        Registry(mlflow_settings).register_adapter("triage", tmp_path, base_model=base)
    with pytest.raises(InputError, match="letters, digits"):
        Registry(mlflow_settings).register_adapter("a/b", tmp_path, base_model=base)
    with pytest.raises(InputError, match="does not exist"):
        Registry(mlflow_settings).register_adapter("t", make_adapter(tmp_path / "a"), base_model=tmp_path / "none")
    assert Registry(mlflow_settings).models() == []


def test_run_records_nesting_status_and_settings_without_secrets(mlflow_settings: Settings, tmp_path: Path) -> None:
    settings = load_settings(home=mlflow_settings.home, database={"url": "postgresql://u:pass-4471@h/d"})[0]
    with tracking.run(settings, "parent") as parent:
        parent.log_params({"training": {"beta": 0.1}})
        parent.log_metrics({"loss": 1.0, "absent": None}, step=3)
        parent.log_dataset(name="ds", digest="abc", uri="/x", context="evaluation")
        with pytest.raises(ValueError), tracking.run(settings, "child", parent_run_id=parent.run_id) as child:
            raise ValueError
    found = parent.client.get_run(parent.run_id)
    assert found.data.params == {"training.beta": "0.1"} and found.data.metrics == {"loss": 1.0}
    assert found.info.status == "FINISHED" and parent.client.get_run(child.run_id).info.status == "FAILED"
    assert parent.client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    text = Path(parent.client.download_artifacts(parent.run_id, "settings.json", str(tmp_path))).read_text()
    assert "pass-4471" not in text and "u:***@h" in text


def test_unreachable_mlflow_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = load_settings(home=tmp_path, mlflow={"tracking_uri": f"sqlite:///{tmp_path}/file/mlflow.db"})[0]
    with pytest.raises(UnavailableError, match=r"mlflow\.tracking_uri"):
        Registry(settings).models()


def test_mlflow_that_goes_away_later_is_the_same_clear_error(
    mlflow_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowException

    registry, client = Registry(mlflow_settings), tracking.client(mlflow_settings)
    assert registry.models() == []

    def failing(failure: Exception) -> Callable[[], None]:
        def fails() -> None:
            raise failure

        return fails

    for failure in (MlflowException("API request failed: connection refused"), ConnectionResetError("by peer")):
        monkeypatch.setattr(client, "search_registered_models", failing(failure))
        with pytest.raises(UnavailableError, match=r"does not answer \((API request failed|by peer)"):
            registry.models()
    monkeypatch.undo()
    assert registry.versions("nobody") == []  # what MLflow refuses is not an outage


def test_a_tag_that_several_write_first_at_once_is_written(mlflow_settings: Settings, tmp_path: Path) -> None:
    version = Registry(mlflow_settings).register_base("triage", make_base(tmp_path / "base"))
    writers = [Registry(mlflow_settings) for _ in range(4)]
    barrier = threading.Barrier(len(writers))

    def write(registry: Registry) -> None:
        for number in range(12):
            barrier.wait(60)
            registry.tag(version, f"tag.{number}", "x")

    with ThreadPoolExecutor(len(writers)) as pool:
        list(pool.map(write, writers))
    tags = Registry(mlflow_settings).get(version.id).tags
    assert {f"tag.{number}" for number in range(12)} <= tags.keys()
