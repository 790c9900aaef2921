"""A little world for the tests of experiments and rollouts: users who ask and react, written to the log."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy.engine import Engine

from cluster.errors import NotFoundError
from cluster.settings import Settings, load_settings
from data.events import Event, parse_body
from data.log import EventLog
from serve.applications.driver import Status
from serve.assignment import Assignment, alone, assign_request
from serve.rollout.commands import compare, start
from serve.rollout.controller import Controller
from serve.rollout.state import ENDED
from serve.rollout.steps import Steps
from serve.rollout.store import Rollout, get_rollout
from serve.routes import Route, RouteKey, read_route, write_route

TENANT, AGENT = "acme", "triage"
SECOND_US = 1_000_000


def interaction(
    interaction_id: str,
    made: Assignment | None,
    *,
    user: str | None,
    experiment_id: str | None = "exp",
    at_us: int = SECOND_US,
    session: str | None = None,
    **body: Any,
) -> Event:
    """One request as the router records it."""
    record: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}], "latency_s": 0.1} | body
    if made is not None:
        record |= {
            "arm": made.arm,
            "bucket": made.bucket,
            "propensity": made.propensity,
            "assignment_unit": made.unit,
            "experiment_id": experiment_id,
        }
    return Event(
        "interaction",
        TENANT,
        "main",
        parse_body("interaction", record),
        occurred_at_us=at_us,
        user_id=user,
        session_id=session,
        agent=AGENT,
        interaction_id=interaction_id,
    )


def feedback(interaction_id: str, kind: str, reward: float, *, at_us: int = SECOND_US, **body: Any) -> Event:
    """One signal as the intake records it."""
    record = parse_body("feedback", {"type": kind, "reward": reward} | body)
    return Event(
        "feedback",
        TENANT,
        "main",
        record,
        occurred_at_us=at_us,
        agent=AGENT,
        interaction_id=interaction_id,
    )


@dataclass
class Population:
    """Simulated users. Each is right or wrong served; most react with a thumb, some thumbs are wrong."""

    users: int = 300
    accuracy: dict[str, float] = field(default_factory=lambda: {"stable": 0.65, "candidate": 0.65})
    """By version, and by arm for versions that are not named."""
    error_rate: dict[str, float] = field(default_factory=lambda: {"stable": 0.0, "candidate": 0.0})
    reacts: float = 0.6
    silences: dict[str, float] = field(default_factory=dict)
    """Arm -> share of its unhappy users who say nothing."""
    wrong_thumb: float = 0.05
    spread: float = 0.15
    """Standard deviation of the difficulty between users."""
    seed: int = 0
    versions: dict[int | None, str] = field(default_factory=dict)
    """Place of a candidate among those in force, `None` for stable -> the version assigned, as the route has it."""
    split: list[tuple[str | None, float, float]] | None = None
    """As the router records it where there are several candidates."""

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.skill = self.random.normal(0, self.spread, self.users)
        self.served = 0

    def ask(
        self,
        log: EventLog,
        assigner: Callable[[str], tuple[Assignment, str | None]],
        users: Sequence[int],
        at_us: int,
    ) -> None:
        """Each of these users sends one request and may react; `assigner` plays the router."""
        events: list[Event] = []
        for number in users:
            made, experiment_id = assigner(f"user-{number}")
            self.served += 1
            events += self._turn(number, made, experiment_id, f"i{self.seed}-{self.served}", at_us)
        log.append(events)

    def _turn(
        self, number: int, made: Assignment, experiment_id: str | None, interaction_id: str, at_us: int
    ) -> list[Event]:
        failed = self.random.random() < self.error_rate[made.arm]
        flags = {"error": "server_error"} if failed else {}
        user = f"user-{number}"
        version = self.versions.get(made.candidate)
        accuracy = self.accuracy.get(version or "", self.accuracy[made.arm])
        asked = interaction(
            interaction_id,
            made,
            user=user,
            experiment_id=experiment_id,
            at_us=at_us,
            flags=flags,
            assigned_version=version,
            split=self.split,
        )
        if failed or self.random.random() > self.reacts:
            return [asked]
        right = self.random.random() < accuracy + self.skill[number]
        liked = right != (self.random.random() < self.wrong_thumb)
        if not liked and self.silences and self.random.random() < self.silences.get(made.arm, 0.0):
            return [asked]
        kind, reward = ("thumbs_up", 1.0) if liked else ("thumbs_down", -1.0)
        return [asked, feedback(interaction_id, kind, reward, at_us=at_us)]


def fixed_split(share: float, salt: str, experiment_id: str = "exp") -> Callable[[str], tuple[Assignment, str]]:
    """A router with a constant share."""

    def assigner(user: str) -> tuple[Assignment, str]:
        made = assign_request(alone(share), salt, TENANT, user=user, session=None, request="r")
        return made, experiment_id

    return assigner


class Killed(BaseException):
    """Stands for the process dying; nothing catches it."""


@dataclass(frozen=True)
class FakeVersion:
    id: str
    tags: dict[str, str]

    @property
    def trained_behind(self) -> str | None:
        return self.tags.get("prompt_digest")


class FakeRegistry:
    """Versions, aliases and tags in memory, like the registry's server they outlive a killed process."""

    def __init__(self, gates: dict[str, str]) -> None:
        self.gates = gates
        self.aliases = {"champion": "triage/1"}
        self.tags: dict[tuple[str, str], str] = {}
        self.failure: Exception | None = None
        """What every write ends in."""

    def get(self, ref: str) -> FakeVersion:
        if ref not in self.gates:
            raise NotFoundError(f"no version {ref!r}; there are {', '.join(self.gates)}")
        own = {key: value for (version, key), value in self.tags.items() if version == ref}
        return FakeVersion(ref, {"rayloop.gates": self.gates[ref]} | own)

    def set_alias(self, model: str, alias: str, version: str, *, actor: str, reason: str) -> None:
        if self.failure is not None:
            raise self.failure
        self.aliases[alias] = version

    def tag(self, version: str, key: str, value: str) -> None:
        self.tags[version, key] = value


class FakeServables:
    """Engines that load what is wanted at once."""

    def __init__(self) -> None:
        self.wanted = {"triage/1"}
        self.refuses: str | None = None

    def want(self, version: str) -> None:
        self.wanted.add(version)

    def unwant(self, version: str) -> None:
        self.wanted.discard(version)

    def status(self, version: str) -> tuple[Status, str]:
        if self.refuses is not None:
            return "failed", self.refuses
        return ("ready", "") if version in self.wanted else ("absent", "")

    def sync(self, now_us: int) -> None:
        """They need no applications."""


class FakeRouters:
    """Routers that show every write at once, unless told otherwise."""

    def __init__(self) -> None:
        self.broken: str | None = None
        self.shown = True

    def smoke(self, route: Route, version: str) -> str | None:
        return self.broken

    def shows(self, route: Route) -> bool:
        return self.shown


class KillableSteps:
    """Dies before or after the n-th effect. What was done before stays done, as on a real machine."""

    EFFECTS = (
        "record",
        "set_route",
        "set_champion",
        "mark_rolled_back",
        "note_decision",
        "announce",
        "end_experiment",
        "want",
        "unwant",
        "is_shown",
        "finish",
    )

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.point = 0
        self.kill_at: int | None = None
        """Twice the number of the effect, plus one for "after it"."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.steps, name)
        return self._killable(value) if name in self.EFFECTS else value

    def _killable(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            self._pass()
            result = effect(*arguments, **named)
            self._pass()
            return result

        return run

    def _pass(self) -> None:
        self.point += 1
        if self.point == self.kill_at:
            raise Killed


@dataclass
class World:
    """One route, one candidate, a simulated clock, and users who ask every `every_s`."""

    engine: Engine
    settings: Settings
    population: Population = field(default_factory=Population)
    every_s: float = 1.0
    now_us: int = 1_000_000 * SECOND_US

    def __post_init__(self) -> None:
        self.registry = FakeRegistry({"triage/1": "not_run", "triage/2": "passed", "triage/3": "failed"})
        self.servables, self.routers = FakeServables(), FakeRouters()
        self.steps = KillableSteps(
            Steps(self.engine, self.registry, self.servables, self.routers, clock=lambda: self.now_us)
        )
        self.log = EventLog(self.engine)
        self.key = RouteKey(TENANT, AGENT)
        self.asking = 0
        write_route(self.engine, self.key, {"stable": "triage/1"}, expected_revision=0, writer="person:ann")

    def controller(self) -> Controller:
        """A new controller process."""
        return Controller(self.steps, self.settings)  # type: ignore[arg-type]

    def start(self, version: str = "triage/2", **named: Any) -> Rollout:
        return start(self.steps, self.settings, self.key, version, actor="person:ann", **named)  # type: ignore[arg-type]

    def compare(self, shares: dict[str, float], **named: Any) -> list[Rollout]:
        return compare(self.steps, self.settings, self.key, shares, actor="person:ann", **named)  # type: ignore[arg-type]

    @property
    def route(self) -> Route:
        return read_route(self.engine, self.key)

    def assign(self, user: str) -> tuple[Assignment, str | None]:
        """What the router does."""
        route = self.route_now  # a salt of our own: an experiment's is random, and results would differ by run
        made = assign_request(route.live, "salt", TENANT, user=user, session=None, request="r")
        own = route.experiment_id if made.candidate is None else route.live[made.candidate].experiment_id
        return made, own

    def second(self, requests: int = 60, *, traffic: bool = True) -> None:
        """A second of traffic: the next users in turn ask once."""
        self.now_us += SECOND_US
        if traffic:
            self.route_now = route = self.route
            self.population.versions = {None: route.stable, **{n: arm.version for n, arm in enumerate(route.live)}}
            self.population.split = route.split
            users = [(self.asking + n) % self.population.users for n in range(requests)]
            self.asking += requests
            self.population.ask(self.log, self.assign, users, self.now_us)

    def run(self, rollout_id: str, *, seconds: int = 120, requests: int = 60, traffic: bool = True) -> Rollout:
        """Seconds of traffic with a tick after each, until the rollout has ended."""
        controller = self.controller()
        for _ in range(seconds):
            self.second(requests, traffic=traffic)
            controller.tick()
            rollout = get_rollout(self.engine, rollout_id)
            if rollout.state in ENDED:
                break
        controller.close()
        return rollout

    def run_on(self, seconds: int, *, traffic: bool = True) -> None:
        """Seconds of traffic with a tick after each, whatever becomes of a rollout."""
        controller = self.controller()
        for _ in range(seconds):
            self.second(traffic=traffic)
            controller.tick()
        controller.close()

    def state(self, rollout: Rollout) -> str:
        """The state of a rollout as it is."""
        return get_rollout(self.engine, rollout.rollout_id).state

    def decisions(self) -> list[dict[str, Any]]:
        """Bodies of the recorded decisions."""
        return [r.event.body for r in self.log.scan(kinds=["rollout.decision"])]


DEMO = {
    "experiment": {
        "guardrails": ["error_rate", "latency_over_slo"],
        "guardrails_when_present": ["thumbs_up_rate"],
        "margins": {"error_rate": 0.05, "latency_over_slo": 0.1, "satisfaction": 0.1, "thumbs_up_rate": 0.1},
        "tuning_users": 120,
        "tuning_trials": 150,
        "breach_min_users_per_arm": 15,
    },
    "rollout": {
        "stage_duration_s": 5,
        "min_users_per_arm": 20,
        "detectable_improvement": 0.15,
        "final_min_users_per_arm": 20,
        "final_control_share": 0.1,
        "hold_limit_s": 60,
        "stale_after_s": 10,
        "tick_s": 0.5,
        "start_timeout_s": 60,
        "confirm_timeout_s": 5,
    },
    "automation": {"auto_rollout": True},
}
"""Settings for stages of seconds and a few hundred users."""


def demo_settings(**rollout: Any) -> Settings:
    values = {**DEMO, "rollout": {**DEMO["rollout"], **rollout}}
    return load_settings(tenant=TENANT, **values)[0]
