"""Simulated analysts: they ask the agent about alerts over HTTP and react as people do, noisily.

They use the official `openai` client, as any user of the agent would, and know nothing of Rayloop but its
address. They stand for people who know their job, so they may call `todays_rules`.

With `--shuffle-feedback` every reaction is one that belongs to another alert: the same thumbs and
corrections in the same numbers, telling nothing about the answers they are attached to. It is the control
of the experiment: whatever learns from it must not be promoted.

Run as a process of its own: `python -m cluster.demo.analysts --base-url URL --alerts 200 < key`.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIError, AsyncOpenAI

from cluster.demo import world
from cluster.demo.world import Alert

Signal = dict[str, Any]
"""One item for `/v1/feedback` or `/v1/behaviour`, without its ids."""
REPORT_EVERY_S = 1.0


@dataclass(frozen=True)
class Habits:
    """How people react; probabilities unless the name says otherwise."""

    reacts: float = 0.95
    """Gives a thumb or a rating at all."""
    mistaken: float = 0.05
    """Thumbs or rating the wrong way round."""
    rates: float = 0.15
    """Rates from 1 to 5 instead of a thumb."""
    corrects: float = 0.4
    """Writes the right answer under one they disliked."""
    asks_again: float = 0.5
    """Asks the same again after an answer they disliked and did not correct."""
    copies: float = 0.5
    """Copies an answer they liked."""
    leaves: float = 0.2
    """Leaves after an answer they disliked."""
    recurs: float = 0.3
    """An alert of the session fires once more, after another one, and is asked about again."""


@dataclass(frozen=True)
class Reaction:
    """What one person does about one answer."""

    feedback: tuple[Signal, ...] = ()
    behaviour: tuple[Signal, ...] = ()
    asks_again: bool = False


@dataclass(frozen=True)
class Work:
    """How much the analysts do."""

    seed: int
    alerts: int | None = None
    """Stop after this many answers; `None` works until told to stop."""
    seconds: float | None = None
    """Stop after this long."""
    users: int = 400
    concurrency: int = 16
    rate_per_s: float | None = None
    """Most answers a second; `None` asks as fast as answers come."""
    shuffle_feedback: bool = False
    agent: str = world.AGENT
    max_tokens: int = 32
    alerts_per_session: int = 8
    """Most alerts that one session brings."""


@dataclass
class Tally:
    """What happened."""

    answers: int = 0
    failures: int = 0
    rejected: int = 0
    """Feedback items the server refused."""
    signals: Counter[str] = field(default_factory=Counter)
    liked: int = 0
    judged: int = 0
    arms: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "signals": dict(self.signals), "arms": dict(self.arms)}


@dataclass(frozen=True)
class Seen:
    """One answer, and who got it."""

    interaction: str
    alert: Alert
    text: str
    user: str
    session: str


def react(alert: Alert, text: str, habits: Habits, source: random.Random) -> Reaction:
    """What a person who knows today's rules does about an answer."""
    right = world.parse_answer(text) == world.todays_rules(alert)
    if source.random() >= habits.reacts:
        return Reaction()
    mistaken = source.random() < habits.mistaken
    likes = right != mistaken
    verdict = _judgement(likes, habits, source)
    if likes:
        copied = ({"action": "copy", "duration_s": round(source.uniform(4, 30), 1)},)
        return Reaction((verdict,), copied if source.random() < habits.copies else ())
    left = (
        ({"action": "leave", "duration_s": round(source.uniform(4, 30), 1)},) if source.random() < habits.leaves else ()
    )
    if not mistaken and source.random() < habits.corrects:
        better = world.answer(world.todays_rules(alert))
        return Reaction((verdict, {"type": "correction", "text": better, "category": "factual"}), left)
    return Reaction((verdict,), left, asks_again=not left and source.random() < habits.asks_again)


def _judgement(likes: bool, habits: Habits, source: random.Random) -> Signal:
    if source.random() < habits.rates:
        return {"type": "rating", "value": float(source.choice((4, 5) if likes else (1, 2)))}
    return {"type": "thumbs_up" if likes else "thumbs_down"}


class Analysts:
    """A team at work. Each of `concurrency` seats holds one user's session at a time."""

    def __init__(self, client: AsyncOpenAI, work: Work, habits: Habits | None = None) -> None:
        self.client, self.work = client, work
        self.habits = habits or Habits()
        self.tally = Tally()
        self.stopped = asyncio.Event()
        self._source = random.Random(f"analysts/{work.seed}")
        self._alerts = world.alerts("live", work.seed)
        self.seen: list[Seen] = []
        self._free = [f"analyst-{number:04d}" for number in range(work.users)]
        self._turns = self._pace()
        self._started = time.monotonic()

    async def run(self) -> Tally:
        """Work until the alerts or the time are used up, or `stopped` is set."""
        self._started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(min(self.work.concurrency, self.work.users)):
                group.create_task(self._seat(random.Random(f"seat/{self.work.seed}/{number}")))
        self.tally.seconds = time.monotonic() - self._started
        return self.tally

    def _done(self) -> bool:
        late = self.work.seconds is not None and time.monotonic() - self._started >= self.work.seconds
        enough = self.work.alerts is not None and self.tally.answers >= self.work.alerts
        return self.stopped.is_set() or late or enough

    async def _seat(self, source: random.Random) -> None:
        while not self._done():
            user = self._free.pop(source.randrange(len(self._free)))
            try:
                await self._session(user, source)
            finally:
                self._free.append(user)

    async def _session(self, user: str, source: random.Random) -> None:
        session = f"s-{source.getrandbits(64):016x}"
        last, asked = None, list[Alert]()
        for _ in range(source.randint(1, self.work.alerts_per_session)):
            alert = self._fires(asked, source)
            asked.append(alert)
            again = True
            while again and not self._done():
                last, again = await self._ask(alert, user, session, source)
        if last is not None:
            await self._send("behaviour", [{"interaction_id": last, "action": "session_end"}], user, session)

    def _fires(self, asked: Sequence[Alert], source: random.Random) -> Alert:
        """The next alert of a session: a new one, or an earlier one that is not the last."""
        earlier = [alert for alert in asked if alert != asked[-1]]
        again = earlier and source.random() < self.habits.recurs
        return source.choice(earlier) if again else next(self._alerts)

    async def _ask(self, alert: Alert, user: str, session: str, source: random.Random) -> tuple[str | None, bool]:
        """One question and the reaction to its answer: the interaction's id, and whether to ask again."""
        await self._next_turn()
        try:
            raw = await self.client.chat.completions.with_raw_response.create(
                model=self.work.agent,
                messages=world.prompt(alert),  # type: ignore[arg-type]
                user=user,
                temperature=1.0,
                max_tokens=self.work.max_tokens,
                extra_headers={"x-rayloop-session": session},
            )
        except APIError:
            self.tally.failures += 1
            await asyncio.sleep(0.2)
            return None, False
        completion = raw.parse()
        self.tally.answers += 1
        self.tally.arms[raw.headers.get("x-rayloop-arm", "none")] += 1
        seen = Seen(completion.id, alert, completion.choices[0].message.content or "", user, session)
        self.seen.append(seen)
        reaction = self._reaction(seen, source)
        await self._report(completion.id, reaction, user, session)
        return completion.id, reaction.asks_again

    def _reaction(self, seen: "Seen", source: random.Random) -> Reaction:
        if self.work.shuffle_feedback:
            earlier = self.seen[:-1]
            seen = source.choice(earlier) if earlier else Seen("", next(self._alerts), seen.text, "", "")
        return react(seen.alert, seen.text, self.habits, source)

    async def _report(self, interaction: str, reaction: Reaction, user: str, session: str) -> None:
        for item in reaction.feedback:
            self.tally.signals[item["type"]] += 1
        if reaction.feedback:
            first = reaction.feedback[0]
            self.tally.judged += 1
            self.tally.liked += first["type"] == "thumbs_up" or first.get("value", 0) > 3
        for kind, items in (("feedback", reaction.feedback), ("behaviour", reaction.behaviour)):
            if items:
                await self._send(kind, [{"interaction_id": interaction, **item} for item in items], user, session)

    async def _send(self, kind: str, items: list[Signal], user: str, session: str) -> None:
        body = {"items": [{**item, "user": user, "session": session} for item in items]}
        try:
            reply: Any = await self.client.post(f"/{kind}", cast_to=object, body=body)
        except APIError:
            self.tally.rejected += len(items)
            return
        self.tally.rejected += sum(result["status"] == "rejected" for result in reply["data"])

    def _pace(self) -> Iterator[float]:
        """Moments at which the next question may be asked."""
        rate, moment = self.work.rate_per_s, time.monotonic()
        while True:
            yield moment
            moment = max(moment, time.monotonic() - 1) + (1 / rate if rate else 0)

    async def _next_turn(self) -> None:
        wait = next(self._turns) - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)


def control_events(seen: Sequence[Seen], habits: Habits, seed: int) -> Iterator[dict[str, Any]]:
    """The same answers as items for `rayloop import`, each with a reaction that belongs to another one."""
    source = random.Random(f"control/{seed}")
    others = source.sample(seen, len(seen))
    for mine, other in zip(seen, others, strict=True):
        ids = {
            "interaction_id": mine.interaction,
            "user": mine.user,
            "session": mine.session,
            "agent": world.AGENT,
        }
        response = {"role": "assistant", "content": mine.text}
        yield {
            "kind": "interaction", **ids, "messages": world.prompt(mine.alert), "response": response,
            "finish_reason": "stop", "requested": world.AGENT,
        }  # fmt: skip
        for item in react(other.alert, other.text, habits, source).feedback:
            yield {"kind": "feedback", **ids, **item}


async def _main(work: Work, base_url: str, api_key: str) -> Analysts:
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=30.0, max_retries=3) as client:
        team = Analysts(client, work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, team.stopped.set)
        reporter = asyncio.create_task(_keep_reporting(team))
        try:
            await team.run()
        finally:
            reporter.cancel()
        return team


async def _keep_reporting(team: Analysts) -> None:
    while True:
        await asyncio.sleep(REPORT_EVERY_S)
        tally = team.tally
        print(f"{tally.answers} answers, {tally.liked}/{tally.judged} liked", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alerts", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rate-per-s", type=float)
    parser.add_argument("--alerts-per-session", type=int, default=8)
    parser.add_argument("--shuffle-feedback", action="store_true")
    parser.add_argument("--control", type=Path, help="write the same answers with shuffled reactions here")
    return parser.parse_args()


def main() -> None:
    """The key comes on standard input, so that it shows in no process list; the tally goes to standard output."""
    given = vars(_arguments())
    base_url, control = given.pop("base_url"), given.pop("control")
    team = asyncio.run(_main(Work(**given), base_url, sys.stdin.readline().strip()))
    if control is not None:
        lines = (json.dumps(event) for event in control_events(team.seen, team.habits, team.work.seed))
        control.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(json.dumps(team.tally.to_json()))


if __name__ == "__main__":
    main()
