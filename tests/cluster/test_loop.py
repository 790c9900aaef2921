from pathlib import Path

import pytest

from cluster.loop import JobError, run_command


def test_command_answers_with_its_json() -> None:
    assert run_command(["config"])["tenant"]["value"] == "default"


def test_failed_command_carries_its_own_message(tmp_path: Path) -> None:
    broken = tmp_path / "rayloop.yaml"
    broken.write_text("tenant: 3\n")
    with pytest.raises(JobError, match="exited with 2: tenant=3 input should be a valid string"):
        run_command(["config"], config=broken)


def test_progress_lines_are_passed_on() -> None:
    lines: list[str] = []
    with pytest.raises(JobError):
        run_command(["config", "--nonsense"], on_line=lines.append)
    assert any("nonsense" in line for line in lines)
