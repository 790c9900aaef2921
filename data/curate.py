"""From events to a dataset: one Ray Data pipeline, stage by stage in the order of the page it implements.

Every stage is a pure function on Arrow tables, in its own module; this module says which runs when, what
must be together for it, and carries the few small things that all blocks must know: who voted too often,
which questions are near duplicates, which topics are over-full.
"""

import logging
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.clock import now_us, to_iso
from cluster.database import connect
from cluster.errors import DatasetError
from cluster.runtime import ray_session
from cluster.settings import Settings
from cluster.settings.curation import CurationSettings
from data import augment, dedup, keep, manifest, voters, weigh
from data import balance as balancing
from data.behaviour import add_implicit_signals
from data.blocks import apply, apply_to_rows, of_rows, read_each
from data.calibration import fit
from data.card import dataset_card, draw_plots
from data.detectors.make import Detectors, detectors
from data.detectors.topics import TopicModel
from data.erasure.person import erased_users
from data.examples import make_examples
from data.exchange import Blocks, Places, Tasks, run
from data.filter import filter_rows
from data.join import join_events, name_trajectories
from data.kept_tests import keep_sketches, kept_nodes, kept_parts, read_part, sketch_files
from data.log import EventLog
from data.manifest import Manifest, PromptUsed, Shard
from data.memory import give_back
from data.mlflow_datasets import log_to_mlflow, mlflow_warming_up
from data.near import Clusters
from data.near_parts import clusters_of
from data.prompt_versions import texts_by_digest
from data.prompted_rows import put_back
from data.publish import check_usable, publish
from data.ray_data import map_blocks, quiet_ray_data, task_cpus
from data.score import score
from data.scrub import scrub
from data.signal_pairs import PAIRS, from_table, pairs_of_rows, sample
from data.source import Block, describe_sources, plan_blocks, read_block
from data.split import resolve_clusters
from data.stages import Stage, join_counts, split_counts, sum_counts, with_column
from data.summary import summary_of
from data.traces.join import TRACE, TRACED, add_trace, join_traces

log = logging.getLogger(__name__)

STAGES = (
    "join",
    "behaviour",
    "weigh",
    "score",
    "filter",
    "scrub",
    "fingerprint",
    "keep",
    "cluster",
    "deduplicate",
    "examples",
    "balance",
    "augment",
    "curriculum",
    "split",
)

SHOWN_AGENTS = 10


def curate(
    settings: Settings, *, agent: str | None = None, out: Path | None = None, parallelism: int | None = None
) -> Manifest:
    """Turn the event log into a dataset; the same events give the same dataset.

    Args:
        agent: only this agent's interactions; all agents' by default.
        out: folder to write into instead of the datasets root.
        parallelism: blocks, instead of one for each `curation.events_per_block` events.

    Raises:
        DatasetError: no events, none of this agent, or nothing in them that a training could use; nothing is written.
        ConflictError: somebody is being erased, or was while this ran; nothing is written.
        InputError: earlier test items were kept under other settings of `curation.dedup`.
    """
    engine = connect(settings)
    try:
        event_log = EventLog(engine)
        erased = erased_users(engine, settings.tenant)
        last_seq = event_log.last_seq()
        if last_seq == 0:
            raise DatasetError("the event log is empty; send traffic and feedback first, or `rayloop import` some")
        blocks = plan_blocks(engine, last_seq, settings.curation.events_per_block, parallelism)
        sources = describe_sources(engine, blocks)
        sketch_files(settings)  # refuses before anything is computed
        root = manifest.datasets_root(settings, out)
        traced = bool(event_log.read(limit=1, kinds=TRACED, tenant=settings.tenant))
        if agent is not None and not traced:  # what a trace is of shows when it is joined
            _check_agent(event_log, settings, agent)
        prompts = texts_by_digest(engine, settings.tenant)
        engine.dispose()  # a connection's cache would stay until the dataset is there
        give_back()
        with mlflow_warming_up(settings), ray_session(settings) as session, quiet_ray_data():
            named = partial(publish, engine, settings, erased)
            tasks = Tasks(task_cpus(settings, session), len(blocks))
            written = _Curation(settings, agent, blocks, root, sources, named, prompts, traced, tasks).run()
        if settings.curation.log_to_mlflow:
            log_to_mlflow(settings, written)
        return written
    finally:
        engine.dispose()


def _check_agent(event_log: EventLog, settings: Settings, agent: str) -> None:
    if not event_log.agents(settings.tenant, settings.workspace, agent):
        known = event_log.agents(settings.tenant, settings.workspace)
        some = ", ".join(known[:SHOWN_AGENTS]) + (", …" if len(known) > SHOWN_AGENTS else "")
        raise DatasetError(
            f"no interaction is of agent {agent!r}; the log of {settings.tenant}/{settings.workspace} knows "
            f"{some or 'none'}: name one with --agent, or leave it out to take all"
        )


@dataclass
class _Curation:
    """One run of the pipeline."""

    settings: Settings
    agent: str | None
    blocks: list[Block]
    root: Path
    sources: dict[str, Any]
    """What the blocks are read from."""
    publish: Callable[[Path, Path, Manifest], Manifest]
    """Gives a finished folder its name below `root`."""
    prompts: dict[str, str]
    """Digest -> text of every prompt that the agents ever had."""
    traced: bool
    """The log holds parts of traces that may belong together."""
    tasks: Tasks
    calibration: dict[str, Any] = field(default_factory=dict)
    topics: tuple[str, ...] = ()
    topic_shares: dict[str, float] = field(default_factory=dict)

    def run(self) -> Manifest:
        """The stages of the page, in its order. What a stage was made of leaves the object store with its method."""
        sketches, final = self._finished()
        return self._write(final, sketches)

    def _judged(self) -> list[Any]:
        """Interactions with weight and score that may become examples, scrubbed."""
        config = self.settings.curation
        asked = self._detectors()
        joined = self._joined()
        groups = self._groups(joined)
        factors = self._vote_factors(joined, groups)
        stages = (
            Stage("weigh", partial(weigh.weigh, settings=config.weigh, factors=factors, groups=groups)),
            Stage("score", partial(score, settings=config.score)),
            Stage("filter", partial(_filter, settings=config, asked=asked)),
            Stage("scrub", partial(scrub, settings=config.scrub)),
            Stage("fingerprint", partial(dedup.fingerprint, settings=config)),
        )
        return self._map(joined, stages)

    def _clustered(self) -> tuple[list[Any], list[Any]]:
        """Sketches of this dataset's texts, and its rows with those of a near-duplicate cluster in one block."""
        rows = self._judged()
        if self.agent is None and self.settings.curation.whole_kept:
            rows = self._best(rows)
        sketches, clusters = self._clusters(rows)
        return sketches, self.tasks.exchange(rows, "cluster", clusters, before=_with_clusters)

    def _finished(self) -> tuple[list[Any], list[Any]]:
        """Sketches of this dataset's texts, and its examples, one a row, each in its split."""
        config = self.settings.curation
        sketches, examples = self._clustered()
        made: tuple[Callable[[pa.Table], pa.Table], ...] = (
            Stage("deduplicate", partial(dedup.deduplicate, settings=config)),
            partial(put_back, prompts=self.prompts),
            Stage("examples", partial(make_examples, settings=config)),
        )
        topic_factors: dict[int, float] = {}
        if config.balance.topics or config.augment.enabled:
            examples, made = self._map(examples, made, together="cluster"), ()
        if config.balance.topics:
            examples = self._with_topics(examples)
            topic_factors = self._topic_factors(examples)
        below = self._damage_limit(examples) if config.augment.enabled else 0.0
        reword = augment.reworder(config.augment, self.agent)
        made += (
            Stage("balance", partial(balancing.balance, factors=topic_factors)),
            Stage("augment", partial(augment.augment, settings=config.augment, reword=reword, damage_below=below)),
            Stage("curriculum", balancing.curriculum),
            Stage("split", resolve_clusters),
        )
        return sketches, self._map(examples, made, together="cluster")

    def _joined(self) -> Blocks:
        """One interaction a row, with what its user did where implicit signals are on."""
        runs = self.settings.trajectory_feedback_loop.enabled
        join = Stage("join", partial(join_events, agent=self.agent, trajectories=runs, prompts=self.prompts))
        if not self.settings.feedback.implicit:
            return self._read(join, self._behaviour())
        rows = self.tasks.exchange(self._read(join), "session_key")
        if self.settings.calibration.apply:
            self._calibrate(rows)
        return self.tasks.each(rows, self._behaviour())

    def _behaviour(self) -> Stage:
        weights = self.calibration.get("used", {})
        return Stage("behaviour", partial(add_implicit_signals, settings=self.settings, weights=weights))

    def _read(self, *then: Stage) -> Blocks:
        """What stages make of the events, those of one interaction together; before that, those of one trace."""
        read, after = partial(read_block, self.settings), partial(apply, functions=then)
        if not self.traced:
            named = partial(apply, functions=(read, name_trajectories))
            return self.tasks.exchange(self.blocks, "interaction_id", before=named, after=after)
        traced, joined = ((read, add_trace), (join_traces, name_trajectories))
        traces = self.tasks.exchange(self.blocks, TRACE, before=partial(apply, functions=traced))
        return self.tasks.exchange(traces, "interaction_id", before=partial(apply, functions=joined), after=after)

    def _map(
        self, blocks: Blocks, functions: Sequence[Callable[[pa.Table], pa.Table]], together: str | None = None
    ) -> list[Any]:
        """What functions, one after the other in one task, make of each block; blocks without rows are left out."""
        chain = partial(apply_to_rows, functions=functions, together=together)
        return map_blocks(blocks, partial(run, chain), self.tasks.num_cpus)

    def _each(self, blocks: Blocks, function: Callable[..., Any], *shared: Any) -> list[Any]:
        """References to what a function makes of the rows of each block."""
        return self.tasks.each(blocks, of_rows, function, *shared)

    def _calibrate(self, joined: Blocks) -> None:
        """What implicit signals are worth, from a sample of the interactions with both kinds of sign."""
        pairs = PAIRS.empty_table()
        for table in read_each(self._each(joined, partial(pairs_of_rows, settings=self.settings))):
            pairs = sample(pa.concat_tables([pairs, table]), self.settings.calibration.max_rows)
        if len(pairs):
            fitted = fit(from_table(pairs), self.settings)
            self.calibration = fitted.as_dict() | {"used": fitted.as_settings()}

    def _detectors(self) -> Any:
        """A reference to the detectors, trained once for all workers; models are loaded where they are used."""
        named = self.settings.curation.detectors
        if named.toxicity_model or named.refusal_model or named.grounding_model:
            return None
        return self.tasks.gathered([], partial(detectors, named))

    def _groups(self, joined: Blocks) -> dict[str, str]:
        """Users who vote together, each with the name they share."""
        config = self.settings.curation.weigh
        pairs = partial(of_rows, function=partial(voters.pairs_of_voters, most=config.together_voters))
        often = partial(voters.frequent, settings=config)
        tables = list(read_each(self.tasks.exchange(joined, "first", before=pairs, after=often)))
        if not (users := voters.users_in(tables)):
            return {}
        counted = read_each(self._each(joined, partial(voters.answers_voted_on, users=users)))
        return voters.groups_of(tables, sum(counted, Counter()), config)

    def _vote_factors(self, joined: Blocks, groups: dict[str, str]) -> dict[str, dict[str, float]]:
        """Factors of users over a cap."""
        config = self.settings.curation.weigh
        days = partial(of_rows, function=partial(weigh.count_votes, settings=config, groups=groups))
        totals = partial(weigh.user_totals, votes_per_day=config.votes_per_day)
        found = self.tasks.exchange(joined, "user", before=days, after=totals)
        return weigh.exceptions(read_each(found), config.dataset_share)

    def _best(self, rows: Blocks) -> list[Any]:
        """The best interactions of all agents, as many as are kept."""
        least = keep.least_kept(read_each(self._each(rows, keep.ranks)), self.settings.curation.whole_kept)
        return self._map(rows, (Stage("keep", partial(keep.keep_best, least=least)),))

    def _clusters(self, rows: Blocks) -> tuple[list[Any], Any]:
        """Sketches of this dataset's texts, and a reference to the near-duplicate `Clusters`."""
        config = self.settings.curation.dedup
        own = self._each(rows, partial(dedup.sketches_of, settings=config))
        tested = self.tasks.each(kept_parts(self.settings), read_part)
        clusters = clusters_of([*own, *tested], kept_nodes(self.settings), config, self.tasks)
        ray.wait([clusters])
        return own, clusters

    def _with_topics(self, examples: Blocks) -> list[Any]:
        """Examples with their topic, from one model fitted on a sample of all blocks."""
        config, named = self.settings.curation.balance, self.settings.curation.detectors
        samples = self._each(examples, partial(balancing.sample_questions, most=config.topic_sample))
        sample = ray.put(balancing.sample_of_all(read_each(samples), config.topic_sample))
        model = self.tasks.gathered([sample], partial(balancing.fit, settings=config, named=named))
        self.topics = ray.get(self.tasks.gathered([model], attrgetter("names")))
        return self.tasks.each(examples, _add_topics, model)

    def _topic_factors(self, examples: Blocks) -> dict[int, float]:
        blocks = list(read_each(self._each(examples, balancing.topic_weights)))
        self.topic_shares = balancing.topic_shares(blocks, self.topics)
        return balancing.topic_factors(blocks, self.settings.curation.balance)

    def _damage_limit(self, examples: Blocks) -> float:
        config = self.settings.curation.augment
        due = self._each(examples, partial(augment.pairs_due, settings=config))
        return augment.damage_limit(read_each(due), config)

    def _write(self, final: Blocks, sketches: Sequence[Any]) -> Manifest:
        """Shards, card and manifest in a folder beside, then renamed into place."""
        found = list(read_each(self.tasks.each(final, summary_of)))
        stages = sum_counts((line for one in found for line in one.counts), list(STAGES))
        sizes = dict(sorted(sum((one.sizes for one in found), Counter()).items()))
        counts = manifest.count_table([(kind, split, n) for (kind, split), n in sizes.items()])
        check_usable(counts, {v for one in found for v in one.labels}, [(s.name, s.dropped) for s in stages])
        building = self.root / f".building-{uuid.uuid4().hex}"
        building.mkdir(parents=True)
        try:
            shards = self._write_shards(final, building, sizes)
            used: Counter[str] = sum((one.prompts for one in found), Counter())
            made = self._manifest([at for one in found for at in one.times], stages, counts, shards, used)
            plots = draw_plots(made, (one.histograms for one in found), building)
            (building / "card.md").write_text(dataset_card(made, plots))
            tested = ray.put(np.concatenate([one.tested for one in found]))
            kept = self.tasks.each(sketches, dedup.sketches_of_nodes, tested)
            keep_sketches(self.settings, made.dataset_id, read_each(kept))
            return self.publish(building, self.root, made)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _write_shards(self, final: Blocks, folder: Path, sizes: dict[tuple[str, str], int]) -> list[Shard]:
        """A task a shard, so that none holds more rows than a shard has."""
        number = {key: -(-n // self.settings.curation.shard_rows) for key, n in sizes.items()}
        shards = [_shard_name(*key, i) for key, n in number.items() for i in range(n)]
        named = partial(of_rows, function=partial(_name_shards, number=number))
        place = partial(_place_of_shard, shards=shards)
        write = partial(manifest.write_shards, folder=folder)
        written = self.tasks.dealt(final, place, len(shards), before=named, after=write)
        rows = [row for table in read_each(written) for row in table.to_pylist()]
        return sorted((Shard(**row) for row in rows), key=lambda shard: shard.path)

    def _manifest(
        self,
        times: Sequence[int],
        stages: Sequence[Any],
        counts: dict[str, dict[str, int]],
        shards: list[Shard],
        prompts: Counter[str],
    ) -> Manifest:
        digest = manifest.dataset_hash(shards)
        return Manifest(
            dataset_id=f"{self.agent or 'all'}-{digest[:12]}".replace("/", "_"),
            dataset_hash=digest,
            schema_version=manifest.SCHEMA_VERSION,
            created_at=to_iso(now_us()),
            tenant=self.settings.tenant,
            workspace=self.settings.workspace,
            agent=self.agent,
            config=_public_config(self.settings),
            git_commit=manifest.git_commit(),
            sources=self.sources,
            time_range=[to_iso(min(times)), to_iso(max(times))],
            stages=list(stages),
            counts=counts,
            shards=shards,
            topics=self.topic_shares,
            calibration=self.calibration,
            prompts={digest: PromptUsed(self.prompts[digest], n) for digest, n in sorted(prompts.items())},
        )


def _filter(table: pa.Table, settings: CurationSettings, asked: Any) -> tuple[pa.Table, Any]:
    return filter_rows(table, settings, None if asked is None else _fetched(asked))


@lru_cache(maxsize=1)
def _fetched(asked: Any) -> Detectors:
    """Loaded once a process."""
    found: Detectors = ray.get(asked)
    return found


def _with_clusters(table: pa.Table, clusters: Clusters) -> pa.Table:
    return Stage("cluster", partial(dedup.assign_clusters, clusters=clusters))(table)


def _add_topics(table: pa.Table, model: TopicModel) -> pa.Table:
    """Adds topics to a block; its counting rows keep to themselves."""
    rows, counts = split_counts(table)
    return join_counts(balancing.add_topics(rows, model), counts)


def _shard_name(kind: str, split: str, number: int) -> str:
    return f"{kind}/{split}/{number:05d}"


def _name_shards(table: pa.Table, number: Mapping[tuple[str, str], int]) -> pa.Table:
    """Adds `shard`: kind, split, and a number from the example's id."""
    columns = (table[name].to_pylist() for name in ("kind", "split", "example_id"))
    names = [_shard_name(k, s, int(i[:8], 16) % number[k, s]) for k, s, i in zip(*columns, strict=True)]
    return with_column(table, "shard", names, pa.string())


def _place_of_shard(table: pa.Table, shards: Sequence[str]) -> Places:
    return np.asarray(pc.index_in(table["shard"], value_set=pa.array(shards)).to_numpy(), np.int64)


def _public_config(settings: Settings) -> dict[str, Any]:
    """The configuration of the pipeline, without the key of the split."""
    config = settings.curation.model_dump(mode="json")
    config["split"]["salt"] = "(not shown)"
    config["augment"]["api_key"] = None
    return config
