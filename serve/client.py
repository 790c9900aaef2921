"""The client for agents that run elsewhere: tells Rayloop what they were asked, answered and used.

    rayloop = Client()                       # reads RAYLOOP_ENABLED, RAYLOOP_URL, RAYLOOP_API_KEY, RAYLOOP_DRY_RUN

    @rayloop.prediction(agent="triage")
    def answer(messages): ...

Off unless `RAYLOOP_ENABLED=true`; then a decorator returns the very function it was given. On, an agent's own
results and exceptions pass unchanged, nothing waits for the network but `call_tool` and `grade`, which have a
deadline, and a service that fails means the agent's normal flow. `stats()` counts what was lost.

The standard library only, until personal data is scrubbed in the sender's thread. See docs/client.md.
"""

import asyncio
import atexit
import functools
import inspect
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

from serve.client_config import ClientConfig, delivery, remote
from serve.client_services import Grade, ServiceCalls
from serve.listening import Active, HeardAsyncStream, HeardStream, Listener, heard_async, listen
from serve.recording import Message, Prediction, Speaker, ToolCall, Trajectory, request_messages, stamped
from serve.sender import Sender

log = logging.getLogger(__name__)

Begin = Callable[[tuple[Any, ...], dict[str, Any]], Prediction | None]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Client:
    """Records predictions, tool calls, trajectories and feedback of one agent process. Thread-safe.

    Raises:
        ConfigError: it is enabled and could not work. Nothing else raises because of Rayloop, but for a tool
            or grader that refuses the arguments it was given (`InputError`).
    """

    def __init__(self, config: ClientConfig | None = None, **changes: Any) -> None:
        config = replace(config or ClientConfig.from_environment(), **changes)
        self.config = config
        self.enabled = config.enabled
        self._sender: Sender | None = None
        self._unrecorded = 0
        self._active: ContextVar[Prediction | None] = ContextVar("rayloop_prediction", default=None)
        self._trajectory: ContextVar[Trajectory | None] = ContextVar("rayloop_trajectory", default=None)
        self._speaker: ContextVar[Speaker | None] = ContextVar("rayloop_speaker", default=None)
        self._last: ContextVar[str | None] = ContextVar("rayloop_interaction", default=None)
        if config.enabled:
            config.check()
            self._sender = Sender(delivery(config), config.limits, scrub=config.scrub)
            atexit.register(self.close)
        self._tools = ServiceCalls("tool server", remote(config, config.tools_url, "/tools"), config)
        self._grader = ServiceCalls("grader", remote(config, config.grader_url, "/grader"), config)

    # predictions

    def prediction(
        self,
        agent: str | None = None,
        *,
        request: Callable[..., Sequence[Message]] | None = None,
        response: Callable[[Any], Any] | None = None,
        **about: Any,
    ) -> Callable[[F], F]:
        """Decorator: each call of the function is one interaction.

        The request is the argument `messages`, else the first text; `request` gets the call's arguments and says
        otherwise. The answer is the result, or all pieces of a stream; `response` makes a text or message of it.
        `about`: further fields of the item (`tools`, `context`, `parameters`, `modality`, `metadata`).
        """

        def decorate(function: F) -> F:
            if not self.enabled:
                return function
            signature = inspect.signature(function)

            def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prediction | None:
                if request is not None:
                    return self._quietly(lambda: self._begin(agent, request(*args, **kwargs), response, about))
                bound = functools.partial(signature.bind, *args, **kwargs)
                return self._quietly(lambda: self._begin(agent, request_messages(bound().arguments), response, about))

            wrapped: F = self._watch(function, begin)
            return wrapped

        return decorate

    @contextmanager
    def predicting(
        self, agent: str | None = None, *, messages: Sequence[Message], **about: Any
    ) -> Iterator[Prediction]:
        """`with rayloop.predicting("triage", messages=…) as p: …; p.answer(text)`: one interaction."""
        prediction = self._quietly(lambda: self._begin(agent, messages, None, about))
        with self._ending(prediction):
            yield prediction or Prediction(_discard, {}, [])
        if prediction is not None:
            self._quietly(prediction.finish)

    @property
    def last_interaction_id(self) -> str | None:
        """Id of the latest prediction begun in this thread or task, for its feedback."""
        return self._last.get()

    def _begin(
        self,
        agent: str | None,
        messages: Sequence[Message],
        reply_of: Callable[[Any], Any] | None,
        about: dict[str, Any],
    ) -> Prediction | None:
        if self._sender is None:
            return None
        known = {"agent": agent} | self._named() | about
        prediction = Prediction(
            self._record, known, [dict(m) for m in messages], self._trajectory.get(), reply_of=reply_of
        )
        self._last.set(prediction.interaction_id)
        return prediction

    def _watch(self, function: Any, begin: Begin) -> Any:
        """The function with somebody listening; it stays a coroutine, generator or plain function."""

        def listener_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Listener:
            return self._listener(begin(args, kwargs))

        if inspect.isasyncgenfunction(function):
            return heard_async(function, listener_of)
        if inspect.isgeneratorfunction(function):

            def hear_stream(*args: Any, **kwargs: Any) -> Any:
                return (yield from listen(function(*args, **kwargs), listener_of(args, kwargs)))

            return functools.wraps(function)(hear_stream)
        if inspect.iscoroutinefunction(function):

            async def hear_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self._ending(begin(args, kwargs)) as prediction:
                    return self._heard(prediction, await function(*args, **kwargs))

            return functools.wraps(function)(hear_coroutine)

        def hear(*args: Any, **kwargs: Any) -> Any:
            with self._ending(begin(args, kwargs)) as prediction:
                return self._heard(prediction, function(*args, **kwargs))

        return functools.wraps(function)(hear)

    @contextmanager
    def _ending(self, prediction: Prediction | None) -> Iterator[Prediction | None]:
        """Tool calls inside belong to the prediction, and so does an exception that leaves."""
        if prediction is None:
            yield None
            return
        try:
            with Active(self._active, prediction):
                yield prediction
        except BaseException as error:
            self._quietly(prediction.finish, error)
            raise

    def _heard(self, prediction: Prediction | None, result: Any) -> Any:
        """The result itself, noted; a stream comes back with a listener before it."""
        if prediction is None:
            return result
        if inspect.isgenerator(result):
            return listen(result, self._listener(prediction))
        if not isinstance(result, str) and hasattr(result, "__anext__"):
            return HeardAsyncStream(result, self._listener(prediction))
        if not isinstance(result, str) and hasattr(result, "__next__"):
            return HeardStream(result, self._listener(prediction))
        self._quietly(prediction.answer, result)
        self._quietly(prediction.finish)
        return result

    def _listener(self, prediction: Prediction | None) -> Listener:
        return Listener(prediction, self._active, self._quietly)

    # tools

    def tool(self, function: F | None = None, *, name: str | None = None) -> Any:
        """Decorator, `@rayloop.tool` or `@rayloop.tool(name="search")`: each call is noted with its arguments, result,
        latency and error, in the prediction or trajectory it is made in, else as a trajectory of its own."""

        def decorate(function: F) -> F:
            if not self.enabled:
                return function
            wrapped: F = self._watch_tool(function, name or str(getattr(function, "__name__", "tool")))
            return wrapped

        return decorate if function is None else decorate(function)

    def _watch_tool(self, function: Any, name: str) -> Any:
        signature = inspect.signature(function)

        def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = self._quietly(functools.partial(signature.bind, *args, **kwargs))
            return {} if bound is None else {k: v for k, v in bound.arguments.items() if k not in ("self", "cls")}

        if inspect.iscoroutinefunction(function):

            async def call_later(*args: Any, **kwargs: Any) -> Any:
                with self.using_tool(name, arguments_of(args, kwargs)) as call:
                    call.result = await function(*args, **kwargs)
                return call.result

            return functools.wraps(function)(call_later)

        def call_now(*args: Any, **kwargs: Any) -> Any:
            with self.using_tool(name, arguments_of(args, kwargs)) as call:
                call.result = function(*args, **kwargs)
            return call.result

        return functools.wraps(function)(call_now)

    @contextmanager
    def using_tool(self, name: str, arguments: Any = None) -> Iterator[ToolCall]:
        """`with rayloop.using_tool("search", {"q": q}) as call: call.result = …`: one tool call."""
        call = ToolCall(name, arguments)
        began = time.perf_counter()
        try:
            yield call
        except BaseException as error:
            call.error = error
            raise
        finally:
            call.latency_s = time.perf_counter() - began
            if self.enabled:
                self._quietly(self._note, call)

    def _note(self, call: ToolCall) -> None:
        owner = self._active.get() or self._trajectory.get()
        if owner is not None:
            owner.add_call(call)
            return
        alone = Trajectory(self._record, self._named())
        alone.add_call(call)
        alone.finish()

    @contextmanager
    def trajectory(self, agent: str | None = None, **about: Any) -> Iterator[Trajectory]:
        """`with rayloop.trajectory("triage") as t: …; t.outcome = "solved"`: everything inside is one trajectory."""
        steps = Trajectory(self._record, {"agent": agent} | self._named() | about)
        try:
            with Active(self._trajectory, steps if self.enabled else None):
                yield steps
        except BaseException as error:
            steps.outcome = steps.outcome or f"error: {type(error).__name__}"
            raise
        finally:
            self._quietly(steps.finish)

    # people

    @contextmanager
    def speaking(self, *, user: str | None = None, session: str | None = None) -> Iterator[None]:
        """Whatever is recorded inside is on behalf of this user, in this session."""
        with Active(self._speaker, Speaker(user, session)):
            yield

    def feedback(self, interaction_id: str, type: str, **fields: Any) -> bool:
        """One signal about an answer: `type` and its fields as `POST /v1/feedback` takes them.

        `False` where it was dropped or the client is off.
        """
        item = {"interaction_id": interaction_id, "type": type} | self._named() | fields
        return bool(self._quietly(lambda: self._record("/v1/feedback", stamped(item))))

    def _named(self) -> dict[str, Any]:
        speaker = self._speaker.get() or Speaker()
        given = {"user": speaker.user, "session": speaker.session}
        return {name: value for name, value in given.items() if value is not None}

    # services

    def call_tool(self, name: str, arguments: Mapping[str, Any], local: Callable[..., Any] | None = None) -> Any:
        """The result of a tool on the tool server. Where that is off or does not answer in time, `local(**arguments)`
        or `None`: the agent's normal flow.

        Raises:
            InputError: the server refuses these arguments.
        """
        call_id = f"call_{uuid.uuid4().hex}"  # a retry under it writes nothing twice
        with self.using_tool(name, dict(arguments)) as call:
            found = self._tools.ask(
                f"/v1/tools/{quote(name, safe='')}", {"arguments": dict(arguments), "call_id": call_id}
            )
            if isinstance(found, dict) and "result" in found:
                call.result = found["result"]
            elif local is not None:
                call.result = local(**arguments)
        return call.result

    async def call_tool_async(
        self, name: str, arguments: Mapping[str, Any], local: Callable[..., Any] | None = None
    ) -> Any:
        """`call_tool` without blocking the event loop. `local` runs in a thread."""
        return await asyncio.to_thread(self.call_tool, name, arguments, local)

    def grade(self, grader: Mapping[str, Any], answer: str, item: Mapping[str, Any] | None = None) -> Grade | None:
        """What the grader says of an answer; `None` where it is off or does not answer in time.

        Raises:
            InputError: the grader's configuration is refused.
        """
        document = {"grader": dict(grader), "model_sample": answer, "item": dict(item or {})}
        found = self._grader.ask("/v1/graders/run", document)
        if not isinstance(found, dict) or "reward" not in found:
            return None
        metadata = found.get("metadata") or {}
        scores = found.get("sub_rewards") or {}
        return Grade(found["reward"], scores, metadata.get("reason") or "", metadata.get("grader_version"))

    async def grade_async(
        self, grader: Mapping[str, Any], answer: str, item: Mapping[str, Any] | None = None
    ) -> Grade | None:
        """`grade` without blocking the event loop."""
        return await asyncio.to_thread(self.grade, grader, answer, item)

    # the whole

    def stats(self) -> dict[str, Any]:
        """Numbers of items by what became of them, calls that got no answer, and what could not be recorded."""
        known = {} if self._sender is None else self._sender.stats()
        return {
            **known,
            "unrecorded": self._unrecorded,
            "unanswered_calls": self._tools.unanswered + self._grader.unanswered,
        }

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until everything recorded has been sent; `False` when that takes too long."""
        return self._sender is None or self._sender.flush(timeout_s)

    def close(self) -> None:
        """Send what can be sent at once and end; happens by itself when the process ends."""
        if self._sender is not None:
            self._sender.close()
            atexit.unregister(self.close)

    def _record(self, path: str, item: dict[str, Any]) -> bool:
        return self._sender is not None and self._sender.put(path, item)

    def _quietly(self, act: Callable[..., T], *arguments: Any) -> T | None:
        """What `act` returns, or `None`: the agent never pays for what cannot be recorded, it is counted."""
        try:
            return act(*arguments)
        except Exception as error:
            self._unrecorded += 1
            if self._unrecorded == 1:
                log.warning("a call could not be recorded (%r); further ones are only counted", error)
            return None


def _discard(_path: str, _item: dict[str, Any]) -> None:
    """Where an inactive prediction writes to."""
