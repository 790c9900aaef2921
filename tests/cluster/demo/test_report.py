import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.demo.cli import exit_code
from cluster.demo.held_out import Accuracy, wilson
from cluster.demo.report import Findings, Moment, Row, markdown, outcome, write

SCHEMA = {
    "seed", "base_accuracy", "promoted_accuracy", "promoted_version", "rolled_back_version", "loop_seconds", "stages",
}  # fmt: skip


def row(name: str, version: str | None, right: int) -> Row:
    return Row(name, version, Accuracy(wilson(right, 100), wilson(right - 5, 100), wilson(99, 100)))


@pytest.fixture
def findings() -> Findings:
    gates = [
        {"suite": "win_rate", "status": "passed", "value": 0.61},
        {"suite": "refusal", "status": "not_applicable", "value": None},
    ]
    return Findings(
        seed=4,
        shuffled=False,
        simulated="Simulated: everything.",
        rows=[row("base", "triage/1", 65), row("sft", "triage/2", 90), row("promoted", "triage/2", 90)],
        gates=[{"version": "triage/2", "passed": True, "gates": gates}],
        moments=[Moment(1.0, 0.1, "triage/2"), Moment(2.0, 1.0, "triage/2")],
        promoted="triage/2",
        rolled_back="triage/5",
        rolled_back_reason="satisfaction is worse",
        loop_seconds=12.3,
        stages={"base": 3.0, "traffic": 9.3},
        urls={"api": "http://127.0.0.1:1/v1"},
    )


def test_summary_has_the_promised_fields(findings: Findings) -> None:
    summary = json.loads(json.dumps(findings.summary(), allow_nan=False))
    assert set(summary) >= SCHEMA
    assert summary["base_accuracy"] == 0.65 and summary["promoted_accuracy"] == 0.9
    assert summary["promoted_version"] == "triage/2" and summary["rolled_back_version"] == "triage/5"
    assert summary["stages"] == {"base": 3.0, "traffic": 9.3} and summary["loop_seconds"] == 12.3
    assert summary["held_out"][0]["verdict"] == pytest.approx(
        {"value": 0.65, "low": 0.5525, "high": 0.7364, "total": 100}, abs=1e-4
    )


NOTHING = {"promoted": None, "rolled_back": None}


@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        ({}, 0, None),
        ({**NOTHING, "why_not": "no version passed"}, 3, "nothing was promoted: no version passed"),
        (
            {"rolled_back": None, "why_kept": "the rollout of triage/5 ended undecided: the time was up"},
            3,
            "the damaged version was not rolled back: the rollout of triage/5 ended undecided: the time was up",
        ),
        ({"shuffled": True}, 3, "triage/2 was promoted on shuffled feedback"),
        ({"shuffled": True, **NOTHING}, 0, None),
    ],
)
def test_exit_code_and_summary_tell_an_undecided_demo_from_a_good_one(
    findings: Findings, change: dict[str, Any], code: int, why: str | None
) -> None:
    found = replace(findings, **change)
    assert exit_code(found) == code
    assert found.summary()["inconclusive"] == why


def test_summary_of_a_run_that_promoted_nothing(findings: Findings) -> None:
    found = replace(
        findings, shuffled=True, promoted=None, rolled_back=None, rows=findings.rows[:2], why_not="no version passed"
    )
    summary = found.summary()
    assert summary["promoted_version"] is None and summary["promoted_accuracy"] is None
    assert summary["rolled_back_version"] is None and summary["shuffle_feedback"] is True
    assert outcome(found) == "Nothing was promoted: no version passed"


def test_report_is_written_whole(findings: Findings, tmp_path: Path) -> None:
    paths = write(findings, tmp_path)
    assert json.loads(paths["json"].read_text()) == json.loads(json.dumps(findings.summary()))
    text = paths["md"].read_text()
    for said in (
        "65.0 % → 90.0 %",
        "triage/5 was rolled back: satisfaction is worse",
        "Simulated: everything.",
        "passed 0.61",
    ):
        assert said in text
    for name in ("accuracy", "rollout", "time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{name}]({name}.png)" in text
    page = paths["html"].read_text()
    assert page.count("data:image/png;base64,") == 3 and "http://127.0.0.1:1/v1" in page


def test_report_escapes_what_others_wrote(findings: Findings, tmp_path: Path) -> None:
    found = replace(findings, rolled_back_reason="<script>alert(1)</script>")
    assert "<script>" not in write(found, tmp_path)["html"].read_text()


def test_report_without_anything_measured_still_tells_the_outcome() -> None:
    found = Findings(seed=1, shuffled=False, simulated="", why_not="no version passed its gates")
    assert "Nothing was promoted: no version passed its gates" in markdown(found, {})
