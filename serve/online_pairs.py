"""Live answers against the answers of their shadows: who wins, which no user ever sees.

The verdict is a `grade` event about the live interaction with `win` in its card (1, 0.5 or 0) and no reward, as it
says nothing of the answer alone. It counts for the live answer; the shadow's share of wins is what is left.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from cluster import metrics
from data.events import Event, chosen_reports
from data.grading.pair_model import PairModel, compared
from data.grading.types import Grader, GradeResult
from data.log import EventLog
from serve.grading import Grading
from serve.online_samples import has_answer, item_of, sample_of, verdict_event

OUTCOMES = {1.0: "won", 0.5: "tied", 0.0: "lost", None: "abstained"}


class OnlinePairs:
    """Compares pairs by a grader: one of type `pair_model` sees both answers, any other rewards each."""

    def __init__(self, log: EventLog, grading: Grading, grader: Grader) -> None:
        self._log, self._grading, self._grader = log, grading, grader

    async def compare(self, pair: Event, deadline: float) -> Event | None:
        """The verdict on a `shadow.pair`; `None` where an answer is missing, was erased, or is no text."""
        both = await asyncio.to_thread(self._answers, pair)
        if both is None:
            return None
        win, reason = await self._judge(*both, deadline)
        metrics.SHADOW_PAIRS.labels(pair.agent or "", OUTCOMES[win]).inc()
        versions = f"{pair.body['live_version']} against {pair.body['shadow_version']}"
        verdict = {"score_card": {} if win is None else {"win": win}, "reason": f"{versions}: {reason}"}
        return verdict_event(pair, f"{self._grader.name}-pairs", self._grader.version, verdict)

    def _answers(self, pair: Event) -> tuple[Event, Event] | None:
        names = [pair.interaction_id or "", pair.body["shadow_interaction_id"]]
        reports = chosen_reports(self._log.about(pair.tenant, names, kinds=["interaction"]))
        found = {r.event.interaction_id: r.event for r in reports if not r.erased and has_answer(r.event)}
        return (found[names[0]], found[names[1]]) if found.keys() == set(names) else None

    async def _judge(self, live: Event, shadow: Event, deadline: float) -> tuple[float | None, str]:
        item = item_of(live)
        if isinstance(self._grader, PairModel):
            told = await self._grade(item | {"opponent": sample_of(shadow)["output_text"]}, live, deadline)
            return told.reward, told.reason
        one, other = await asyncio.gather(self._grade(item, live, deadline), self._grade(item, shadow, deadline))
        return compared(one.reward, other.reward), f"rewards {one.reward} and {other.reward}"

    async def _grade(self, item: Mapping[str, Any], answer: Event, deadline: float) -> GradeResult:
        return await self._grading.grade(self._grader, item, sample_of(answer), deadline)
