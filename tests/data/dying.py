"""Functions whose worker is killed in the middle of a task, once."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def dying_once(function: Callable[..., Any], mark: Path) -> Callable[..., Any]:
    """The function, but that the first process to finish it is killed before it can say so, and leaves a mark."""

    def run(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return result
        os.kill(os.getpid(), signal.SIGKILL)

    return run
