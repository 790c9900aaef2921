"""What people say: held-out answers of both versions, in the labelling queue, side by side and blind; reported only.

Questions leave as events and answers come back as events, days later perhaps, so an evaluation reports what there is
and waits for the rest: evaluating the version again reads it. Asking again changes nothing.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cluster.clock import DAY_US, now_us
from cluster.database import connect
from cluster.settings import Settings
from data.labelling.requests import (
    AnswerToLabel,
    Judgement,
    LabelRequest,
    judged_pairs,
    labels_for,
    request_labels,
)
from data.log import EventLog
from train.evaluate.evidence import Asked, Evidence, Question
from train.evaluate.statistics import win_rate_interval
from train.evaluate.truth import choose
from train.evaluate.types import Gate, Truth


def ask_people(settings: Settings, agent: str, evidence: Evidence) -> Evidence:
    """The evidence with people's judgements so far; what has not been asked yet is put into the queue."""
    engine = connect(settings)
    try:
        log = EventLog(engine)
        if "calibration" not in evidence.settings.not_applicable:
            since_us = now_us() - round(evidence.settings.calibration_days * DAY_US)
            evidence = replace(evidence, judged=judged_pairs(log, settings.tenant, agent=agent, since_us=since_us))
        if "human" in evidence.settings.not_applicable:
            return evidence
        questions = questions_of(evidence, settings.tenant, settings.workspace, agent)
        request_labels(log, [question.request for question in questions])
        said = labels_for(log, settings.tenant, [question.request.request_id for question in questions])
    finally:
        engine.dispose()
    return replace(evidence, asked=Asked(questions, said))


def questions_of(evidence: Evidence, tenant: str, workspace: str, agent: str) -> list[Question]:
    """One for each of `evaluation.human_answers` held-out prompts that the versions answer differently."""
    differing = [t for t in evidence.truths if evidence.candidate.to(t.prompt) != evidence.champion.to(t.prompt)]
    return [
        _question(truth, evidence, LabelRequest("", tenant, workspace, "evaluation", (), agent=agent))
        for truth in choose(differing, evidence.settings.human_answers)
    ]


def _question(truth: Truth, evidence: Evidence, blank: LabelRequest) -> Question:
    given = [(answers.name, answers.to(truth.prompt)) for _, answers in evidence.both()]
    digest = hashlib.sha256(json.dumps([truth.example_id, *given]).encode()).digest()
    place = digest[0] % 2
    shown = given if place == 0 else given[::-1]
    request = replace(
        blank,
        request_id=f"evaluation:{digest.hex()}",
        answers=tuple(AnswerToLabel(name, {"role": "assistant", "content": text}) for name, text in shown),
        messages=truth.prompt.messages,
        user_id=None if truth.user_id.startswith("session:") else truth.user_id,
    )
    return Question(truth, request, place)


def human(evidence: Evidence) -> Gate:
    """How often people prefer the candidate's answer, and the scores they gave."""
    asked = evidence.asked
    if asked is None or not asked.questions:
        return Gate("human", "no_data", detail="no held-out prompt that the versions answer differently")
    judged = [(question, asked.said.get(question.request.request_id, [])) for question in asked.questions]
    judged = [(question, said) for question, said in judged if said]
    waiting = len(asked.questions) - len(judged)
    if not judged:
        return Gate("human", "waiting", detail=f"{waiting} answers wait in the labelling queue")
    outcomes = [_outcome(question, said) for question, said in judged]
    users = [question.truth.user_id for question, _ in judged]
    rate, interval = win_rate_interval(outcomes, users, **evidence.options())
    return Gate(
        "human",
        "waiting" if waiting else "passed",
        value=rate,
        interval=interval,
        detail=f"{outcomes.count(1)} preferred, {outcomes.count(0)} undecided, {outcomes.count(-1)} not"
        + (f"; {waiting} wait" if waiting else ""),
        metrics={"judged": float(len(judged)), **_scores(judged)},
    )


def _outcome(question: Question, said: Sequence[Judgement]) -> int:
    """1 where most people prefer the candidate's answer, -1 where most prefer the other."""
    votes = [0 if one.preferred is None else 1 if one.preferred == question.place else -1 for one in said]
    return int(np.sign(sum(votes)))


def _scores(judged: Sequence[tuple[Question, Sequence[Judgement]]]) -> dict[str, float]:
    """Mean of each score, by role."""
    given: dict[str, list[float]] = {}
    for question, said in judged:
        for one in said:
            for place, scores in enumerate(one.scores):
                role = "candidate" if place == question.place else "champion"
                for name, value in scores.items():
                    given.setdefault(f"{role}_{name}", []).append(value)
    return {name: float(np.mean(values)) for name, values in sorted(given.items())}
