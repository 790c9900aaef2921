"""A little world for the tests of experiments and rollouts: users who ask and react, written to the log."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.events import Event, parse_body
from data.log import EventLog
from serve.assignment import Assignment, assign_request

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
    if made is not None and experiment_id is not None:
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
    error_rate: dict[str, float] = field(default_factory=lambda: {"stable": 0.0, "candidate": 0.0})
    reacts: float = 0.6
    wrong_thumb: float = 0.05
    spread: float = 0.15
    """Standard deviation of the difficulty between users."""
    seed: int = 0

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
        asked = interaction(
            interaction_id, made, user=user, experiment_id=experiment_id, at_us=at_us, flags=flags
        )
        if failed or self.random.random() > self.reacts:
            return [asked]
        right = self.random.random() < self.accuracy[made.arm] + self.skill[number]
        liked = right != (self.random.random() < self.wrong_thumb)
        kind, reward = ("thumbs_up", 1.0) if liked else ("thumbs_down", -1.0)
        return [asked, feedback(interaction_id, kind, reward, at_us=at_us)]


def fixed_split(
    share: float, salt: str, experiment_id: str = "exp"
) -> Callable[[str], tuple[Assignment, str]]:
    """A router with a constant share."""

    def assigner(user: str) -> tuple[Assignment, str]:
        made = assign_request(share, salt, TENANT, user=user, session=None, request="r")
        return made, experiment_id

    return assigner
