"""The words of evaluation: cases, held-out truth, gates, what was found of a version."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from data.interaction_bodies import Message

Status = Literal["passed", "failed", "not_applicable", "no_data", "could_not_run", "waiting"]
"""`waiting`: people have been asked and not all have answered; only what is reported and not gated waits."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Truth:
    """A held-out prompt with the answer a person liked or wrote."""

    example_id: str
    user_id: str
    prompt: Prompt
    reference: str
    origin: str
    """`correction`, `liked`, or what the dataset calls it."""


@dataclass(frozen=True)
class Logged:
    """A held-out answer that somebody got, what it earned, and how likely it was."""

    example_id: str
    user_id: str
    prompt: Prompt
    answer: str
    reward: float
    logprob: float
    """Natural log of the probability with which it was drawn."""
    tokens: int
    """Its end token included."""


@dataclass(frozen=True)
class Case:
    """One line of a suite."""

    id: str
    suite: str
    prompt: Prompt
    expect: dict[str, Any]
    """What a right answer looks like; see `scorers`."""
    domain: str = "general"
    hard: bool = True
    """For refusals: must hold in every case."""
    insists: str | None = None
    """What the user says to the version's own answer; it is asked again with that."""

    def argued(self, answer: str) -> Prompt:
        """The prompt once the version has answered and the user has insisted."""
        said = ({"role": "assistant", "content": answer}, {"role": "user", "content": self.insists})
        return Prompt((*self.prompt.messages, *said), self.prompt.tools)


@dataclass(frozen=True)
class Gate:
    """What one suite found."""

    suite: str
    status: Status
    value: float | None = None
    threshold: float | None = None
    interval: tuple[float, float] | None = None
    detail: str = ""
    changed_cases: tuple[str, ...] = ()
    """Ids of the cases whose outcome differs between the two versions."""
    metrics: dict[str, float] = field(default_factory=dict)
    gated: bool = True
    """`False`: reported only, whatever the status."""

    @property
    def passed(self) -> bool:
        """Whether this gate lets the version through. No data and could not run do not."""
        return not self.gated or self.status in ("passed", "not_applicable")

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": self.passed, "changed_cases": list(self.changed_cases)}


@dataclass(frozen=True)
class Evaluation:
    """What was found about a version."""

    version: str
    against: str
    passed: bool
    gates: list[Gate]
    dataset_id: str
    dataset_hash: str
    prompts: int
    grader_version: str
    run_id: str = ""
    alias: str | None = None
    """`challenger` where the version became it."""
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.__dict__, "gates": [gate.to_json() for gate in self.gates]}


class Model(Protocol):
    """A version that can be asked."""

    @property
    def name(self) -> str:
        """The version's id."""
        ...

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers, in order."""
        ...

    def losses(self, truths: Sequence[Truth]) -> list[tuple[float, int]]:
        """For each recorded answer: its negative log-likelihood in nats, and its tokens."""
        ...

    def likelihoods(self, logged: Sequence[Logged]) -> list[tuple[float, int]]:
        """For each logged answer: its log-probability in nats and its tokens, up to its end token."""
        ...


def verdict(gates: Sequence[Gate]) -> bool:
    """A version passes when every gate lets it through and at least one was really measured."""
    return all(gate.passed for gate in gates) and any(g.gated and g.status == "passed" for g in gates)


def outcome(holds: bool) -> Status:
    """The status of a gate that was measured."""
    return "passed" if holds else "failed"


def could_not_run(suite: str, error: Exception, *, gated: bool = True) -> Gate:
    """The gate of a suite that broke."""
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Gate(suite, "could_not_run", detail=cause, gated=gated)


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message's content, whichever of OpenAI's two shapes it has."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""
