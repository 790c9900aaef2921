"""Stage 3, score: one number in [0, 1] for how good an answer was.

A weighted mean of the components that exist; a person's label overrides it. Without explicit or implicit
feedback, label or grade there is no score, and the row is dropped: length alone says nothing.
"""

import re
from collections.abc import Sequence
from typing import Any

import orjson
import pyarrow as pa

from cluster.settings.curation import ScoreSettings
from data.join import to_json
from data.stages import Dropped, keep, with_column
from data.template import content_text

WORD = re.compile(r"\w+")
SHORT_WORD = 3  # words up to this length carry little meaning and are left out of overlaps


def score(table: pa.Table, settings: ScoreSettings) -> tuple[pa.Table, Dropped]:
    """Adds `score`, `parts` (JSON, the components), `explicit` (mean reward or null); judged rows weigh 1."""
    columns = ("votes", "labels", "grades", "response", "context")
    scores, parts, explicit, weights = [], [], [], []
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    for weight, values in zip(table["weight"].to_pylist(), rows, strict=True):
        votes, labels, grades, response, context = (_parsed(text) for text in values)
        found = components(votes, labels, grades, content_text(response), context, settings)
        scores.append(combine(found, settings))
        weights.append(max(weight, 1.0) if rests_on_judges(found) else weight)
        parts.append(to_json(found))
        explicit.append(None if found["explicit"] is None else 2 * found["explicit"] - 1)
    table = with_column(table, "score", scores, pa.float64())
    table = with_column(table, "weight", weights, pa.float64())
    table = with_column(table, "parts", parts, pa.string())
    table = with_column(table, "explicit", explicit, pa.float64())
    return keep(table, [None if s is not None else "no signal" for s in scores])


def _parsed(text: str | None) -> Any:
    """Most columns say nothing of most rows, which a look tells."""
    return (orjson.loads(text) if text != "[]" else []) if text else {}


def components(
    votes: list[dict[str, Any]],
    labels: list[dict[str, Any]],
    grades: list[dict[str, Any]],
    answer: str,
    context: Sequence[str],
    settings: ScoreSettings,
) -> dict[str, float | None]:
    """Each component in [0, 1], or `None` where there is nothing to go by."""
    explicit, implicit = mean_reward(votes, "explicit"), mean_reward(votes, "implicit")
    judged = [sum(label["scores"].values()) / len(label["scores"]) for label in labels if label.get("scores")]
    graded = [grade["reward"] for grade in grades if grade.get("reward") is not None]
    return {
        "explicit": None if explicit is None else (explicit + 1) / 2,
        "implicit": None if implicit is None else (implicit + 1) / 2,
        "grade": sum(graded) / len(graded) if graded else None,
        "label": sum(judged) / len(judged) if judged else None,
        "complete": completeness(answer, settings),
        "context": context_used(answer, context),
    }


def rests_on_judges(parts: dict[str, float | None]) -> bool:
    """True when the score comes from a reviewer or a grader, not from votes."""
    return parts["label"] is not None or (parts["grade"] is not None and parts["explicit"] is None)


def mean_reward(votes: list[dict[str, Any]], source: str) -> float | None:
    """Mean reward in [-1, 1] of the votes that have this source, by their weight."""
    cast = [(vote["weight"], vote[source]) for vote in votes if vote[source] is not None]
    total = sum(weight for weight, _ in cast)
    return sum(weight * reward for weight, reward in cast) / total if total > 0 else None


def combine(parts: dict[str, float | None], settings: ScoreSettings) -> float | None:
    """The score, or `None` without any judgement of the answer."""
    if parts["label"] is not None:
        return parts["label"]
    if parts["explicit"] is None and parts["implicit"] is None and parts["grade"] is None:
        return None
    weights = {
        "explicit": settings.explicit_weight,
        "implicit": settings.implicit_weight,
        "grade": settings.grade_weight if parts["explicit"] is None else 0.0,
        "complete": settings.complete_weight,
        "context": settings.context_weight,
    }
    present = [(weights[name], value) for name, value in parts.items() if name in weights and value is not None]
    total = sum(weight for weight, _ in present)
    return sum(weight * value for weight, value in present) / total if total > 0 else None


def completeness(answer: str, settings: ScoreSettings) -> float:
    """1 within the usual number of words, less in proportion outside it."""
    words = len(answer.split())
    if words < settings.complete_min_words:
        return words / settings.complete_min_words
    return min(1.0, settings.complete_max_words / max(words, 1))


def context_used(answer: str, context: Sequence[str]) -> float | None:
    """Share of the answer's content words that its passages hold; `None` without passages."""
    said = content_words(answer) if context else None
    if not said:
        return None
    return len(said & content_words(" ".join(context))) / len(said)


def content_words(text: str) -> set[str]:
    """The lower-case words that carry meaning: longer ones, and numbers."""
    return {word for word in WORD.findall(text.lower()) if len(word) > SHORT_WORD or word.isdigit()}
