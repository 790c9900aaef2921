"""Asks judges and reward models on the event loop, within a deadline."""

import asyncio
from typing import Any

import aiohttp

from cluster.http_post import IDLE_CONNECTION_S
from data.grading.endpoint import MAX_REPLY_BYTES, SERVER_ERROR, JudgeEndpoint, parse_reply
from data.grading.types import AbstainError, Question


class ModelCalls:
    """One pool of connections. Belongs to one event loop; `close` it there."""

    def __init__(self, connections: int) -> None:
        self._limit = connections
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, endpoint: JudgeEndpoint, question: Question) -> Any:
        """The reply's document; the caller bounds the time.

        Raises:
            AbstainError: nothing usable came back.
        """
        if self._session is None:
            # No timeout of its own: the deadline of the grade cancels the call.
            connector = aiohttp.TCPConnector(limit=self._limit, keepalive_timeout=IDLE_CONNECTION_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        url = endpoint.url.rstrip("/") + question.path
        try:
            async with self._session.post(url, json=endpoint.body(question), headers=endpoint.headers()) as reply:
                return parse_reply(reply.status, await _bounded(reply.content))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            cause = str(error) or type(error).__name__
            raise AbstainError(f"the judge does not answer ({cause})", SERVER_ERROR) from None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            await asyncio.sleep(0)  # lets the transports hear of it
            self._session = None


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    """The body, up to just over the bound."""
    body = bytearray()
    async for piece in content.iter_any():
        body += piece
        if len(body) > MAX_REPLY_BYTES:
            break
    return bytes(body)
