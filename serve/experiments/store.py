"""The `experiments` table: who compares what, on which route, and how it ended."""

import math
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.clock import now_us
from cluster.errors import ConflictError, InputError, NotFoundError
from cluster.tables import experiments
from serve.assignment import DIGITS
from serve.routes import RouteKey

Outcome = Literal["promote", "keep", "inconclusive", "rejected_by_guardrail"]
SUM_TOLERANCE = 1e-9
LAYER_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"


@dataclass(frozen=True, slots=True)
class Experiment:
    """One row."""

    experiment_id: str
    tenant: str
    workspace: str
    agent: str
    modality: str
    layer: str
    """Experiments in one layer share the users' buckets; those in different layers are independent."""
    salt: str
    stable: str
    candidate: str
    bucket_low: float
    bucket_high: float
    """The candidate may have the buckets of its layer from the one up to the other."""
    config: dict[str, Any]
    state: str
    """`running` or `ended`."""
    outcome: str | None
    created_at_us: int
    ended_at_us: int | None

    @property
    def key(self) -> RouteKey:
        """The route it runs on."""
        return RouteKey(self.tenant, self.agent, self.modality)


def check_shares(shares: Mapping[str, float]) -> None:
    """Shares of versions must be in [0, 1] and sum to one.

    Raises:
        InputError: they do not.
    """
    for version, share in shares.items():
        if not (isinstance(share, int | float) and math.isfinite(share) and 0 <= share <= 1):
            raise InputError(f"shares.{version}", share, "must be between 0 and 1", "write a fraction such as 0.1")
    total = sum(shares.values())
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise InputError("shares", dict(shares), f"must sum to 1, not {total:g}", "mend the shares")


def check_versions(versions: Mapping[str, Any], find: Callable[[str], object]) -> None:
    """At least two different versions that the registry knows; `find` raises NotFoundError for others."""
    if len(versions) < 2:
        raise InputError("shares", dict(versions), "must name two different versions", "name stable and candidate")
    for version in versions:
        find(version)


def check_layer(layer: str) -> str:
    """A layer's name.

    Raises:
        InputError: it is empty, too long or holds other characters than names do.
    """
    if not re.fullmatch(LAYER_PATTERN, layer):
        raise InputError("layer", layer, f"must match {LAYER_PATTERN}", "name it like `search-ranking`")
    return layer


def create_experiment(
    connection: Connection,
    key: RouteKey,
    *,
    stable: str,
    candidate: str,
    shares: Mapping[str, float],
    find_version: Callable[[str], object],
    config: Mapping[str, Any],
    buckets: tuple[float, float] = (0.0, 1.0),
    layer: str | None = None,
    workspace: str = "default",
    at_us: int | None = None,
) -> Experiment:
    """Insert an experiment as part of the caller's transaction. It claims `buckets` of its layer on the route.

    `shares` are those of all versions of the split at its start, other candidates among them.

    It gets a new salt, which reshuffles the users, unless another experiment runs in its layer: then it shares
    that one's. Without a `layer` the route is a layer of its own.

    Raises:
        InputError: the shares do not sum to one, the versions are the same, or the layer has no name.
        NotFoundError: a version the registry does not know.
        ConflictError: another experiment on this route has some of the buckets, or is in another layer.
    """
    check_shares(shares)
    check_versions(dict.fromkeys([stable, candidate]), find_version)
    for version in shares:
        find_version(version)
    layer = check_layer(f"{key.agent}:{key.modality}" if layer is None else layer)
    _check_free(connection, key, layer, buckets)
    experiment = Experiment(
        experiment_id=f"exp-{uuid.uuid4().hex[:16]}",
        tenant=key.tenant,
        workspace=workspace,
        agent=key.agent,
        modality=key.modality,
        layer=layer,
        salt=_salt_of(connection, key.tenant, layer) or uuid.uuid4().hex,
        stable=stable,
        candidate=candidate,
        bucket_low=buckets[0],
        bucket_high=buckets[1],
        config=dict(config),
        state="running",
        outcome=None,
        created_at_us=now_us() if at_us is None else at_us,
        ended_at_us=None,
    )
    values = {name: getattr(experiment, name) for name in Experiment.__slots__}
    connection.execute(experiments.insert().values(**values))
    return experiment


def end_experiment(connection: Connection, experiment_id: str, outcome: Outcome, at_us: int) -> None:
    """Record how it ended. Ending it again changes nothing, but that a promotion may be taken back."""
    running, promoted = experiments.c.state == "running", experiments.c.outcome == "promote"
    connection.execute(
        experiments.update()
        .where(experiments.c.experiment_id == experiment_id, running if outcome == "promote" else running | promoted)
        .values(state="ended", outcome=outcome, ended_at_us=at_us)
    )


def note_in_config(connection: Connection, experiment: Experiment, **values: Any) -> None:
    """Keep something beside what the experiment was started with."""
    changed = experiments.update().where(experiments.c.experiment_id == experiment.experiment_id)
    connection.execute(changed.values(config=experiment.config | values))


def get_experiment(engine: Engine, experiment_id: str) -> Experiment:
    """One experiment.

    Raises:
        NotFoundError: there is none of that name.
    """
    with engine.connect() as connection:
        query = sa.select(experiments).where(experiments.c.experiment_id == experiment_id)
        row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFoundError(f"experiment {experiment_id!r} does not exist; see `rayloop experiment list`")
    return Experiment(**row)


def list_experiments(engine: Engine, tenant: str, agent: str | None = None) -> list[Experiment]:
    """Experiments of a tenant, newest first."""
    query = sa.select(experiments).where(experiments.c.tenant == tenant)
    if agent is not None:
        query = query.where(experiments.c.agent == agent)
    query = query.order_by(experiments.c.created_at_us.desc(), experiments.c.experiment_id)
    with engine.connect() as connection:
        return [Experiment(**row) for row in connection.execute(query).mappings()]


def running_bandits(engine: Engine) -> list[Experiment]:
    """Experiments in bandit mode that have not ended, oldest first."""
    query = sa.select(experiments).where(experiments.c.state == "running").order_by(experiments.c.created_at_us)
    with engine.connect() as connection:
        found = [Experiment(**row) for row in connection.execute(query).mappings()]
    return [experiment for experiment in found if experiment.config.get("mode") == "bandit"]


def _salt_of(connection: Connection, tenant: str, layer: str) -> str | None:
    """The salt of the experiments that run in a layer; `None` where none does."""
    e = experiments.c
    query = sa.select(e.salt).where(e.tenant == tenant, e.layer == layer, e.state == "running").limit(1)
    return connection.execute(query).scalar()


def _check_free(connection: Connection, key: RouteKey, layer: str, buckets: tuple[float, float]) -> None:
    """One request has one answer: on one route, experiments are of one layer, and have different buckets of it."""
    e = experiments.c
    on_route = (e.tenant == key.tenant) & (e.agent == key.agent) & (e.modality == key.modality)
    query = sa.select(e.experiment_id, e.layer, e.bucket_low, e.bucket_high).where(on_route, e.state == "running")
    low, high = buckets
    for name, other, their_low, their_high in connection.execute(query):
        apart = round(their_high - low, DIGITS) <= 0 or round(high - their_low, DIGITS) <= 0
        if other != layer or not apart:
            raise ConflictError(
                f"experiment {name} runs on route {key} with buckets {their_low:g} to {their_high:g} of layer {other}; "
                f"{low:g} to {high:g} of layer {layer} cannot be had beside them: end it first"
            )
