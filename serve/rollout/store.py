"""The `rollouts` table: compare-and-swap rows, so that two controllers cannot both act."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.errors import ConflictError, NotFoundError
from cluster.tables import experiments, rollouts
from serve.experiments.store import Experiment
from serve.rollout.state import ENDED, Decision, Look, RolloutConfig, RolloutState, State
from serve.routes import RouteKey


@dataclass(frozen=True, slots=True)
class Rollout:
    """One row, with the experiment it grows."""

    rollout_id: str
    experiment: Experiment
    state: State
    stage: int
    stage_started_us: int
    """Of a promoted one: when it was."""
    holding_since_us: int | None
    approved_stage: int | None
    decisions: int
    """How many decisions are recorded; the next has this number plus one."""
    pending_decision: dict[str, Any] | None
    """Recorded and not yet fully applied."""
    progress: dict[str, Any]
    """`looks`, `split_broken`, `frozen_by`, `last_code`; `released` once the previous champion may be unloaded;
    `failure` while it cannot be looked at."""
    config: dict[str, Any]
    reason: str | None
    revision: int
    created_at_us: int
    updated_at_us: int

    @property
    def key(self) -> RouteKey:
        """The route it runs on."""
        return self.experiment.key

    @property
    def settings(self) -> RolloutConfig:
        """The configuration it was started with."""
        return RolloutConfig.model_validate(self.config)

    def as_state(self, **seen: Any) -> RolloutState:
        """What `decide` works on; `seen` is what the route says, by the names of `RolloutState`."""
        return RolloutState(
            state=self.state,
            stage=self.stage,
            stage_started_us=self.stage_started_us,
            holding_since_us=self.holding_since_us,
            approved_stage=self.approved_stage,
            looks=tuple(Look(**look) for look in self.progress.get("looks", [])),
            split_broken=bool(self.progress.get("split_broken")),
            frozen_by=self.progress.get("frozen_by"),
            **seen,
        )

    def progress_after(self, decision: Decision) -> dict[str, Any]:
        """What is remembered once the decision is recorded."""
        looks = list(self.progress.get("looks", []))
        if decision.look is not None:
            looks.append(asdict(decision.look))
        by_hand = decision.outcome in ("freeze", "unfreeze")
        return {
            **self.progress,
            "looks": looks,
            "split_broken": bool(self.progress.get("split_broken")) or decision.split_broken,
            "frozen_by": decision.frozen_by if by_hand else self.progress.get("frozen_by"),
            "last_code": decision.code,
        }


def get_rollout(engine: Engine, rollout_id: str) -> Rollout:
    """One rollout.

    Raises:
        NotFoundError: there is none of that name.
    """
    with engine.connect() as connection:
        return read_rollout(connection, rollout_id)


def read_rollout(connection: Connection, rollout_id: str) -> Rollout:
    """The same inside a transaction."""
    found = _select(connection, rollouts.c.rollout_id == rollout_id)
    if not found:
        raise NotFoundError(f"rollout {rollout_id!r} does not exist; see `rayloop rollout list`")
    return found[0]


def live_rollouts(engine: Engine) -> list[Rollout]:
    """Rollouts that a controller still has something to do for, oldest first."""
    with engine.connect() as connection:
        return _select(connection, rollouts.c.state.not_in(ENDED))


def promoted_rollouts(engine: Engine, since_us: int) -> list[Rollout]:
    """Rollouts promoted since then, oldest first."""
    with engine.connect() as connection:
        return _select(connection, (rollouts.c.state == "promoted") & (rollouts.c.stage_started_us > since_us))


def list_rollouts(engine: Engine, tenant: str, agent: str | None = None) -> list[Rollout]:
    """Rollouts of a tenant, oldest first."""
    where = rollouts.c.tenant == tenant
    if agent is not None:
        where &= rollouts.c.agent == agent
    with engine.connect() as connection:
        return _select(connection, where)


def _select(connection: Connection, where: sa.ColumnElement[bool]) -> list[Rollout]:
    query = sa.select(rollouts).where(where).order_by(rollouts.c.created_at_us, rollouts.c.rollout_id)
    rows = connection.execute(query).mappings().all()
    query = sa.select(experiments).where(experiments.c.experiment_id.in_([r["experiment_id"] for r in rows]))
    known = {row["experiment_id"]: Experiment(**row) for row in connection.execute(query).mappings()}
    names = [name for name in Rollout.__slots__ if name != "experiment"]
    return [Rollout(experiment=known[row["experiment_id"]], **{name: row[name] for name in names}) for row in rows]


def insert_rollout(connection: Connection, rollout: Rollout) -> None:
    """Write a new row."""
    values = {name: getattr(rollout, name) for name in Rollout.__slots__ if name != "experiment"}
    experiment = rollout.experiment
    connection.execute(
        rollouts.insert().values(
            **values,
            experiment_id=experiment.experiment_id,
            tenant=experiment.tenant,
            agent=experiment.agent,
            modality=experiment.modality,
        )
    )


def update_rollout(connection: Connection, rollout: Rollout, now_us: int, values: Mapping[str, Any]) -> None:
    """Change a row if nobody has since it was read.

    Raises:
        ConflictError: somebody has.
    """
    changed = connection.execute(
        rollouts.update()
        .where(rollouts.c.rollout_id == rollout.rollout_id, rollouts.c.revision == rollout.revision)
        .values(**values, revision=rollout.revision + 1, updated_at_us=now_us)
    )
    if not changed.rowcount:
        raise ConflictError(f"rollout {rollout.rollout_id} was changed by somebody else; read it again")
