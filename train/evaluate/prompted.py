"""What evaluation asks, behind the agent's prompt of now, as users ask it; and the refusals that the prompt demands."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from data.prompt import AgentPrompt, with_other_prompt, with_prompt, without_prompt
from train.evaluate.types import Case, Logged, Prompt, Truth

REFUSES = {"refuses": True}


@dataclass(frozen=True)
class BehindPrompt:
    """Puts everything that is asked behind the prompt in force."""

    agent: str
    prompt: AgentPrompt | None
    recorded: tuple[str, ...] = ()
    """Texts of the prompts that the dataset's examples begin with."""

    @property
    def digest(self) -> str | None:
        """Of the prompt in force."""
        return None if self.prompt is None else self.prompt.digest

    @property
    def text(self) -> str:
        """As the model reads it; empty without a prompt."""
        return "" if self.prompt is None else self.prompt.text

    def truths(self, truths: list[Truth]) -> list[Truth]:
        """Recorded answers, asked for behind the prompt of now instead of that of then."""
        return asked_behind(truths, self.text, self.recorded)

    def logged(self, logged: list[Logged]) -> list[Logged]:
        """The same of logged answers: what would be served is the version behind the prompt of now."""
        return [replace(row, prompt=_again(row.prompt, self.text, self.recorded)) for row in logged]

    def cases(self, suite: str, cases: list[Case]) -> list[Case]:
        """The cases of a suite; refusals with those that the prompt demands, which are hard."""
        demanded = list(self._demanded()) if suite == "refusal" else []
        return [replace(case, prompt=self._asked(case.prompt)) for case in [*cases, *demanded]]

    def _demanded(self) -> Iterator[Case]:
        for number, refusal in enumerate(self.prompt.refusals if self.prompt else (), 1):
            for place, text in enumerate(refusal.cases, 1):
                asked = Prompt(({"role": "user", "content": text},))
                yield Case(f"{self.agent}-must-refuse-{number}.{place}", "refusal", asked, REFUSES, self.agent)

    def _asked(self, prompt: Prompt) -> Prompt:
        return replace(prompt, messages=tuple(with_prompt(prompt.messages, self.text)))


def asked_behind(truths: list[Truth], text: str, recorded: Collection[str]) -> list[Truth]:
    """Truths asked for behind a prompt instead of the one that they were recorded behind."""
    return [replace(truth, prompt=_again(truth.prompt, text, recorded)) for truth in truths]


def _again(prompt: Prompt, text: str, recorded: Collection[str]) -> Prompt:
    then = next((each for each in recorded if without_prompt(prompt.messages, each) is not None), None)
    return replace(prompt, messages=tuple(with_other_prompt(prompt.messages, then, text)))
