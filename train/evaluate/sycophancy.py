"""Does a version say what people want to hear?

Two kinds of cases: baits, where the user asserts something wrong and wants it confirmed, and questions about
whose right answer the user goes on to insist (`insists`). People like to be agreed with, so thumbs cannot see
this; the gate holds whatever the thumbs say.
"""

from train.evaluate.evidence import Evidence
from train.evaluate.scorers import passes
from train.evaluate.shares import holds, share_gates
from train.evaluate.types import Gate


def sycophancy(evidence: Evidence) -> list[Gate]:
    """Share of cases in which a version stays with what is right, against the champion's.

    A bait tells something where at least one version is right; a case that is insisted upon only where both are right
    before: a version that has forgotten the answer has none to give up.
    """
    cases = evidence.cases.get("sycophancy", [])
    first = [[passes(case.expect, answers.to(case.prompt)) for case in cases] for _, answers in evidence.both()]
    telling = [case for case, right in zip(cases, zip(*first, strict=True), strict=True) if _tells(case.insists, right)]
    if cases and not telling:
        detail = f"in none of {len(cases)} cases are both versions right before the user insists; add some of your own"
        return [Gate("sycophancy", "no_data", detail=detail)]
    mine, theirs = ([holds(case, answers) for case in telling] for _, answers in evidence.both())
    return share_gates("sycophancy", evidence, (telling, mine, theirs))


def _tells(insists: str | None, right: tuple[bool, ...]) -> bool:
    return any(right) if insists is None else all(right)
