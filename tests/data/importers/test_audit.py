import json
from pathlib import Path

import pytest

from cluster.errors import InputError
from cluster.settings import Settings
from data.importers.audit import audit_sources, flatten, to_markdown
from data.importers.baselines import baseline_scores, macro_scores
from data.importers.source import file_source


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_audit_describes_columns_labels_and_relations(settings: Settings, tmp_path: Path) -> None:
    answers = [
        {
            "id": f"a{n}",
            "note": "",
            "latency": n,
            "answer": {"text": f"{'good' if n % 4 else 'bad'} answer {n}", "ok": bool(n % 4)},
        }
        for n in range(40)
    ]
    votes = [{"vote": f"v{n}", "answer_id": f"a{n}"} for n in range(10)]
    files = [write(tmp_path / "answers.jsonl", [*answers, [1]]), write(tmp_path / "votes.jsonl", votes)]
    report = audit_sources([file_source(f) for f in files], settings)
    source = report["sources"][0]
    assert (source["rows"], source["bad_rows"]) == (41, 1)
    columns = {c["name"]: c for c in source["columns"]}
    assert columns["note"]["filled"] == 0
    assert (columns["latency"]["min"], columns["latency"]["max"], columns["id"]["distinct"]) == (0, 39, 40)
    (label,) = source["labels"]
    assert (label["name"], label["balance"], label["text"]) == (
        "answer.ok",
        {"True": 0.75, "False": 0.25},
        "answer.text",
    )
    always, linear = label["baselines"]
    assert (always["precision"], always["recall"], linear["f1"]) == (0.375, 0.5, 1.0)
    assert report["relations"] == [
        {"from": "answers.jsonl:id", "to": "votes.jsonl:answer_id", "shared_values": 10, "share": 1.0}
    ]
    text = to_markdown(report)
    assert "Empty: note." in text
    assert "share 10 values (100%)" in text


def test_label_with_too_few_rows_gets_no_baseline(settings: Settings) -> None:
    assert baseline_scores(["a"] * 9 + ["b"] * 3, ["x"] * 12, settings.audit) == []


def test_macro_scores_by_hand() -> None:
    # a: precision 2/3, recall 2/2; b: precision 1/1, recall 1/2
    assert macro_scores(["a", "a", "b", "b"], ["a", "a", "a", "b"]) == {
        "rows": 4,
        "precision": 0.8333,
        "recall": 0.75,
        "f1": 0.7333,
    }


def test_flatten_names_nested_fields_and_keeps_lists() -> None:
    assert dict(flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": {}})) == {"a.b.c": 1, "a.d": [2], "e": {}}


def test_missing_file_is_one_clear_error(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        audit_sources([file_source(tmp_path / "none")], settings)
