"""The suite of structured tasks: do answers parse, and is each field right."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.grading.text import MISSING, equal, parse_json
from train.evaluate.evidence import Evidence
from train.evaluate.statistics import bootstrap, count_pairs, mcnemar
from train.evaluate.types import Gate, outcome


def valid_output(evidence: Evidence) -> Gate:
    """Share of answers that parse, and accuracy per field against recorded truth.

    Both shares must reach the champion's less the margin. A single field fails the gate only when its
    loss is also significant: on a few hundred cases one field moves by a point from chance alone.
    """
    recorded = [parse_json(truth.reference) for truth in evidence.truths]
    structured = [isinstance(value, Mapping) for value in recorded]
    settings = evidence.settings
    if not recorded:
        return Gate("valid_output", "no_data", detail="no held-out answers")
    if np.mean(structured) < settings.structured_share:
        detail = f"{np.mean(structured):.0%} of the recorded answers are JSON objects: not a structured task"
        return Gate("valid_output", "not_applicable", detail=detail)
    kept = [(t, r) for t, r, is_object in zip(evidence.truths, recorded, structured, strict=True) if is_object]
    parsed = {role: [parse_json(a.to(t.prompt)) for t, _ in kept] for role, a in evidence.both()}
    valid = {role: [isinstance(value, Mapping) for value in values] for role, values in parsed.items()}
    fields = sorted({name for _, value in kept for name in value})
    right = {
        role: {name: [_agrees(v, r, name) for v, (_, r) in zip(values, kept, strict=True)] for name in fields}
        for role, values in parsed.items()
    }
    return _judge_fields(evidence, [t.user_id for t, _ in kept], [t.example_id for t, _ in kept], valid, right)


def _judge_fields(
    evidence: Evidence,
    users: Sequence[str],
    ids: Sequence[str],
    valid: dict[str, list[bool]],
    right: dict[str, dict[str, list[bool]]],
) -> Gate:
    margin, alpha = evidence.settings.margin, 1 - evidence.settings.confidence
    metrics = {f"{role}_valid": float(np.mean(flags)) for role, flags in valid.items()}
    accuracy = {role: np.mean(list(of.values()), axis=0) for role, of in right.items()}
    metrics |= {f"{role}_accuracy": float(rows.mean()) for role, rows in accuracy.items()}
    problems = []
    if metrics["candidate_valid"] < metrics["champion_valid"] - margin:
        problems.append("fewer answers parse")
    if metrics["candidate_accuracy"] < metrics["champion_accuracy"] - margin:
        problems.append("accuracy over all fields fell")
    for name, rows in right["candidate"].items():
        counts = count_pairs(rows, right["champion"][name])
        metrics |= {
            f"candidate_{name}": float(np.mean(rows)),
            f"champion_{name}": float(np.mean(right["champion"][name])),
        }
        if counts.difference < -margin and mcnemar(counts.only_first, counts.only_second) < alpha:
            problems.append(f"{name} fell by {-counts.difference:.1%}")
    difference = accuracy["candidate"] - accuracy["champion"]
    return Gate(
        "valid_output",
        outcome(not problems),
        value=metrics["candidate_accuracy"],
        threshold=metrics["champion_accuracy"] - margin,
        interval=bootstrap(difference, users, **evidence.options()),
        detail="; ".join(problems) or f"{metrics['candidate_valid']:.1%} parse; interval is of the difference",
        changed_cases=tuple(i for i, d in zip(ids, difference, strict=True) if d),
        metrics=metrics,
    )


def _agrees(answer: Any, recorded: Mapping[str, Any], name: str) -> bool:
    found = answer.get(name, MISSING) if isinstance(answer, Mapping) else MISSING
    return equal(found, recorded.get(name, MISSING)) and found is not MISSING
