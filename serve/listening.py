"""How the client listens to a stream: it passes everything on as it is, and hears each piece and the end."""

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

from serve.recording import Prediction


class Active(AbstractContextManager[None]):
    """While it lasts, tool calls belong to this prediction."""

    def __init__(self, variable: ContextVar[Any], value: Any) -> None:
        self._variable, self._value = variable, value
        self._token: Token[Any] | None = None

    def __enter__(self) -> None:
        self._token = self._variable.set(self._value)

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        self._variable.reset(self._token)


Quiet = Callable[..., Any]
"""Runs a method of a `Prediction` and swallows what it raises, counting it."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Follows one stream on behalf of a prediction."""

    prediction: Prediction | None
    """`None`: it could not be begun, and the stream passes unheard."""
    variable: ContextVar[Any]
    quietly: Quiet

    def active(self) -> Active:
        """The stream's own code runs inside, and only that: the reader's tool calls are not its."""
        return Active(self.variable, self.prediction)

    def piece(self, piece: Any) -> None:
        """A piece went by."""
        if self.prediction is not None:
            self.quietly(self.prediction.piece, piece)

    def end(self, error: BaseException | None = None) -> None:
        """The stream is over."""
        if self.prediction is not None:
            self.quietly(self.prediction.finish, error)


def listen(source: Generator[Any, Any, Any], listener: Listener) -> Generator[Any, Any, Any]:
    """A generator that behaves as `source` does, to `send`, `throw` and `close` too (PEP 380)."""
    step: Callable[[], Any] = functools.partial(next, source)
    try:
        while True:
            with listener.active():
                piece = step()
            listener.piece(piece)
            try:
                sent = yield piece
            except GeneratorExit:
                source.close()
                raise
            except BaseException as error:
                step = functools.partial(source.throw, error)
            else:
                step = functools.partial(source.send, sent)
    except StopIteration as stop:
        listener.end()
        return stop.value
    except BaseException as error:
        listener.end(error)
        raise


def heard_async(function: Any, listener_of: Callable[[tuple[Any, ...], dict[str, Any]], Listener]) -> Any:
    """The same for a function that makes asynchronous generators, as such a function."""

    @functools.wraps(function)
    async def heard(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        listener, source = listener_of(args, kwargs), function(*args, **kwargs)
        step: Callable[[], Any] = functools.partial(source.asend, None)
        try:
            while True:
                with listener.active():
                    piece = await step()
                listener.piece(piece)
                try:
                    sent = yield piece
                except GeneratorExit:
                    await source.aclose()
                    raise
                except BaseException as error:
                    step = functools.partial(source.athrow, error)
                else:
                    step = functools.partial(source.asend, sent)
        except StopAsyncIteration:
            listener.end()
        except BaseException as error:
            listener.end(error)
            raise

    return heard


class HeardStream:
    """Stands before an iterator that is no generator (a client library's stream) and passes everything on."""

    def __init__(self, source: Any, listener: Listener) -> None:
        self._source, self._listener = source, listener

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            with self._listener.active():
                piece = next(self._source)
        except StopIteration:
            self._listener.end()
            raise
        except BaseException as error:
            self._listener.end(error)
            raise
        self._listener.piece(piece)
        return piece

    def __enter__(self) -> "HeardStream":
        self._source.__enter__()
        return self

    def __exit__(self, *problem: Any) -> Any:
        self._listener.end(problem[1])
        return self._source.__exit__(*problem)

    def close(self) -> None:
        """Close the stream; what came so far is recorded as cut off unless it had ended."""
        self._listener.end(GeneratorExit())
        self._source.close()

    def __del__(self) -> None:
        self._listener.end(GeneratorExit())


class HeardAsyncStream:
    """The same before an asynchronous iterator."""

    def __init__(self, source: Any, listener: Listener) -> None:
        self._source, self._listener = source, listener

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            with self._listener.active():
                piece = await self._source.__anext__()
        except StopAsyncIteration:
            self._listener.end()
            raise
        except BaseException as error:
            self._listener.end(error)
            raise
        self._listener.piece(piece)
        return piece

    async def __aenter__(self) -> "HeardAsyncStream":
        await self._source.__aenter__()
        return self

    async def __aexit__(self, *problem: Any) -> Any:
        self._listener.end(problem[1])
        return await self._source.__aexit__(*problem)

    def __del__(self) -> None:
        self._listener.end(GeneratorExit())
