"""From a version back to the feedback that made it, and forward to what was decided about it.

Back: version → training run → dataset → interactions → feedback events. Forward: events of the registry,
decisions of rollouts, changes of routes. Every link is looked up where it was recorded, and where two
records of one thing exist (dataset hash, adapter digest) they are compared.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.errors import NotFoundError
from cluster.model_files import adapter_digest
from cluster.registry import Registry, Version
from cluster.settings import Settings
from cluster.tables import experiments, rollouts
from data.events import chosen_reports
from data.log import EventLog

Chain = dict[str, Any]


def trace(ref: str, settings: Settings) -> Chain:
    """The chain of a version in both directions, as a dict for `--json`.

    A base model has no dataset: its `run` and what follows back from it may be `None`.

    Raises:
        NotFoundError: no such version.
        UnavailableError: the database does not answer.
    """
    registry = Registry(settings)
    version = registry.get(ref)
    engine = connect(settings)
    try:
        log = EventLog(engine)
        dataset, interaction_ids = _dataset(version, settings)
        return {
            "version": _version(version),
            "run": _run(version, registry),
            "dataset": dataset,
            **_evidence(interaction_ids, log, settings),
            "registry_events": list(_registry_events(version.id, log, settings)),
            "decisions": list(_decisions(version.id, engine, log, settings)),
            "routes": list(_routes(version.id, log, settings)),
        }
    finally:
        engine.dispose()


def _version(version: Version) -> Chain:
    local = version.adapter_path
    return {
        "id": version.id,
        "name": version.name,
        "aliases": list(version.aliases),
        "base_model": version.base_model,
        "base_revision": version.tags.get("base_revision"),
        "adapter_sha256": version.adapter_sha256,
        "adapter_matches": None if local is None else adapter_digest(local) == version.adapter_sha256,
        "dataset_hash": version.dataset_hash,
        "prompt_digest": version.tags.get("prompt_digest"),
        "gates": version.gates,
    }


def _run(version: Version, registry: Registry) -> Chain | None:
    if version.run_id is None:
        return None
    run = registry.client.get_run(version.run_id)
    return {
        "run_id": version.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
    }


def _dataset(version: Version, settings: Settings) -> tuple[Chain | None, list[str]]:
    """The dataset's link and the interactions in it."""
    import pyarrow.parquet as pq

    from data.manifest import find_dataset, load_manifest

    ref = version.dataset_id or version.dataset_hash
    if ref is None:
        return None, []
    try:
        manifest = load_manifest(find_dataset(settings, ref))
    except NotFoundError as error:
        return {"id": version.dataset_id, "hash": version.dataset_hash, "missing": str(error)}, []
    found: set[str] = set()
    for shard in manifest.shards:
        column = pq.read_table(f"{manifest.path}/{shard.path}", columns=["interaction_ids"])["interaction_ids"]
        found.update(name for names in column.to_pylist() for name in names)
    link = {
        "id": manifest.dataset_id,
        "hash": manifest.dataset_hash,
        "hash_matches": version.dataset_hash in (None, manifest.dataset_hash),
        "path": manifest.path,
        "created_at": manifest.created_at,
        "sources": manifest.sources,
        "time_range": manifest.time_range,
        "counts": manifest.counts,
        "prompts": {digest: used.examples for digest, used in manifest.prompts.items()},
        "shards": [{"path": s.path, "rows": s.rows, "sha256": s.sha256} for s in manifest.shards],
    }
    return link, sorted(found)


def _evidence(interaction_ids: list[str], log: EventLog, settings: Settings) -> Chain:
    """What the log holds about the interactions of a dataset."""
    served: Counter[str] = Counter()
    types: Counter[str] = Counter()
    sample: list[Chain] = []
    seqs: list[int] = []
    for recorded in chosen_reports(log.about(settings.tenant, interaction_ids, kinds=("interaction",))):
        served[recorded.event.body.get("served_version") or "unknown"] += 1
    for recorded in log.about(settings.tenant, interaction_ids, kinds=("feedback",)):
        event = recorded.event
        types[event.body.get("type", "erased")] += 1
        seqs.append(recorded.seq)
        if len(sample) < settings.log.lineage_sample:
            sample.append(
                {
                    "seq": recorded.seq,
                    "event_id": event.event_id,
                    "interaction_id": event.interaction_id,
                    "type": event.body.get("type"),
                    "reward": event.body.get("reward"),
                }
            )
    return {
        "interactions": {
            "count": len(interaction_ids),
            "in_log": served.total(),
            "served_by": dict(served),
            "sample": interaction_ids[: settings.log.lineage_sample],
        },
        "feedback": {
            "count": types.total(),
            "by_type": dict(types),
            "first_seq": min(seqs, default=None),
            "last_seq": max(seqs, default=None),
            "sample": sample,
        },
    }


def _registry_events(version_id: str, log: EventLog, settings: Settings) -> Iterator[Chain]:
    for recorded in log.scan(kinds=["model.updated"], tenant=settings.tenant):
        body = recorded.event.body
        if body.get("version") == version_id:
            yield {"seq": recorded.seq, "event_id": recorded.event.event_id, **body}


def _decisions(version_id: str, engine: Engine, log: EventLog, settings: Settings) -> Iterator[Chain]:
    """Decisions of every rollout in which the version was stable or candidate."""
    query = (
        sa.select(rollouts.c.rollout_id, experiments.c.stable, experiments.c.candidate)
        .join(experiments, experiments.c.experiment_id == rollouts.c.experiment_id)
        .where(
            experiments.c.tenant == settings.tenant,
            (experiments.c.stable == version_id) | (experiments.c.candidate == version_id),
        )
    )
    with engine.connect() as connection:
        roles = {
            rollout_id: "stable" if stable == version_id else "candidate"
            for rollout_id, stable, _ in connection.execute(query)
        }
    if not roles:
        return
    for recorded in log.scan(kinds=["rollout.decision"], tenant=settings.tenant):
        body = recorded.event.body
        if body.get("rollout_id") in roles:
            shown = {k: v for k, v in body.items() if k != "evidence"}
            role = roles[body["rollout_id"]]
            yield {"seq": recorded.seq, "event_id": recorded.event.event_id, "role": role, **shown}


def _routes(version_id: str, log: EventLog, settings: Settings) -> Iterator[Chain]:
    """Changes of routes that touched the version."""
    for recorded in log.scan(kinds=["route.changed"], tenant=settings.tenant):
        body = recorded.event.body
        before, after = body.get("before") or {}, body.get("after") or {}
        if not any(version_id in (row.get("stable"), *_shares(row)) for row in (before, after)):
            continue
        yield {
            "seq": recorded.seq,
            "event_id": recorded.event.event_id,
            "agent": recorded.event.agent,
            "writer": body.get("writer"),
            "reason": body.get("reason"),
            "revision": body.get("revision"),
            "stable": after.get("stable"),
            "shares": _shares(after),
        }


def _shares(row: Chain) -> dict[str, float]:
    """Share of each candidate of a route."""
    return {arm["version"]: arm["share"] for arm in row.get("arms", ())}


def to_text(chain: Chain) -> str:
    """The chain for people, one link a line."""
    version, run, dataset = chain["version"], chain["run"], chain["dataset"]
    aliases = "".join(f" @{alias}" for alias in version["aliases"])
    lines = [f"version   {version['id']}{aliases}  {version['name']}  gates {version['gates']}"]
    lines.append(f"  base      {version['base_model']}")
    if version["adapter_sha256"]:
        lines.append(f"  adapter   sha256 {version['adapter_sha256']}{_match(version['adapter_matches'])}")
    if version["prompt_digest"]:
        lines.append(f"  prompt    {version['prompt_digest']}")
    if run is not None:
        lines.append(f"run       {run['run_id']}  {run['name']}  {run['status']}")
    lines += _dataset_lines(dataset, chain) if dataset else ["dataset   none: no training data behind this version"]
    lines += _forward_lines(chain)
    return "\n".join(lines)


def _dataset_lines(dataset: Chain, chain: Chain) -> Iterator[str]:
    yield f"dataset   {dataset['id']}  hash {dataset['hash']}{_match(dataset.get('hash_matches'))}"
    if "missing" in dataset:
        yield f"  {dataset['missing']}"
        return
    for kind, splits in dataset["counts"].items():
        yield f"  {kind:<12}" + ", ".join(f"{split} {n}" for split, n in splits.items())
    for digest, examples in dataset["prompts"].items():
        yield f"  prompt    {digest}, {examples} examples"
    interactions, feedback = chain["interactions"], chain["feedback"]
    yield f"from      {interactions['count']} interactions, {interactions['in_log']} of them in the log"
    served = ", ".join(f"{name} {n}" for name, n in interactions["served_by"].items())
    if served:
        yield f"  served by {served}"
    types = ", ".join(f"{name} {n}" for name, n in feedback["by_type"].items())
    yield f"feedback  {feedback['count']} events ({types or 'none'})"
    for sample in feedback["sample"]:
        yield f"  seq {sample['seq']}  {sample['event_id']}  {sample['type']} on {sample['interaction_id']}"


def _forward_lines(chain: Chain) -> Iterator[str]:
    for event in chain["registry_events"]:
        alias = f" {event['alias']}" if event.get("alias") else ""
        yield f"then      seq {event['seq']}  {event['change']}{alias}"
    for d in chain["decisions"]:
        where = f"seq {d['seq']}  {d['rollout_id']} #{d['number']} as {d['role']}"
        yield f"decision  {where}: {d['outcome']}, share {d['share_after']:g} ({d['reason']})"
    for r in chain["routes"]:
        where = f"seq {r['seq']}  {r['agent']} revision {r['revision']} by {r['writer']}"
        split = "".join(f", {version} {share:g}" for version, share in r["shares"].items())
        yield f"route     {where}: stable {r['stable']}{split}"


def _match(matches: bool | None) -> str:
    return {None: "", True: " (verified)", False: " (DIFFERS from what is on disk)"}[matches]
