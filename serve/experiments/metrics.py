"""The table of metrics: what each means, which way is better, and how it comes out of events.

Every event about an interaction contributes `(metric, value)` observations to that interaction's user;
per user only their count and their total are kept. Nothing here reads a database.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson

from cluster.errors import InputError
from cluster.settings.experiments import OUTCOME_PREFIX, ExperimentSettings
from data.detectors.interface import YES

Kind = Literal["user_mean", "ratio", "proportion"]
HALF = 0.5  # an answer that is ungrounded by half counts as a hallucination


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Kind
    """`user_mean`: every user weighs the same. `ratio`: total over count. `proportion`: a ratio of events."""
    better: Literal["higher", "lower"]
    margin: float
    """How much worse counts as harm; absolute for rare events, 5 % of control's mean elsewhere."""
    relative: bool
    description: str
    bounds: tuple[float, float] | None = (0.0, 1.0)
    """Smallest and largest value there can be; `None` where nobody knows."""


_TABLE = (
    Metric("satisfaction", "user_mean", "higher", 0.05, False, "users' mean explicit reward, in [-1, 1]", (-1.0, 1.0)),
    Metric("thumbs_up_rate", "proportion", "higher", 0.03, False, "thumbs up among all thumbs"),
    Metric("rating", "ratio", "higher", 0.1, False, "mean rating, 1 to 5", (1.0, 5.0)),
    Metric("error_rate", "proportion", "lower", 0.005, False, "failed or answered by the fallback"),
    Metric("latency_over_slo", "proportion", "lower", 0.01, False, "slower than `experiment.latency_slo_s`"),
    Metric("ttft_over_slo", "proportion", "lower", 0.01, False, "first token after `experiment.ttft_slo_s`"),
    Metric("refusal_rate", "proportion", "lower", 0.01, False, "refused or filtered"),
    Metric("safety_incident_rate", "proportion", "lower", 0.001, False, "stopped by a filter"),
    Metric("feedback_response_rate", "proportion", "higher", 0.05, True, "with any explicit feedback"),
    Metric("tool_error_rate", "proportion", "lower", 0.01, False, "failed results among those of the tools called"),
    Metric("hallucination_rate", "proportion", "lower", 0.01, False, "graded answers that their context does not bear"),
    Metric("toxicity_rate", "proportion", "lower", 0.005, False, "sampled answers that the toxicity detector marks"),
    Metric("win_rate", "ratio", "higher", 0.03, False, "wins over the other arm's shadow answer, a tie one half"),
    Metric("grader_score", "ratio", "higher", 0.05, True, "mean grade in [0, 1], abstentions left out"),
)
METRICS = {metric.name: metric for metric in _TABLE}

Observation = tuple[str, float]


def find_metric(name: str, settings: ExperimentSettings | None = None) -> Metric:
    """The metric of that name, with the margin in force; `outcome:NAME` is any outcome a product reports.

    Raises:
        InputError: no such metric.
    """
    metric = METRICS.get(name)
    if metric is None and name.startswith(OUTCOME_PREFIX) and len(name) > len(OUTCOME_PREFIX):
        metric = Metric(name, "ratio", "higher", 0.05, True, f"mean of the outcome {name[len(OUTCOME_PREFIX) :]}", None)
    if metric is None:
        known = ", ".join([*METRICS, f"{OUTCOME_PREFIX}NAME"])
        raise InputError("metric", name, f"must be one of {known}", "name a known metric")
    if settings and name in settings.margins:
        return replace(metric, margin=settings.margins[name], relative=False)
    return metric


def is_failed(body: dict[str, Any]) -> bool:
    """True for an error of the arm assigned: failed, timed out, or answered by the fallback in its place.

    A client that went away is no error.
    """
    flags = body.get("flags", {})
    return bool(flags.get("error") or flags.get("fallback") or flags.get("timeout"))


def is_rejected(body: dict[str, Any]) -> bool:
    """True for a request that was turned down for what it asks or for want of room: it tells nothing of the arm."""
    return bool(body.get("flags", {}).get("rejected")) and not is_failed(body)


def of_interaction(body: dict[str, Any], settings: ExperimentSettings) -> Iterator[Observation]:
    """What one request says."""
    flags = body.get("flags", {})
    response = body.get("response") or {}
    yield "error_rate", float(is_failed(body))
    yield "latency_over_slo", float(body.get("latency_s", 0.0) > settings.latency_slo_s)
    if body.get("ttft_s") is not None:
        yield "ttft_over_slo", float(body["ttft_s"] > settings.ttft_slo_s)
    refused = bool(response.get("refusal")) or body.get("finish_reason") == "content_filter"
    yield "refusal_rate", float(refused)
    yield "safety_incident_rate", float(bool(flags.get("safety")))
    for failed in tool_results(body.get("messages") or []):
        yield "tool_error_rate", float(failed)


def tool_results(messages: list[dict[str, Any]]) -> Iterator[bool]:
    """Whether each tool result that this request brings failed: those after the last answer of the model."""
    for message in reversed(messages):
        if message.get("role") != "tool":
            return
        yield bool(message.get("is_error")) or _is_error_object(message.get("content"))


def _is_error_object(content: Any) -> bool:
    if not isinstance(content, str) or not content.lstrip().startswith("{"):
        return False
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        return False
    return bool(document.get("error") or document.get("isError"))


def is_explicit(body: dict[str, Any]) -> bool:
    """True for feedback somebody gave on purpose."""
    return bool(body.get("source", "explicit") == "explicit")


def of_feedback(body: dict[str, Any]) -> Iterator[Observation]:
    """What one signal says; implicit ones are not part of any metric here."""
    if not is_explicit(body):
        return
    kind = body.get("type")
    yield "satisfaction", float(body.get("reward", 0.0))
    if kind in ("thumbs_up", "thumbs_down"):
        yield "thumbs_up_rate", float(kind == "thumbs_up")
    if kind == "rating" and body.get("value") is not None:
        yield "rating", float(body["value"])


def of_grade(body: dict[str, Any]) -> Iterator[Observation]:
    """What a grader's verdict says; nothing where it abstained.

    A score card with `ungrounded` (a share of the answer), `toxic` (a probability) or `win` (1, 0.5 or 0) feeds those
    metrics.
    """
    if body.get("reward") is not None:
        yield "grader_score", float(body["reward"])
    card = body.get("score_card") or {}
    if "ungrounded" in card:
        yield "hallucination_rate", float(card["ungrounded"] >= HALF)
    if "toxic" in card:
        yield "toxicity_rate", float(card["toxic"] > YES)
    if "win" in card:
        yield "win_rate", float(card["win"])


def of_outcome(body: dict[str, Any]) -> Iterator[Observation]:
    """What a product measured."""
    yield f"{OUTCOME_PREFIX}{body['name']}", float(body["value"])
