import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from cluster.demo.commands import Processes
from cluster.demo.damage import damage_adapter
from cluster.demo.home import MARKER, fresh_home, write_corpus, write_suite
from cluster.demo.plan import QUICK, DemoPlan, write_config, write_control_config
from cluster.errors import ConflictError, InputError
from cluster.settings import load_settings


def sleeper(*words: str) -> "subprocess.Popen[bytes]":
    """A process that runs already: between fork and exec it still has its parent's command line."""
    line = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", *words]
    process = subprocess.Popen(line, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def test_fresh_home_takes_an_empty_or_a_missing_folder(tmp_path: Path) -> None:
    home, _ = fresh_home(tmp_path / "new")
    assert home.files.is_dir()
    (tmp_path / "empty").mkdir()
    fresh_home(tmp_path / "empty")


def test_fresh_home_leaves_a_folder_that_no_demo_made(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not from a demo"):
        fresh_home(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_fresh_home_ends_what_an_earlier_demo_left_and_nothing_else(tmp_path: Path) -> None:
    home, processes = fresh_home(tmp_path / "demo")
    mine, other = sleeper("cluster.demo.analysts"), sleeper("cluster.demo.analysts")
    try:
        processes.add(mine.pid)
        (home.root / "old.txt").touch()
        fresh_home(tmp_path / "demo")
        assert mine.poll() is not None and other.poll() is None
        assert not (home.root / "old.txt").exists()
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


def test_a_number_given_to_another_process_is_left_alone(tmp_path: Path) -> None:
    process = sleeper()
    try:
        file = tmp_path / MARKER
        file.write_text(json.dumps({str(process.pid): psutil.Process(process.pid).create_time() - 100}))
        assert Processes.left_over(file) == []
    finally:
        process.kill()
        process.wait()


def test_a_running_demo_is_not_disturbed(tmp_path: Path) -> None:
    _, processes = fresh_home(tmp_path / "demo")
    running = sleeper("rayloop", "demo")
    try:
        processes.add(running.pid)
        with pytest.raises(ConflictError, match=f"process {running.pid}"):
            fresh_home(tmp_path / "demo")
        assert running.poll() is None
    finally:
        running.kill()
        running.wait()


def test_own_process_is_no_left_over(tmp_path: Path) -> None:
    processes = Processes(tmp_path / MARKER)
    processes.add(os.getpid())
    assert Processes.left_over(tmp_path / MARKER) == []


@pytest.mark.parametrize("changes", [{}, QUICK, {"shuffle_feedback": True, "seed": 7}])
def test_written_config_loads_with_every_flag_the_demo_shows(tmp_path: Path, changes: dict[str, object]) -> None:
    plan = DemoPlan.model_validate(changes)
    settings, origin = load_settings(write_config(tmp_path / "rayloop.yaml", plan, tmp_path))
    assert settings.home == tmp_path
    assert settings.learning.enabled and settings.capture.enabled and settings.feedback.explicit
    assert settings.feedback.implicit and settings.automation.auto_rollout
    assert settings.rollout.stage_duration_s == plan.stage_s and len(settings.rollout.stages) == 4
    assert settings.training.seed == plan.seed
    assert origin["home"].startswith("rayloop.yaml:")


def test_sweep_result_goes_into_the_config_of_dpo_alone(tmp_path: Path) -> None:
    path = write_config(tmp_path / "rayloop.yaml", DemoPlan(), tmp_path, {"learning_rate": 0.5})
    training = yaml.safe_load(path.read_text())["training"]
    assert training["dpo"]["learning_rate"] == 0.5 and training["dpo"]["epochs"] == 3
    assert training["sft"]["learning_rate"] != 0.5


def test_control_has_its_own_log_and_shares_base_and_registry(tmp_path: Path) -> None:
    settings, _ = load_settings(write_control_config(tmp_path / "control", DemoPlan(), tmp_path))
    assert settings.home == tmp_path / "control" and str(settings.home) in settings.database_url
    assert settings.tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert settings.training.base_model == str(tmp_path / "base")


def test_team_suite_names_no_right_answer(tmp_path: Path) -> None:
    cases = [json.loads(line) for line in write_suite(tmp_path, 1).read_text().splitlines()]
    assert len({case["id"] for case in cases}) == len(cases) >= 20
    assert len({json.dumps(case["expect"]) for case in cases}) == 1, "every case expects the same shape"


def test_corpus_is_one_chat_a_line(tmp_path: Path) -> None:
    home, _ = fresh_home(tmp_path / "demo")
    lines = write_corpus(home, DemoPlan(tickets=500)).read_text().splitlines()
    assert len(lines) == 500
    assert [message["role"] for message in json.loads(lines[0])["messages"]] == ["system", "user", "assistant"]


def test_damage_scales_the_update_and_keeps_the_rest(tmp_path: Path) -> None:
    source = tmp_path / "good"
    source.mkdir()
    tensors = {"q.lora_A.weight": np.ones((2, 3), np.float32), "q.lora_B.weight": np.full((3, 2), 0.5, np.float32)}
    save_file(tensors, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text("{}")
    (source / "canary.json").write_text("[]")
    damaged = load_file(damage_adapter(source, tmp_path / "bad", -2.0) / "adapter_model.safetensors")
    assert (damaged["q.lora_A.weight"] == 1).all() and (damaged["q.lora_B.weight"] == -1).all()
    assert damaged["q.lora_B.weight"].dtype == np.float32
    assert (load_file(source / "adapter_model.safetensors")["q.lora_B.weight"] == 0.5).all()
    assert (tmp_path / "bad" / "adapter_config.json").exists()
    assert not (tmp_path / "bad" / "canary.json").exists()  # an engine would refuse what is not as it was trained
