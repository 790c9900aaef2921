"""Grades one answer by one grader within a deadline: from the cache, in a worker, in a sandbox or by a model.

What may take long on purpose (a pattern that backtracks, a `python` grader) runs in other processes that are
ended at the deadline; models are asked on the event loop; the parts of `multi` and both orders of `pair_model` are
asked at the same time.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import orjson

from cluster import metrics
from cluster.settings.engines import GraderSettings
from data.grading import AtHand, make_grader
from data.grading.endpoint import JudgeEndpoint
from data.grading.judge import ModelGrader
from data.grading.multi import Multi
from data.grading.pair_model import PairModel
from data.grading.python_grader import PythonGrader
from data.grading.reward_model import HttpScorer
from data.grading.types import AbstainError, AskingGrader, BaseGrader, Grader, GradeResult, Item, RawSample
from serve.abstentions import AbstentionWatch
from serve.grading_models import ModelCalls
from serve.grading_pool import GraderPool, WorkerError
from serve.judged import JudgedAnswers, input_digest

log = logging.getLogger(__name__)

MAX_GRADERS = 64  # graders kept ready, by configuration
UNRESPONSIVE = "unresponsive_reward_error"
Spend = Callable[[int], None]
"""Counts the tokens that a judge used against whoever asked."""


def _nobody(_tokens: int) -> None:
    """For grades that no key asked for."""


class Grading:
    """The graders of one replica. Belongs to one event loop: `start` it there, `close` it there."""

    def __init__(self, settings: GraderSettings, judged: JudgedAnswers | None = None) -> None:
        self.settings = settings
        self.pool = GraderPool(settings)
        self.judged = judged
        """Where grades by models are kept; `None` while there is no database."""
        self.abstentions = AbstentionWatch(settings.abstention_share, settings.abstention_window)
        self._models = ModelCalls(settings.judge_connections)
        self._sandboxes = ThreadPoolExecutor(settings.python_workers, thread_name_prefix="python-grader")
        self._at_hand = AtHand.of(
            settings, HttpScorer(settings.reward_model_url) if settings.reward_model_url else None
        )
        self._graders: OrderedDict[bytes, Grader] = OrderedDict()
        self._cache: OrderedDict[bytes, GradeResult] = OrderedDict()

    async def start(self) -> None:
        """Start the worker processes."""
        await self.pool.start()

    async def close(self) -> None:
        """End everything that was started."""
        await self.pool.close()
        await self._models.close()
        self._sandboxes.shutdown(wait=False, cancel_futures=True)
        for grader in self._graders.values():
            _close(grader)

    async def grader(self, config: Any) -> Grader:
        """The grader of a configuration; those used lately are kept.

        Raises:
            InputError: it describes none.
            UnavailableError: the reward model it names does not answer.
        """
        key = orjson.dumps(config, option=orjson.OPT_SORT_KEYS)
        grader = self._graders.get(key)
        if grader is None:
            grader = await asyncio.to_thread(make_grader, config, at_hand=self._at_hand)
            self._graders[key] = grader
            if len(self._graders) > MAX_GRADERS:
                self._graders.popitem(last=False)  # its processes end with its last use
        self._graders.move_to_end(key)
        return grader

    async def grade(
        self, grader: Grader, item: Item, sample: RawSample, deadline: float, spend: Spend = _nobody
    ) -> GradeResult:
        """The verdict by `deadline` (time of the event loop), or an abstention that says why."""
        began = time.perf_counter()
        try:
            key = input_digest(grader.version, item, sample)
        except orjson.JSONEncodeError as error:  # such an answer cannot reach a worker or a judge either
            return GradeResult(None, {}, f"the input is no JSON ({error})", grader.version, "other_error")
        known = self._cache.get(key)
        if known is not None:
            self._cache.move_to_end(key)
            metrics.GRADES.labels(_kind(grader), "cached").inc()
            return known
        try:
            async with asyncio.timeout_at(deadline):
                result = await self._judge(grader, item, sample, deadline, spend)
        except TimeoutError:
            result = GradeResult(
                None, {}, f"no grade within {self.settings.deadline_s:g} s", grader.version, UNRESPONSIVE
            )
        except WorkerError as error:
            result = GradeResult(None, {}, str(error), grader.version, "other_error")
        except Exception as error:  # a grader's own fault must not take the rest of its batch along
            log.exception("grader %s failed", grader.version)
            result = GradeResult(None, {}, f"the grader failed ({type(error).__name__})", grader.version, "other_error")
        outcome = "graded" if result.reward is not None else result.error or "abstained"
        metrics.GRADES.labels(_kind(grader), outcome).inc()
        self.abstentions.note(result)
        metrics.GRADE_SECONDS.labels(_kind(grader)).observe(time.perf_counter() - began)
        self._remember(key, result)
        return result

    def _remember(self, key: bytes, result: GradeResult) -> None:
        """Abstentions are not kept: the next try may succeed."""
        if result.reward is None or not self.settings.cache_entries:
            return
        self._cache[key] = result
        if len(self._cache) > self.settings.cache_entries:
            self._cache.popitem(last=False)

    async def _judge(self, grader: Grader, item: Item, sample: RawSample, deadline: float, spend: Spend) -> GradeResult:
        if isinstance(grader, Multi | PairModel):
            return await self._parts(grader, item, sample, deadline, spend)
        if isinstance(grader, AskingGrader):
            return await self._ask(grader, item, sample, deadline, spend)
        if isinstance(grader, PythonGrader):
            by = time.monotonic() + self._left_s(deadline)
            return await asyncio.get_running_loop().run_in_executor(self._sandboxes, grader.grade_by, item, sample, by)
        assert isinstance(grader, BaseGrader), grader
        task = {"grader": grader.config.model_dump(mode="json"), "item": item, "sample": sample}
        return _from_worker(await self.pool.ask(task, deadline), grader.version)

    async def _parts(
        self, grader: Multi | PairModel, item: Item, sample: RawSample, deadline: float, spend: Spend
    ) -> GradeResult:
        async with asyncio.TaskGroup() as group:
            parts = {
                name: group.create_task(self.grade(part, item, sample, deadline, spend))
                for name, part in grader.graders.items()
            }
        return grader.combine({name: part.result() for name, part in parts.items()})

    async def _ask(
        self, grader: AskingGrader[Any], item: Item, sample: RawSample, deadline: float, spend: Spend
    ) -> GradeResult:
        question = grader.question(item, sample)
        if isinstance(question, GradeResult):
            return question
        judged = self.judged if isinstance(grader, ModelGrader) else None  # a reward model always says the same
        key = judged.key(grader.version, item, sample) if judged else ""
        if judged and (known := await asyncio.to_thread(judged.find, key)) is not None:
            return known
        try:
            if not isinstance(grader, ModelGrader):  # a reward model can leave out what is too late
                question = replace(question, body=question.body | {"deadline_s": self._left_s(deadline)})
            document = await self._models.ask(self._endpoint(grader), question)
        except AbstainError as error:
            return grader.unanswered(error)
        if isinstance(grader, ModelGrader):
            spend(_tokens(document))
        result = grader.verdict(question, document)
        if judged and result.reward is not None:
            return await asyncio.to_thread(judged.keep, key, result)
        return result

    @staticmethod
    def _left_s(deadline: float) -> float:
        return max(deadline - asyncio.get_running_loop().time(), 0.001)

    def _endpoint(self, grader: AskingGrader[Any]) -> JudgeEndpoint:
        if isinstance(grader, ModelGrader):
            assert isinstance(grader.endpoint, JudgeEndpoint)
            return grader.endpoint
        assert self.settings.reward_model_url is not None  # or the grader could not have been made
        return JudgeEndpoint(self.settings.reward_model_url)


def asks_judges(grader: Grader) -> bool:
    """Whether a grade by it costs a judge's tokens."""
    if isinstance(grader, Multi | PairModel):
        return any(asks_judges(part) for part in grader.graders.values())
    return isinstance(grader, ModelGrader)


def _tokens(document: Any) -> int:
    """Tokens that a judge's reply says it took."""
    usage = document.get("usage") if isinstance(document, Mapping) else None
    total = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return total if isinstance(total, int) and total > 0 else 0


def _from_worker(reply: Mapping[str, Any], version: str) -> GradeResult:
    if "failed" in reply:
        return GradeResult(None, {}, reply["failed"], version, "other_error")
    return GradeResult(reply["reward"], reply["scores"], reply["reason"], version, reply["error"])


def _kind(grader: Grader) -> str:
    return str(getattr(grader.config, "type", "other")) if isinstance(grader, BaseGrader) else "other"


def _close(grader: Grader) -> None:
    if isinstance(grader, PythonGrader):
        grader.close()
    elif isinstance(grader, Multi):
        for part in grader.graders.values():
            _close(part)
