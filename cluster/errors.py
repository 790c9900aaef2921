"""Every error Rayloop raises on purpose.

RayloopError
├── InputError (ValueError)        a value from outside breaks a rule: field, value, rule, remedy
│   ├── ConfigError                the same, in rayloop.yaml, the environment or a Serve config
│   └── ErasedError                it belongs to somebody who was erased
├── NotFoundError (LookupError)    a named thing does not exist
├── ConflictError                  somebody else changed it first, or the state forbids the act
├── UnavailableError (ConnectionError)  a database, server or cluster does not answer
├── OverloadedError                more work waits than may; over HTTP 429 with `Retry-After`
├── DatasetError (ValueError)      a dataset cannot be used: empty, one-sided, wrong schema
└── HealthGateError                a training was stopped by a health gate, with the reason

All are picklable, so they survive a trip through a Ray worker. The command line prints the message
on one line and exits with `exit_code`.
"""

from typing import Any


class RayloopError(Exception):
    """Base of all deliberate errors."""

    exit_code = 1


class InputError(RayloopError, ValueError):
    """A value from outside breaks a rule.

    `str()` reads ``field=value rule; remedy``, for example
    ``train.beta=-0.1 must be > 0; set `beta` in rayloop.yaml``.
    """

    exit_code = 2

    def __init__(self, field: str, value: Any, rule: str, remedy: str) -> None:
        super().__init__(field, value, rule, remedy)
        self.field, self.value, self.rule, self.remedy = field, value, rule, remedy

    def __str__(self) -> str:
        try:
            shown = repr(self.value)
        except RecursionError:
            shown = f"a deeply nested {type(self.value).__name__}"
        if len(shown) > 120:
            shown = shown[:117] + "..."
        return f"{self.field}={shown} {self.rule}; {self.remedy}"


class ConfigError(InputError):
    """A configuration value breaks a rule."""


class ErasedError(InputError):
    """An item belongs to somebody who was erased; it is refused for ever."""

    def __init__(self, event_id: str) -> None:
        InputError.__init__(self, "user", event_id, "belongs to a person who was erased", "send nothing more of them")

    def __reduce__(self) -> tuple[type["ErasedError"], tuple[str]]:
        return ErasedError, (self.value,)


class NotFoundError(RayloopError, LookupError):
    """A named thing does not exist."""

    exit_code = 2

    def __str__(self) -> str:  # LookupError would not quote, KeyError would: keep it plain
        return " ".join(str(a) for a in self.args)


class ConflictError(RayloopError):
    """Somebody else changed it first, or its state forbids the act."""


class UnavailableError(RayloopError, ConnectionError):
    """A database, server or cluster does not answer."""


class OverloadedError(RayloopError):
    """More work waits than may; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class DatasetError(RayloopError, ValueError):
    """A dataset cannot be used: empty, one-sided, or of another schema."""

    exit_code = 2


class HealthGateError(RayloopError):
    """A training was stopped by a health gate; the message says which and why."""
