"""Do grader and reward model still say what people say, and are they as sure as they may be?

People's recent preferences between two answers are the measure. A reward r counts as the log odds log(r / (1 - r)), so
the difference of two answers is how sure a grader is of its preference: a calibrated one is right in 80 % of the pairs
where it says 80 %. Where a reward model is not, the temperature that would mend it is a new version of its grader.
"""

import logging
import math
from collections.abc import Sequence

from data.grading import Grader
from data.grading.reward_model import RewardModel
from data.labelling.requests import JudgedPair
from train.evaluate.evidence import Evidence
from train.evaluate.statistics import wilson
from train.evaluate.types import Gate, outcome

log = logging.getLogger(__name__)

SUITE = "calibration"
SMALLEST = 1e-9
"""A reward counts as at least this far from 0 and 1: its log odds stay finite."""


def calibration(evidence: Evidence) -> list[Gate]:
    """Agreement with people's preferences and calibration, of the grader and of the reward model; reported."""
    return [_gate(name, grader, evidence) for name, grader in judges(evidence).items()]


def judges(evidence: Evidence) -> dict[str, Grader]:
    """What is held against people, by the name of its gate."""
    found = {SUITE: evidence.grader}
    if evidence.reward_model is not None:
        found[f"{SUITE}[reward_model]"] = evidence.reward_model
    return found


def _gate(name: str, grader: Grader, evidence: Evidence) -> Gate:
    from train.calibration import measure_margins

    settings, threshold = evidence.settings, evidence.settings.drift_agreement
    margins = [m for m in margins_of(grader, evidence.judged) if m is not None]
    if len(margins) < settings.min_cases:
        detail = (
            f"{grader.version} has an opinion on {len(margins)} of {len(evidence.judged)} pairs that people have "
            f"judged in {settings.calibration_days:g} days; {settings.min_cases} are needed"
        )
        return Gate(name, "no_data", threshold=threshold, detail=detail)
    agreement, error, temperature = measure_margins(margins)
    low, high = wilson(round(agreement * len(margins)), len(margins), settings.confidence)
    drifted = high < threshold or error > settings.calibration_error
    if drifted:
        log.warning("drift: %s agrees with people in %.0f%%, calibration error %.2f", name, 100 * agreement, error)
    return Gate(
        name,
        outcome(not drifted),
        value=agreement,
        threshold=threshold,
        interval=(low, high),
        detail=f"{grader.version} agrees with people in {agreement:.0%} of {len(margins)} pairs; calibration error "
        f"{error:.3f}, at most {settings.calibration_error:g}",
        metrics={
            "agreement": agreement,
            "calibration_error": error,
            "temperature": temperature,
            "pairs": float(len(margins)),
            "alert": float(drifted),
        },
    )


def margins_of(grader: Grader, pairs: Sequence[JudgedPair]) -> list[float | None]:
    """Log odds that a grader gives the preferred answer over the other; `None` where it abstains."""
    return [_margin(grader, pair) for pair in pairs]


def refitted(evidence: Evidence, gates: Sequence[Gate]) -> list[RewardModel]:
    """Graders of reward models with the temperature that fits people's judgements, where the one in force does not."""
    found = []
    for gate in gates:
        grader = judges(evidence).get(gate.suite)
        wrong = gate.metrics.get("calibration_error", 0.0) > evidence.settings.calibration_error
        if wrong and isinstance(grader, RewardModel):
            found.append(grader.refitted(gate.metrics["temperature"]))
    return found


def _margin(grader: Grader, pair: JudgedPair) -> float | None:
    item = {"messages": list(pair.messages), "example_id": pair.item_id}
    rewards = [grader.grade(item, {"output_text": text}).reward for text in (pair.preferred, pair.other)]
    if rewards[0] is None or rewards[1] is None:
        return None
    return _log_odds(rewards[0]) - _log_odds(rewards[1])


def _log_odds(reward: float) -> float:
    inside = min(max(reward, SMALLEST), 1 - SMALLEST)
    return math.log(inside / (1 - inside))
