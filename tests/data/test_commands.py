"""The commands `import`, `audit`, `verify` and `lineage` as a person or a script runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import Settings, load_settings
from tests.data.test_importers import THUMB, jsonl


def rayloop(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data", *arguments],
        env={**os.environ, "RAYLOOP_HOME": str(home), **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


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
