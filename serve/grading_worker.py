"""A process that runs graders, one answer after another: a JSON line in, a JSON line out.

Graders run in a process of their own because a pattern that backtracks for minutes holds Python's
interpreter lock: no thread could notice a deadline then. The parent ends the process instead.
"""

import importlib
import json
import os
import resource
import sys
from collections import OrderedDict
from typing import Any, BinaryIO

import orjson

from data.grading.make import make_grader
from data.grading.types import Grader

MAX_GRADERS = 64  # graders kept ready, by configuration
UNUSED = ("sklearn", "scipy", "matplotlib", "pandas", "tkinter")
"""What NLTK imports if it can and no grader uses: without them it loads in a quarter of the time and memory."""


class Graders:
    """Graders by their configuration, least recently used go first."""

    def __init__(self) -> None:
        self._ready: OrderedDict[bytes, Grader] = OrderedDict()

    def get(self, config: Any) -> Grader:
        """The grader of a configuration that the parent has checked."""
        key = orjson.dumps(config, option=orjson.OPT_SORT_KEYS)
        grader = self._ready.get(key)
        if grader is None:
            grader = self._ready[key] = make_grader(config)
            if len(self._ready) > MAX_GRADERS:
                self._ready.popitem(last=False)
        self._ready.move_to_end(key)
        return grader


def answer(graders: Graders, task: dict[str, Any]) -> dict[str, Any]:
    """What one task comes to."""
    result = graders.get(task["grader"]).grade(task["item"], task["sample"])
    return {"reward": result.reward, "scores": result.score_card, "reason": result.reason, "error": result.error}


def serve_lines(source: BinaryIO, target: BinaryIO) -> None:
    """Answer line by line until the parent closes its end."""
    graders = Graders()
    for line in source:
        try:
            reply = answer(graders, orjson.loads(line))
        except Exception as error:  # a grader's own fault: the parent abstains and says so
            reply = {"failed": f"{type(error).__name__}: {error}"}
        target.write(orjson.dumps(reply) + b"\n")
        target.flush()


def preload() -> None:
    """Import what graders import at their first use: that would be the deadline's time."""
    sys.modules.update(dict.fromkeys(UNUSED))  # type: ignore[arg-type]  # `None` makes an import fail
    for name in ("rapidfuzz.distance", "sacrebleu", "rouge_score.rouge_scorer", "nltk.translate.meteor_score"):
        importlib.import_module(name)


def main() -> None:
    """Run as `python -m serve.grading_worker MEMORY_MB`."""
    limit = int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the replies
    preload()
    replies.write(json.dumps({"ready": True}).encode() + b"\n")
    replies.flush()
    serve_lines(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
