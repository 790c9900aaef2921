"""Preference pairs: corrections, what reviewers preferred to an answer, and answers to one question by score."""

from dataclasses import replace

import orjson

from cluster.settings.curation import CurationSettings, ExampleSettings
from data.answers import NONE, Answer, example_of, task_category
from data.stages import Dropped, Row


def preference_examples(answers: list[Answer], settings: CurationSettings, dropped: Dropped) -> list[Row]:
    """Corrections against what they correct, answers a reviewer preferred, then answers to one question by score."""
    if len(answers) == 1 and answers[0].row["labels"] == NONE:
        return []
    pairs = [
        (chosen, rejected, "correction")
        for chosen in answers
        for rejected in answers
        if chosen.origin == "correction" and rejected.origin == "answer" and chosen.row is rejected.row
    ]
    if any(answer.row["labels"] != NONE for answer in answers):
        pairs += preferred_pairs(answers, settings.score.preferred_score, dropped)
    examples = [e for pair in pairs if (e := _pair(*pair, settings.examples, dropped)) is not None]
    return examples + _question_pairs(answers, settings.examples, dropped)


def preferred_pairs(
    answers: list[Answer], preferred_score: float, dropped: Dropped
) -> list[tuple[Answer, Answer, str]]:
    """What reviewers preferred to an answer, by their word and not by the score."""
    by_id = {i: answer for answer in answers if answer.origin == "answer" for i in answer.row["interaction_ids"]}
    pairs = []
    for answer in (a for a in answers if a.origin == "answer"):
        for wanted in sorted({w for label in orjson.loads(answer.row["labels"]) if (w := label.get("preferred"))}):
            better = by_id.get(wanted)
            if better is None:
                dropped["pair: preferred answer is not among those to this question"] += 1
            elif better is not answer:
                chosen = replace(better, score=max(better.score, preferred_score), origin="preferred")
                rejected = replace(answer, score=min(answer.score, 1 - preferred_score))
                pairs.append((chosen, rejected, "preferred"))
    return pairs


def _question_pairs(answers: list[Answer], settings: ExampleSettings, dropped: Dropped) -> list[Row]:
    """Up to `pairs_per_question` pairs of one question, the widest margins first, no answer pair twice."""
    if len({id(answer.row) for answer in answers}) < 2:
        return []
    good = sorted((a for a in answers if a.score >= settings.chosen_min_score), key=_by_score, reverse=True)
    wide = sorted(
        (
            (chosen, rejected)
            for chosen in good
            for rejected in answers
            if chosen.row is not rejected.row and chosen.score - rejected.score >= settings.min_margin
        ),
        key=lambda pair: (pair[1].score - pair[0].score, _by_score(pair[0]), _by_score(pair[1])),
    )
    made: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for chosen, rejected in wide:
        if len(made) >= settings.pairs_per_question:
            break
        if (chosen.text, rejected.text) in seen:
            continue
        seen.add((chosen.text, rejected.text))
        example = _pair(chosen, rejected, pair_origin(chosen.row, rejected.row), settings, dropped)
        if example is not None:
            made.append(example)
    return made


def pair_origin(chosen: Row, rejected: Row) -> str:
    """Where the difference comes from: `shadow`, `ab` (two arms), `grader`, `same_query` or `similar_query`."""
    arms = {chosen["arm"], rejected["arm"]}
    if "shadow" in arms or any(orjson.loads(row["flags"]).get("shadow") for row in (chosen, rejected)):
        return "shadow"
    if arms == {"stable", "candidate"}:
        return "ab"
    parts = [orjson.loads(row["parts"]) for row in (chosen, rejected)]
    if all(p["grade"] is not None and all(p[n] is None for n in ("explicit", "implicit", "label")) for p in parts):
        return "grader"
    return "same_query" if chosen["node"] == rejected["node"] else "similar_query"


def _by_score(answer: Answer) -> tuple[float, str]:
    return answer.score, answer.row["interaction_id"]


def _pair(chosen: Answer, rejected: Answer, origin: str, settings: ExampleSettings, dropped: Dropped) -> Row | None:
    reason = refusal(chosen, rejected, settings)
    if reason is not None:
        dropped[f"pair: {reason}"] += 1
        return None
    return example_of(
        "preference",
        [chosen, rejected],
        prompt=chosen.row["messages"],
        chosen=chosen.json,
        rejected=rejected.json,
        margin=chosen.score - rejected.score,
        score=chosen.score,
        category=task_category(chosen.row) or task_category(rejected.row),
        origin=origin,
    )


def refusal(chosen: Answer, rejected: Answer, settings: ExampleSettings) -> str | None:
    """Why two answers make no pair, or `None`."""
    if not chosen.text or not rejected.text:
        return "empty"
    if chosen.truncated or rejected.truncated:
        return "truncated"
    if chosen.text == rejected.text:
        return "identical"
    if chosen.score < rejected.score:
        return "swapped"
    if chosen.score < settings.chosen_min_score:
        return "chosen too weak"
    return "margin too small" if chosen.score - rejected.score < settings.min_margin else None
