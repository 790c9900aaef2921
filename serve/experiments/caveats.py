"""What must be said beside a claim: anomalies that are not proven, and that reactions mislead when the arms' users do
not react equally often.

A candidate that annoys its critics into silence has happier feedback. No test of the reactions themselves
can see that, so every decision to go on says it where the response rates differ.
"""

from cluster.settings.experiments import ExperimentSettings
from serve.experiments.evidence import Evidence, Reading


def caveats(evidence: Evidence, settings: ExperimentSettings) -> tuple[str, ...]:
    """Sentences to go with any claim about the candidate; empty where there is nothing to say."""
    return (*_unproven(evidence), *_unequal_responses(evidence, settings))


def _unproven(evidence: Evidence) -> tuple[str, ...]:
    said = [anomaly.said for anomaly in evidence.anomalies if not anomaly.is_certain]
    return (f"routers saw it out of the ordinary at times, which may be chance: {'; '.join(said)}",) if said else ()


def _unequal_responses(evidence: Evidence, settings: ExperimentSettings) -> tuple[str, ...]:
    response = evidence.response
    if response is None or response.harm is None or not response.control.mean:
        return ()
    fall = response.harm / response.control.mean
    if is_certainly_different(response, settings) or abs(fall) >= settings.response_drop:
        return (_heterogeneous(response, fall, settings),)
    return ()


def is_certainly_different(response: Reading, settings: ExperimentSettings) -> bool:
    """The arms react unequally often, by the always-valid evidence."""
    return response.e_value is not None and response.e_value >= 1 / settings.alpha


def _heterogeneous(response: Reading, fall: float, settings: ExperimentSettings) -> str:
    certain = "for certain" if is_certainly_different(response, settings) else "as it looks"
    way = "less" if fall > 0 else "more"
    return (
        f"the candidate's users react {way} often {certain} ({response.candidate.mean:.3g} against "
        f"{response.control.mean:.3g} of answers), so what they say may come from other users than control's"
    )
