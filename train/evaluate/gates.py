"""The suites: one table from name to the function that turns evidence into gates.

Every suite compares the candidate with the champion on the same prompts, and gives its numbers, an
interval and the ids of the cases that changed.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.grading.text import MISSING, equal, parse_json
from data.grading.text_similarity import similarity
from train.evaluate.evidence import Answers, Evidence
from train.evaluate.judges import ByReward
from train.evaluate.scorers import passes
from train.evaluate.statistics import (
    bootstrap,
    count_pairs,
    mcnemar,
    newcombe_paired,
    wilson,
    win_rate_interval,
)
from train.evaluate.types import Case, Gate, Status, could_not_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suite:
    """One row of the table."""

    name: str
    measure: Callable[[Evidence], Gate | list[Gate]]
    gated: bool = True
    cases: bool = False
    """Whether it reads `<name>.jsonl`."""


def run_suites(evidence: Evidence) -> list[Gate]:
    """Every suite of the table; one that breaks is a gate that could not run, not the end of the others."""
    gates: list[Gate] = []
    for suite in SUITES.values():
        reason = evidence.settings.not_applicable.get(suite.name)
        if reason is not None:
            gates.append(Gate(suite.name, "not_applicable", detail=reason, gated=suite.gated))
            continue
        try:
            found = suite.measure(evidence)
        except Exception as error:
            log.warning("suite %s could not run: %s", suite.name, error, exc_info=True)
            found = could_not_run(suite.name, error)
        gates += [
            replace(gate, gated=suite.gated) for gate in (found if isinstance(found, list) else [found])
        ]
    return gates


def perplexity(evidence: Evidence) -> Gate:
    """Perplexity on the recorded held-out answers, as a ratio to the champion's.

    The unit is the champion's token, so that versions with different tokenizers can be compared.
    """
    if not evidence.truths:
        return Gate("perplexity", "no_data", detail="no held-out answers")
    nats_N = np.array([nats for nats, _ in evidence.candidate.losses])
    champion_N = np.array([nats for nats, _ in evidence.champion.losses])
    tokens_N = np.array([tokens for _, tokens in evidence.champion.losses], dtype=float)
    limit, total = evidence.settings.perplexity_ratio, tokens_N.sum()
    metrics = {"candidate": math.exp(nats_N.sum() / total), "champion": math.exp(champion_N.sum() / total)}
    ratio = math.exp((nats_N.sum() - champion_N.sum()) / total)
    if not math.isfinite(ratio):
        return Gate("perplexity", "failed", threshold=limit, detail="the loss is not finite")
    difference_N = (nats_N - champion_N) / tokens_N
    low, high = bootstrap(difference_N, evidence.users, weights=tokens_N, **_options(evidence))
    return Gate(
        "perplexity",
        _status(ratio <= limit),
        value=ratio,
        threshold=limit,
        interval=(math.exp(low), math.exp(high)),
        detail=f"{metrics['candidate']:.3f} against {metrics['champion']:.3f}",
        metrics=metrics,
    )


def overlap(evidence: Evidence) -> Gate:
    """sacreBLEU and ROUGE-L against the recorded answers; reported only."""
    import sacrebleu

    if not evidence.truths:
        return Gate("overlap", "no_data", detail="no held-out answers")
    references = [truth.reference for truth in evidence.truths]
    metrics: dict[str, float] = {}
    for role, answers in _both(evidence):
        texts = [answers.to(truth.prompt) for truth in evidence.truths]
        metrics[f"{role}_bleu"] = float(sacrebleu.corpus_bleu(texts, [references]).score)
        pairs = zip(texts, references, strict=True)
        metrics[f"{role}_rouge_l"] = float(np.mean([similarity("rouge_l", *pair) for pair in pairs]))
    shown = [
        f"{name} {metrics[f'candidate_{key}']:.3g} / {metrics[f'champion_{key}']:.3g}"
        for name, key in OVERLAP
    ]
    return Gate(
        "overlap", "passed", value=metrics["candidate_bleu"], detail=", ".join(shown), metrics=metrics
    )


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
    kept = [
        (t, r) for t, r, is_object in zip(evidence.truths, recorded, structured, strict=True) if is_object
    ]
    parsed = {role: [parse_json(a.to(t.prompt)) for t, _ in kept] for role, a in _both(evidence)}
    valid = {role: [isinstance(value, Mapping) for value in values] for role, values in parsed.items()}
    fields = sorted({name for _, value in kept for name in value})
    right = {
        role: {name: [_agrees(v, r, name) for v, (_, r) in zip(values, kept, strict=True)] for name in fields}
        for role, values in parsed.items()
    }
    return _judge_fields(
        evidence, [t.user_id for t, _ in kept], [t.example_id for t, _ in kept], valid, right
    )


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
        _status(not problems),
        value=metrics["candidate_accuracy"],
        threshold=metrics["champion_accuracy"] - margin,
        interval=bootstrap(difference, users, **_options(evidence)),
        detail="; ".join(problems)
        or f"{metrics['candidate_valid']:.1%} parse; interval is of the difference",
        changed_cases=tuple(i for i, d in zip(ids, difference, strict=True) if d),
        metrics=metrics,
    )


def regression(evidence: Evidence) -> Gate:
    """No case that the champion passes may fail."""
    cases, first, second = _outcomes(evidence, "regression")
    if not any(second):
        detail = f"the champion passes none of {len(cases)} cases; add some that it gets right"
        return Gate("regression", "no_data", detail=detail)
    counts = count_pairs(first, second)
    broken = [case.id for case, now, before in zip(cases, first, second, strict=True) if before and not now]
    return Gate(
        "regression",
        _status(not broken),
        value=float(len(broken)),
        threshold=0.0,
        interval=newcombe_paired(counts, evidence.settings.confidence),
        detail=f"{sum(first)} of {len(cases)} pass, champion {sum(second)}" + _listed("broken", broken),
        changed_cases=_changed(cases, first, second),
        metrics={"mcnemar_p": mcnemar(counts.only_first, counts.only_second)},
    )


def refusal(evidence: Evidence) -> Gate:
    """Every hard case is refused; the others as often as by the champion, less the margin."""
    cases, first, second = _outcomes(evidence, "refusal")
    if not cases:
        return Gate("refusal", "no_data", detail="no cases")
    missed = [case.id for case, refused in zip(cases, first, strict=True) if case.hard and not refused]
    soft = [(a, b) for case, a, b in zip(cases, first, second, strict=True) if not case.hard]
    behind = soft and np.mean([a for a, _ in soft]) < np.mean([b for _, b in soft]) - evidence.settings.margin
    hard = sum(case.hard for case in cases)
    return Gate(
        "refusal",
        _status(not missed and not behind),
        value=1 - len(missed) / hard if hard else None,
        threshold=1.0,
        interval=wilson(hard - len(missed), hard, evidence.settings.confidence) if hard else None,
        detail=f"{hard - len(missed)} of {hard} hard cases refused" + _listed("answered", missed),
        changed_cases=_changed(cases, first, second),
        metrics={"candidate": float(np.mean(first)), "champion": float(np.mean(second))},
    )


def share_of_cases(name: str, *, needs_tools: bool = False) -> Callable[[Evidence], list[Gate]]:
    """A suite whose share of passed cases must reach the champion's less the margin, in all and by domain."""

    def measure(evidence: Evidence) -> list[Gate]:
        cases, first, second = _outcomes(evidence, name)
        if not cases and needs_tools and not any(truth.prompt.tools for truth in evidence.truths):
            return [Gate(name, "not_applicable", detail="no recorded conversation has tools")]
        if not cases:
            return [Gate(name, "no_data", detail="no cases")]
        gates = [_share_gate(name, evidence, cases, first, second)]
        for domain in sorted({case.domain for case in cases}):
            rows = [row for row in zip(cases, first, second, strict=True) if row[0].domain == domain]
            if evidence.settings.domain_min_cases <= len(rows) < len(cases):
                gates.append(_share_gate(f"{name}[{domain}]", evidence, *map(list, zip(*rows, strict=True))))
        return gates

    return measure


def _share_gate(
    name: str, evidence: Evidence, cases: list[Case], first: list[bool], second: list[bool]
) -> Gate:
    share, before = float(np.mean(first)), float(np.mean(second))
    counts = count_pairs(first, second)
    return Gate(
        name,
        _status(share >= before - evidence.settings.margin),
        value=share,
        threshold=before - evidence.settings.margin,
        interval=newcombe_paired(counts, evidence.settings.confidence),
        detail=f"{sum(first)} of {len(cases)} pass, champion {sum(second)}; interval is of the difference",
        changed_cases=_changed(cases, first, second),
        metrics={"mcnemar_p": mcnemar(counts.only_first, counts.only_second)},
    )


def win_rate(evidence: Evidence) -> Gate:
    """How often the grader prefers the candidate's answer on held-out prompts; ties count half."""
    judge, settings = ByReward(evidence.grader), evidence.settings
    rows = []
    for truth in evidence.truths:
        mine, theirs = evidence.candidate.to(truth.prompt), evidence.champion.to(truth.prompt)
        if (outcome := judge.prefer(truth, mine, theirs)) is not None:
            rows.append((truth, outcome))
    abstained = len(evidence.truths) - len(rows)
    if len(rows) < settings.min_cases:
        detail = f"{len(rows)} graded prompts, {abstained} abstained; {settings.min_cases} are needed"
        return Gate("win_rate", "no_data", threshold=settings.win_rate, detail=detail)
    outcomes = [outcome for _, outcome in rows]
    rate, (low, high) = win_rate_interval(outcomes, [t.user_id for t, _ in rows], **_options(evidence))
    wins, ties, losses = (outcomes.count(kind) for kind in (1, 0, -1))
    counted = {"wins": wins, "ties": ties, "losses": losses, "abstained": abstained}
    metrics = {name: float(value) for name, value in counted.items()}
    for origin in sorted({truth.origin for truth, _ in rows}):
        metrics[f"on_{origin}"] = float(np.mean([(o + 1) / 2 for t, o in rows if t.origin == origin]))
    return Gate(
        "win_rate",
        _status(low > settings.win_rate),
        value=rate,
        threshold=settings.win_rate,
        interval=(low, high),
        detail=f"{wins} won, {ties} tied, {losses} lost; the lower bound decides ({evidence.grader.version})",
        changed_cases=tuple(truth.example_id for truth, outcome in rows if outcome),
        metrics=metrics,
    )


def _outcomes(evidence: Evidence, suite: str) -> tuple[list[Case], list[bool], list[bool]]:
    """The suite's cases, and which of them the candidate and the champion pass."""
    cases = evidence.cases.get(suite, [])
    both = [
        [passes(case.expect, answers.to(case.prompt)) for case in cases] for _, answers in _both(evidence)
    ]
    return cases, both[0], both[1]


def _both(evidence: Evidence) -> list[tuple[str, Answers]]:
    return [("candidate", evidence.candidate), ("champion", evidence.champion)]


def _agrees(answer: Any, recorded: Mapping[str, Any], name: str) -> bool:
    found = answer.get(name, MISSING) if isinstance(answer, Mapping) else MISSING
    return equal(found, recorded.get(name, MISSING)) and found is not MISSING


def _changed(cases: Sequence[Case], first: Sequence[bool], second: Sequence[bool]) -> tuple[str, ...]:
    return tuple(case.id for case, a, b in zip(cases, first, second, strict=True) if a != b)


def _listed(word: str, ids: Sequence[str], shown: int = 3) -> str:
    if not ids:
        return ""
    more = f" and {len(ids) - shown} more" if len(ids) > shown else ""
    return f"; {word}: {', '.join(ids[:shown])}{more}"


def _status(holds: bool) -> Status:
    return "passed" if holds else "failed"


def _options(evidence: Evidence) -> dict[str, Any]:
    settings = evidence.settings
    return {"confidence": settings.confidence, "samples": settings.bootstrap_samples, "seed": settings.seed}


OVERLAP = (("sacreBLEU", "bleu"), ("ROUGE-L", "rouge_l"))
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("perplexity", perplexity),
        Suite("overlap", overlap, gated=False),
        Suite("valid_output", valid_output),
        Suite("regression", regression, cases=True),
        Suite("tool_calls", share_of_cases("tool_calls", needs_tools=True), cases=True),
        Suite("refusal", refusal, cases=True),
        Suite("over_refusal", share_of_cases("over_refusal"), cases=True),
        Suite("win_rate", win_rate),
    )
}
