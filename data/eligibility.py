"""May a training start? Each rule says what it needs, what there is, and so by how much it fails."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US, now_us
from cluster.settings import Settings
from cluster.tables import events, training_jobs
from data.log import EventLog
from data.manifest import Manifest

FINISHED = "completed"  # state of a training job that counts


@dataclass(frozen=True)
class Rule:
    """One rule and how it came out."""

    name: str
    needed: float
    found: float
    unit: str

    @property
    def passed(self) -> bool:
        """True when there is enough."""
        return self.found >= self.needed

    def __str__(self) -> str:
        if self.passed:
            return f"{self.name}: {self.found:g} {self.unit} (needs {self.needed:g})"
        short = self.needed - self.found
        return f"{self.name}: {self.found:g} {self.unit}, needs {self.needed:g}: {short:g} short"


def eligibility(
    settings: Settings,
    engine: Engine,
    dataset: Manifest,
    *,
    method: str,
    agents: Sequence[str] = (),
    now: int | None = None,
) -> list[Rule]:
    """The rules for training on `dataset` with `method`; eligible when all passed.

    They are about the dataset's agent, or about the `agents` of an archetype together; a dataset of all
    agents is for the whole model and needs a number of interactions besides.
    """
    limits, now = settings.curation.eligibility, now_us() if now is None else now
    since = now - round(limits.window_days * DAY_US)
    about: list[str | None] = [*agents] or [dataset.agent]
    positive = sum(count_positive(EventLog(engine), agent, since, settings) for agent in about)
    rest = min(days_since_training(engine, settings, agent, now) for agent in about)
    good = count_good(dataset, agents, settings.curation.examples.chosen_min_score)
    rules = [
        Rule("positive feedback", limits.positive_feedbacks, positive, f"in {limits.window_days:g} days"),
        Rule("good interactions", limits.good_interactions, good, "well judged interactions"),
        Rule("rest", limits.rest_days, rest, "days since the last training"),
    ]
    if dataset.agent is None and not agents:
        usable = next((stage.rows_out for stage in dataset.stages if stage.name == "filter"), 0)
        rules.append(Rule("interactions", limits.whole_interactions, usable, "usable interactions"))
    if method == "dpo":
        rules.append(Rule("pairs", limits.pairs_for_dpo, dataset.total("preference"), "preference pairs"))
    return rules


def count_good(dataset: Manifest, agents: Sequence[str], least: float) -> int:
    """Interactions whose answer, as the agent gave it, has at least this score; of `agents`, if any."""
    files = [
        Path(dataset.path) / shard.path for shard in dataset.shards if shard.path.startswith("sft/") and shard.rows
    ]
    total = 0
    for file in files:
        rows = pq.read_table(file, columns=["agent", "origin", "synthetic", "score", "interaction_ids"])
        own = pc.and_(pc.equal(rows["origin"], "answer"), pc.invert(pc.fill_null(rows["synthetic"], False)))
        kept = pc.and_(own, pc.greater_equal(rows["score"], least))
        if agents:
            kept = pc.and_(kept, pc.is_in(rows["agent"], pa.array(agents)))
        total += len(pc.list_flatten(rows.filter(kept)["interaction_ids"]))
    return total


def count_positive(log: EventLog, agent: str | None, since_us: int, settings: Settings) -> int:
    """Feedback with a positive reward since then, about one agent or about any."""
    page = settings.curation.page_events
    found = [
        recorded.event
        for recorded in log.scan(kinds=("feedback",), tenant=settings.tenant, page=page)
        if recorded.event.workspace == settings.workspace
        and recorded.event.occurred_at_us >= since_us
        and recorded.event.body.get("reward", 0) > 0
    ]
    if agent is None:
        return len(found)
    own = sum(event.agent == agent for event in found)
    unknown = [event.interaction_id for event in found if event.agent is None and event.interaction_id]
    return own + _of_agent(log.engine, settings, agent, unknown, page)


def _of_agent(engine: Engine, settings: Settings, agent: str, ids: Iterable[str], page: int) -> int:
    """How many of the ids are interactions or trajectories of the agent; an id counts as often as it is given.

    A trajectory without an interaction's id goes by its event's.
    """
    name = sa.func.coalesce(events.c.interaction_id, events.c.event_id)
    wanted, total = list(ids), 0
    step = min(page, 500)
    with engine.connect() as connection:
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step]
            query = sa.select(name).where(
                events.c.tenant == settings.tenant,
                events.c.workspace == settings.workspace,
                events.c.kind.in_(("interaction", "trajectory")),
                events.c.agent == agent,
                sa.or_(events.c.interaction_id.in_(part), events.c.event_id.in_(part)),
            )
            known = set(connection.execute(query).scalars())
            total += sum(i in known for i in part)
    return total


def days_since_training(engine: Engine, settings: Settings, agent: str | None, now: int) -> float:
    """Days since the newest training that ended well; infinite when there is none."""
    query = sa.select(sa.func.max(training_jobs.c.finished_at_us)).where(
        training_jobs.c.tenant == settings.tenant,
        training_jobs.c.workspace == settings.workspace,
        training_jobs.c.state == FINISHED,
    )
    if agent is not None:
        query = query.where(training_jobs.c.agent == agent)
    with engine.connect() as connection:
        newest = connection.execute(query).scalar()
    return float("inf") if newest is None else (now - newest) / DAY_US
