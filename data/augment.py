"""Stage 8, augment: synthetic examples beside the human ones, off by default, marked, and never outside train.

Which example gets a copy, and how an answer is damaged, follows from the example's id alone, so the number
of tasks changes nothing. Rewording asks a model at temperature 0; as far as that model is not repeatable, a
dataset with paraphrases is not either.
"""

import asyncio
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson
import pyarrow as pa

from cluster.http_post import IDLE_CONNECTION_S
from cluster.settings.curation import AugmentSettings
from data.join import to_json
from data.scrub_text import scrub_text
from data.stages import Dropped
from data.template import content_text

Row = dict[str, Any]
Reword = Callable[[Sequence[str]], list[str | None]]
"""Texts -> other words for each, or `None`."""
REQUEST = "Say the following in other words. Keep every name, number and placeholder. Answer with the text only.\n\n"
NUMBER = re.compile(r"\d+")
HALF = 0.5  # of the copies are damaged ones, where pairs leave room
LONGEST_RATIO = 3.0  # a rewording this much longer than the text is an answer to it, not a rewording


def augment(
    table: pa.Table, settings: AugmentSettings, reword: Reword, damage_below: float = HALF
) -> tuple[pa.Table, Dropped]:
    """Adds paraphrases and damaged answers of training examples; the tally counts rewordings that failed.

    `damage_below`: the hash under which an example is damaged and not reworded (see `damage_limit`).
    """
    if not settings.enabled:
        return table, Counter()
    dropped: Dropped = Counter()
    train = [row for row in table.to_pylist() if row["split"] == "train" and row["kind"] != "trajectory"]
    wanted = [row for row in train for _ in range(copies(row, settings))]
    made: list[Row] = []
    to_damage = [row for row in wanted if settings.negatives and row["kind"] == "sft" and _lot(row) < damage_below]
    made += [negative for row in to_damage if (negative := damaged(row)) is not None]
    if settings.paraphrases:
        taken = {row["example_id"] for row in to_damage}
        made += _paraphrases([row for row in wanted if row["example_id"] not in taken], reword, dropped)
    unique = {row["example_id"]: row for row in made}
    rows = pa.Table.from_pylist([unique[i] for i in sorted(unique)], table.schema)
    return pa.concat_tables([table, rows]), dropped


def copies(row: Row, settings: AugmentSettings) -> int:
    """How many synthetic examples a row is due: `factor` - 1 on average, by a hash of its id."""
    whole, rest = divmod(settings.factor - 1, 1)
    return int(whole) + (_fraction(row["example_id"]) < rest)


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _lot(row: Row) -> float:
    return _fraction(f"damage {row['example_id']}")


def pairs_due(table: pa.Table, settings: AugmentSettings) -> tuple[int, int, list[float]]:
    """Of a block's training examples: pairs, pairs that are due a copy, and lots of what may be damaged."""
    train = [row for row in table.select(["kind", "split", "example_id"]).to_pylist() if row["split"] == "train"]
    pairs = [row for row in train if row["kind"] == "preference"]
    lots = [_lot(row) for row in train if row["kind"] == "sft" and copies(row, settings)]
    return len(pairs), sum(bool(copies(row, settings)) for row in pairs), lots


def damage_limit(blocks: Iterable[tuple[int, int, list[float]]], settings: AugmentSettings) -> float:
    """The lot below which examples are damaged: half of them, or so few that `human_share` holds among pairs too."""
    found = list(blocks)
    pairs = sum(pairs for pairs, _, _ in found)
    reworded = sum(due for _, due, _ in found) if settings.paraphrases else 0
    most = max(0, math.floor(pairs * (1 / settings.human_share - 1)) - reworded)
    lots = sorted(lot for _, _, lots in found for lot in lots)
    return min(HALF, lots[most]) if most < len(lots) else HALF


def damaged(row: Row) -> Row | None:
    """A pair of a good answer and a worse copy: another number, or only its beginning; `None` if it has neither."""
    messages = orjson.loads(row["messages"])
    answer = messages[-1]
    worse = damage(content_text(answer), row["example_id"])
    if worse is None:
        return None
    pair = {
        "kind": "preference",
        "messages": None,
        "prompt": to_json(messages[:-1]),
        "chosen": to_json([answer]),
        "rejected": to_json([answer | {"content": worse}]),
        "margin": row["score"],
    }
    return _synthetic(row | pair, "damaged", worse)


def damage(text: str, seed: str) -> str | None:
    """The text with one number changed, else cut in the middle; `None` where it is too short for that."""
    numbers = list(NUMBER.finditer(text))
    if numbers:
        found = numbers[int(_fraction(seed) * len(numbers))]
        other = str(int(found[0]) + 1 + int(_fraction(f"by {seed}") * 9)).zfill(len(found[0]))
        return text[: found.start()] + other + text[found.end() :]
    words = text.split()
    return " ".join(words[: len(words) // 2]) if len(words) >= 8 else None


def _paraphrases(rows: Sequence[Row], reword: Reword, dropped: Dropped) -> list[Row]:
    asked = [(row, *_last_question(row)) for row in rows]
    asked = [(row, column, at) for row, column, at in asked if at is not None]
    texts = [content_text(orjson.loads(row[column])[at]) for row, column, at in asked]
    made = []
    for (row, column, at), text, other in zip(asked, texts, reword(texts) if texts else [], strict=True):
        if not other or other.strip() == text.strip() or len(other) > LONGEST_RATIO * len(text):
            dropped["no rewording"] += 1
            continue
        messages = orjson.loads(row[column])
        messages[at] = messages[at] | {"content": scrub_text(other.strip())}
        made.append(_synthetic(row | {column: to_json(messages)}, "paraphrase", other))
    return made


def _last_question(row: Row) -> tuple[str, int | None]:
    column = "prompt" if row["prompt"] is not None else "messages"
    users = [i for i, message in enumerate(orjson.loads(row[column])) if message["role"] == "user"]
    return column, users[-1] if users else None


def _synthetic(row: Row, origin: str, text: str) -> Row:
    identity = hashlib.sha256(f"{row['example_id']} {origin} {text}".encode()).hexdigest()[:32]
    return row | {"example_id": identity, "origin": origin, "synthetic": True}


def reworder(settings: AugmentSettings, agent: str | None) -> Reword:
    """Asks the stable version at the configured endpoint; a question that gets no answer stays without."""

    def reword(texts: Sequence[str]) -> list[str | None]:
        return asyncio.run(_ask_all(texts, settings, settings.model or agent or "default"))

    return reword


async def _ask_all(texts: Sequence[str], settings: AugmentSettings, model: str) -> list[str | None]:
    import aiohttp

    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
    gate = asyncio.Semaphore(settings.concurrency)
    connector = aiohttp.TCPConnector(keepalive_timeout=IDLE_CONNECTION_S)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:

        async def ask(text: str) -> str | None:
            body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": REQUEST + text}]}
            url = f"{settings.endpoint.rstrip('/')}/v1/chat/completions"
            try:
                async with gate, session.post(url, json=body) as answer:
                    answer.raise_for_status()
                    return content_text((await answer.json(content_type=None))["choices"][0]["message"])
            except (aiohttp.ClientError, TimeoutError, KeyError, IndexError, ValueError):
                return None  # counted by the caller as a rewording that failed

        return list(await asyncio.gather(*map(ask, texts)))
