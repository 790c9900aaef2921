"""Suites of cases that an answer passes or fails, and whose share of passed cases is compared.

A case that the user goes on to argue about (`insists`) is passed when the answer to that holds too.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from train.evaluate.evidence import Answers, Evidence
from train.evaluate.scorers import passes
from train.evaluate.statistics import bootstrap, count_pairs, mcnemar, newcombe_paired
from train.evaluate.types import Case, Gate, outcome

Outcomes = tuple[list[Case], list[bool], list[bool]]
"""The cases, and which of them the candidate and the champion pass."""


class Judge(Protocol):
    """Makes a gate of cases and of which of them the candidate and the champion pass."""

    def __call__(
        self, name: str, evidence: Evidence, cases: list[Case], first: list[bool], second: list[bool]
    ) -> Gate: ...


def share_of_cases(name: str) -> Callable[[Evidence], list[Gate]]:
    """A suite whose share of passed cases must reach the champion's less the margin, in all and by domain."""
    return lambda evidence: share_gates(name, evidence, outcomes(evidence, name))


def outcomes(evidence: Evidence, suite: str) -> Outcomes:
    """The suite's cases with both versions' outcomes."""
    cases = evidence.cases.get(suite, [])
    both = [[holds(case, answers) for case in cases] for _, answers in evidence.both()]
    return cases, both[0], both[1]


def holds(case: Case, answers: Answers) -> bool:
    """Whether a version passes a case, also after the user insisted."""
    first = passes(case.expect, answers.to(case.prompt))
    return first and (case.insists is None or passes(case.expect, answers.after(case)))


def share_gates(name: str, evidence: Evidence, found: Outcomes) -> list[Gate]:
    """One gate for all cases, and one for each domain that has enough of them."""
    if not found[0]:
        return [Gate(name, "no_data", detail="no cases")]
    return by_domain(name, evidence, found, _share_gate)


def by_domain(name: str, evidence: Evidence, found: Outcomes, judge: Judge) -> list[Gate]:
    """The gate of all cases, and that of each domain with enough of them and something to lose there."""
    cases = found[0]
    gates = [judge(name, evidence, *found)]
    for domain in sorted({case.domain for case in cases}):
        rows = [row for row in zip(*found, strict=True) if row[0].domain == domain]
        if evidence.settings.domain_min_cases <= len(rows) < len(cases):
            gate = judge(f"{name}[{domain}]", evidence, *map(list, zip(*rows, strict=True)))
            gates += [gate] if gate.status != "no_data" else []
    return gates


def _share_gate(name: str, evidence: Evidence, cases: list[Case], first: list[bool], second: list[bool]) -> Gate:
    share, before = float(np.mean(first)), float(np.mean(second))
    counts = count_pairs(first, second)
    return Gate(
        name,
        outcome(share >= before - evidence.settings.margin),
        value=share,
        threshold=before - evidence.settings.margin,
        interval=newcombe_paired(counts, evidence.settings.confidence),
        detail=f"{sum(first)} of {len(cases)} pass, champion {sum(second)}; interval is of the difference",
        changed_cases=changed(cases, first, second),
        metrics={"mcnemar_p": mcnemar(counts.only_first, counts.only_second)},
    )


def anchor(evidence: Evidence) -> list[Gate]:
    """General ability, in all and by domain."""
    return by_domain("anchor", evidence, outcomes(evidence, "anchor"), _anchor_gate)


def _anchor_gate(name: str, evidence: Evidence, cases: list[Case], first: list[bool], second: list[bool]) -> Gate:
    """The whole interval of the difference to the champion lies above minus the margin.

    Bootstrapped over cases, so that a version which answers every case as the champion does is not held to be
    uncertain; with few cases a single one that it has forgotten closes the gate.
    """
    if not any(second):
        detail = f"the champion passes none of {len(cases)} cases; add some that it gets right"
        return Gate(name, "no_data", detail=detail)
    difference_N = np.array(first, dtype=float) - np.array(second, dtype=float)
    low, high = bootstrap(difference_N, [case.id for case in cases], **evidence.options())
    counts, margin = count_pairs(first, second), evidence.settings.margin
    return Gate(
        name,
        outcome(low >= -margin),
        value=float(difference_N.mean()),
        threshold=-margin,
        interval=(low, high),
        detail=f"{sum(first)} of {len(cases)} pass, champion {sum(second)}; the lower bound of the difference decides",
        changed_cases=changed(cases, first, second),
        metrics={"mcnemar_p": mcnemar(counts.only_first, counts.only_second)},
    )


def changed(cases: Sequence[Case], first: Sequence[bool], second: Sequence[bool]) -> tuple[str, ...]:
    """Ids of the cases that one version passes and the other does not."""
    return tuple(case.id for case, a, b in zip(cases, first, second, strict=True) if a != b)
