"""The drift alert: do the grader and the reward model still prefer the same answers?

The two were made from the same people's feedback in different ways. Where one of them has drifted (a
rubric nobody updated, a reward model that an adapter learned to please) they come apart before any of
the two looks wrong by itself.
"""

import logging

from train.evaluate.evidence import Evidence
from train.evaluate.judges import ByReward
from train.evaluate.statistics import wilson
from train.evaluate.types import Gate, outcome

log = logging.getLogger(__name__)


def grader_drift(evidence: Evidence) -> Gate:
    """How often grader and reward model prefer the same of the two versions' answers; ties are left out."""
    settings, threshold = evidence.settings, evidence.settings.drift_agreement
    if evidence.reward_model is None:
        return Gate("grader_drift", "not_applicable", threshold=threshold, detail="no reward model is set")
    grader, model = ByReward(evidence.grader), ByReward(evidence.reward_model)
    same: dict[str, bool] = {}
    for truth in evidence.truths:
        answers = evidence.candidate.to(truth.prompt), evidence.champion.to(truth.prompt)
        preferred = grader.prefer(truth, *answers), model.prefer(truth, *answers)
        if preferred[0] and preferred[1]:
            same[truth.example_id] = preferred[0] == preferred[1]
    if len(same) < settings.min_cases:
        detail = f"{len(same)} prompts on which both have a preference; {settings.min_cases} are needed"
        return Gate("grader_drift", "no_data", threshold=threshold, detail=detail)
    agreed = sum(same.values())
    low, high = wilson(agreed, len(same), settings.confidence)
    names = f"{evidence.grader.version} and {evidence.reward_model.version}"
    if high < threshold:
        log.warning("drift: %s agree on %d of %d answers", names, agreed, len(same))
    return Gate(
        "grader_drift",
        outcome(high >= threshold),
        value=agreed / len(same),
        threshold=threshold,
        interval=(low, high),
        detail=f"{names} agree on {agreed} of {len(same)}; the upper bound decides",
        changed_cases=tuple(name for name, agree in same.items() if not agree),
        metrics={"agreement": agreed / len(same), "alert": float(high < threshold)},
    )
