"""The suites that decide which version is better: win rate, and its negative control."""

import functools
import math
from dataclasses import replace

import numpy as np

from train.evaluate.evidence import Evidence
from train.evaluate.judges import BothOrders, ByReward, PairwiseJudge, SideBySide
from train.evaluate.statistics import win_rate_interval
from train.evaluate.types import Gate, Truth, outcome


def win_rate(evidence: Evidence) -> Gate:
    """How often the judge, or the grader, prefers the candidate's answer on held-out prompts; ties count half.

    A judge that sees both answers is asked in both orders; a preference that does not survive the swap is a tie.
    """
    settings = evidence.settings
    rows = _judged(evidence, decider(evidence))
    abstained = len(evidence.truths) - len(rows)
    if len(rows) < settings.min_cases:
        detail = f"{len(rows)} graded prompts, {abstained} abstained; {settings.min_cases} are needed"
        return Gate("win_rate", "no_data", threshold=settings.win_rate, detail=detail)
    outcomes = [won for _, won in rows]
    rate, (low, high) = win_rate_interval(outcomes, [t.user_id for t, _ in rows], **evidence.options())
    wins, ties, losses = (outcomes.count(kind) for kind in (1, 0, -1))
    counted = {"wins": wins, "ties": ties, "losses": losses, "abstained": abstained}
    metrics = {name: float(value) for name, value in counted.items()}
    for origin in sorted({truth.origin for truth, _ in rows}):
        metrics[f"on_{origin}"] = float(np.mean([(o + 1) / 2 for t, o in rows if t.origin == origin]))
    return Gate(
        "win_rate",
        outcome(low > settings.win_rate),
        value=rate,
        threshold=settings.win_rate,
        interval=(low, high),
        detail=f"{wins} won, {ties} tied, {losses} lost; the lower bound decides "
        f"({(evidence.judge or evidence.grader).version})",
        changed_cases=tuple(truth.example_id for truth, won in rows if won),
        metrics=metrics,
    )


def shuffled_control(evidence: Evidence) -> Gate:
    """Whether the win depends on which prompt each recorded answer belongs to, for whoever decides the win rate.

    Recorded answers are dealt out anew among prompts of the same origin, many times. A candidate that
    learned what people want on a prompt wins more often with the true pairing than with nearly any of
    these; one that only learned which answers are common, as from feedback that says nothing, does not.
    A team whose feedback is about style alone, the same on every prompt, marks this suite not applicable.
    It says nothing of a judge that does not look at the recorded answers.
    The p-value is that of a permutation test (Phipson and Smyth 2010, arXiv:1603.05766).
    """
    settings, judge = evidence.settings, decider(evidence)
    rows = _judged(evidence, judge)
    alpha = 1 - settings.confidence
    if len(rows) < settings.min_cases:
        return Gate("shuffled_control", "no_data", threshold=alpha, detail=f"{len(rows)} graded prompts")
    truths = [truth for truth, _ in rows]
    if len({(t.origin, t.reference) for t in truths}) == len({t.origin for t in truths}):
        detail = "all recorded answers are the same, so dealing them out anew changes nothing"
        return Gate("shuffled_control", "not_applicable", threshold=alpha, detail=detail)
    observed = float(np.mean([won for _, won in rows]))
    dealt = _dealt(evidence, judge, truths)
    if evidence.judge is not None and all(outcomes == [won for _, won in rows] for outcomes in dealt):
        detail = f"{evidence.judge.version} says the same whatever was recorded: it does not look at recorded answers"
        return Gate("shuffled_control", "not_applicable", threshold=alpha, detail=detail)
    shuffled = [float(np.mean(outcomes)) for outcomes in dealt]
    p_value = (1 + sum(mean >= observed for mean in shuffled)) / (1 + len(shuffled))
    usual = (float(np.mean(shuffled)) + 1) / 2
    return Gate(
        "shuffled_control",
        outcome(p_value <= alpha),
        value=p_value,
        threshold=alpha,
        detail=f"win rate {(observed + 1) / 2:.3f}, {usual:.3f} with recorded answers of other prompts "
        f"({(evidence.judge or evidence.grader).version})",
        metrics={"p": p_value, "shuffled_win_rate": usual},
    )


def decider(evidence: Evidence) -> PairwiseJudge:
    """Who says which answer is better: the judge where there is one, asked in both orders, else the grader."""
    return BothOrders(SideBySide(evidence.judge)) if evidence.judge else ByReward(evidence.grader)


def _judged(evidence: Evidence, judge: PairwiseJudge) -> list[tuple[Truth, int]]:
    """The truths that could be judged, each with 1 for a win, 0 for a tie, -1 for a loss."""
    rows = []
    for truth in evidence.truths:
        mine, theirs = evidence.candidate.to(truth.prompt), evidence.champion.to(truth.prompt)
        if (won := judge.prefer(truth, mine, theirs)) is not None:
            rows.append((truth, won))
    return rows


def _dealt(evidence: Evidence, judge: PairwiseJudge, truths: list[Truth]) -> list[list[int]]:
    """The outcomes of the truths under each permutation of the references within their origin."""

    @functools.cache
    def judged(position: int, reference: str) -> int:
        truth = replace(truths[position], reference=reference)
        mine, theirs = evidence.candidate.to(truth.prompt), evidence.champion.to(truth.prompt)
        return 0 if mine == theirs else judge.prefer(truth, mine, theirs) or 0

    origins = np.array([truth.origin for truth in truths])
    generator = np.random.default_rng(evidence.settings.seed)
    dealt = []
    for _ in range(_permutations(evidence)):
        order = np.arange(len(truths))
        for origin in np.unique(origins):
            places = np.flatnonzero(origins == origin)
            order[places] = generator.permutation(places)
        dealt.append([judged(i, truths[j].reference) for i, j in enumerate(order.tolist())])
    return dealt


def _permutations(evidence: Evidence) -> int:
    """So many that the smallest p-value there can be lies at or below what is asked."""
    settings = evidence.settings
    chosen = settings.permutations if evidence.judge is None else settings.judge_permutations
    return max(chosen, math.ceil(1 / (1 - settings.confidence) - 1e-9) - 1)
