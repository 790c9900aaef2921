"""The commands `import`, `audit`, `verify` and `lineage` as a person or a script runs them."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from cluster.settings import Settings, load_settings
from tests import processes
from tests.data.importers.test_run import THUMB, jsonl


def rayloop(home: Path, *arguments: str, **environment: str) -> "CompletedProcess[str]":
    return processes.rayloop(*arguments, RAYLOOP_HOME=str(home), **environment)


def test_import_verify_and_import_again(database_url: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "f.jsonl", THUMB, {**THUMB, "type": "rating", "value": 9})
    rejects = tmp_path / "rejects.jsonl"
    database = {"RAYLOOP_DATABASE__URL": database_url}
    first = rayloop(tmp_path, "import", str(file), "--rejects", str(rejects), **database)
    assert first.returncode == 1
    assert "line 2: value=9.0 must be a number from 1 to 5" in first.stderr
    assert "1 imported, 0 already there, 1 rejected" in first.stdout
    assert json.loads(rejects.read_text())["row"]["value"] == 9
    again: dict[str, Any] = json.loads(rayloop(tmp_path, "import", str(file), "--json", **database).stdout)
    assert (again["rows"], again["imported"], again["duplicates"], again["rejected"]) == (2, 0, 1, 1)
    verified = rayloop(tmp_path, "verify", "--json", **database)
    assert (verified.returncode, json.loads(verified.stdout)["events"]) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "none.jsonl"], "error: file='none.jsonl' cannot be read"),
        (["import", "{file}", "--format", "csv"], "error: format='csv' must be one of"),
        (["audit", "none.jsonl"], "error: file='none.jsonl' cannot be read"),
        (["lineage", "triage"], "error: version='triage' is not a version"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    file = jsonl(tmp_path / "f.jsonl", THUMB)
    run = rayloop(tmp_path / "home", *(argument.format(file=file) for argument in arguments))
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in run.stderr


def test_audit_writes_markdown(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "f.jsonl", *({"id": n, "ok": n % 2 == 0} for n in range(20)))
    out = tmp_path / "audit.md"
    run = rayloop(tmp_path, "audit", str(file), "--out", str(out))
    assert (run.returncode, f"next: rayloop import {file}" in run.stdout) == (0, True)
    assert "Label `ok`: True 50.0%, False 50.0%." in out.read_text()


def test_audit_reads_no_database(tmp_path: Path, settings: Settings) -> None:
    file = jsonl(tmp_path / "f.jsonl", THUMB)
    assert rayloop(tmp_path / "home2", "audit", str(file), "--json").returncode == 0
    assert not (load_settings(home=tmp_path / "home2")[0].home / "rayloop.db").exists()


def test_seal_verify_and_erase_from_the_command_line(tmp_path: Path) -> None:
    old = {**THUMB, "event_id": "old", "occurred_at": "2026-01-31T12:00:00Z", "user": "jane"}
    rayloop(tmp_path, "import", str(jsonl(tmp_path / "f.jsonl", old)))
    sealed = json.loads(rayloop(tmp_path, "data", "seal", "--json").stdout)
    assert [(p["name"], p["num_events"]) for p in sealed["partitions"]] == [("2026-01-31/1-1", 1)]
    assert "0 events sealed" in rayloop(tmp_path, "data", "seal").stdout
    first = rayloop(tmp_path, "erase", "jane", "--json")
    assert json.loads(first.stdout)["partitions"] == ["2026-01-31/1-1"]
    assert rayloop(tmp_path, "erase", "jane", "--json").stdout == first.stdout
    verified = rayloop(tmp_path, "verify")
    assert (verified.returncode, "1 erased, 1 sealed partitions, 0 faults" in verified.stdout) == (0, True)
    again = rayloop(tmp_path, "import", str(jsonl(tmp_path / "g.jsonl", {**THUMB, "user": "jane"})))
    assert (again.returncode, "line 1: user=" in again.stderr, "erased" in again.stderr) == (1, True, True)


def test_wrong_location_and_unknown_user_are_one_line(tmp_path: Path) -> None:
    wrong = rayloop(tmp_path, "data", "seal", RAYLOOP_STORAGE__EVENTS="s4://bucket/x")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: storage.events='s4://bucket/x' is no location")
    unknown = rayloop(tmp_path, "erase", "nobody")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert unknown.stderr.startswith("error: no event of this user in tenant 'default'; nothing to erase")
