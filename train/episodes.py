"""Episodes of an agent with tools, for GRPO: it answers, its calls are answered, until it calls no more.

All episodes of a batch go on together, turn by turn. Only what the model wrote is learned from; the tools'
results are masked. A failed world leaves an episode without a reward.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.settings.training import ToolWorldSettings
from data.interaction_bodies import Message
from data.template import render
from data.tool_calls import ToolCall, describe_call, parse_calls
from train.generate import Sampling, decode, end_tokens
from train.worlds import World, WorldFailedError, open_world


@dataclass
class Episode:
    """One attempt at one task."""

    prompt_ids: list[int]
    world: World
    ids: list[int] = field(default_factory=list)
    """Everything after the prompt."""
    mask: list[int] = field(default_factory=list)
    """1 where the model wrote, 0 where a tool did."""
    calls: list[ToolCall] = field(default_factory=list)
    text: str = ""
    """The last thing the model said."""
    failed: str = ""
    """Why the world could not answer."""
    turns: int = 0

    def sample(self) -> dict[str, Any] | None:
        """What a grader sees; `None` after a failure of the world, which earns nothing."""
        if self.failed:
            return None
        return {"output_text": self.text, "output_tools": [describe_call(call) for call in self.calls]}


def begin(prompt: str, settings: ToolWorldSettings) -> Episode:
    """An episode for a row of `Encoder.prompts` made from a trajectory."""
    row = json.loads(prompt)
    results = [(ToolCall(name, arguments), result) for name, arguments, result in row["results"]]
    return Episode(row["ids"], open_world(settings, row["tools"], results))


@dataclass(frozen=True)
class Player:
    """How episodes are played."""

    tokenizer: Any
    settings: ToolWorldSettings
    max_tokens: int
    """Longest episode, tools' results included."""

    def play(self, model: Any, prompts: Sequence[str], sampling: Sampling) -> list[Episode]:
        """One episode for each prompt, in order."""
        episodes = [begin(prompt, self.settings) for prompt in prompts]
        ends = end_tokens(model, self.tokenizer)
        open_ones = episodes
        for turn in range(self.settings.max_turns):
            room = max((self.max_tokens - len(episode.ids) for episode in open_ones), default=0)
            if room <= 0:
                break
            asked = [episode.prompt_ids + episode.ids for episode in open_ones]
            turn_sampling = replace(sampling, max_new_tokens=room, seed=sampling.seed + turn)
            written = decode(model, asked, ends, turn_sampling)
            for episode, ids in zip(open_ones, written, strict=True):
                self._hear(episode, ids)
            open_ones = [e for e in open_ones if self._goes_on(e, ends)]
        return episodes

    def _hear(self, episode: Episode, ids: list[int]) -> None:
        kept = ids[: self.max_tokens - len(episode.ids)]
        episode.ids += kept
        episode.mask += [1] * len(kept)
        episode.text = self.tokenizer.decode(kept, skip_special_tokens=True)
        episode.turns += 1

    def _goes_on(self, episode: Episode, ends: Sequence[int]) -> bool:
        """Answer the calls of the last turn; false when there is none, or no room or turn to go on."""
        calls = parse_calls(episode.text) if episode.ids and episode.ids[-1] in ends else []
        if not calls:
            return False
        episode.calls += calls
        if episode.turns >= self.settings.max_turns:
            return False
        try:
            replies = [(call, episode.world.answer(call)) for call in calls]
        except WorldFailedError as error:
            episode.failed = str(error)
            return False
        suffix = result_ids(self.tokenizer, replies, ends)
        if len(episode.ids) + len(suffix) >= self.max_tokens:
            return False
        episode.ids += suffix
        episode.mask += [0] * len(suffix)
        return True


def result_ids(tokenizer: Any, replies: Sequence[tuple[ToolCall, str]], ends: Sequence[int]) -> list[int]:
    """What the template writes between the end of a turn that calls tools and the start of the next."""
    calls = [{"id": f"call_{n}", **describe_call(call)} for n, (call, _) in enumerate(replies)]
    before: list[Message] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    results: list[Message] = [
        {"role": "tool", "content": result, "name": call.name, "tool_call_id": f"call_{n}"}
        for n, (call, result) in enumerate(replies)
    ]
    start = render(tokenizer, before)
    whole = render(tokenizer, [*before, *results], add_generation_prompt=True)
    last = max(place for place, token in enumerate(start) if token in ends)
    return whole[last + 1 :]
