"""The process in which a `python` grader runs: no files, no sockets, no other processes, bounded memory.

Started as `python -I sandbox_child.py MEMORY_MB CPU_S`. The first line it reads is the source; after that
each line is one answer, and a line goes back. It closes the door behind itself before it reads anything: what
a grader may import is imported first, then resource limits and a seccomp filter (pyseccomp, libseccomp's own
binding) leave it the calls that computing needs. Every other system call fails with EPERM.
"""

import importlib
import json
import math
import os
import resource
import sys
from typing import Any

MODULES = (
    "ast", "bisect", "calendar", "cmath", "collections", "collections.abc", "copy", "dataclasses", "datetime",
    "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq", "html", "importlib.metadata",
    "itertools", "json", "keyword", "math", "numbers", "operator", "random", "re", "statistics", "string",
    "textwrap", "time", "traceback", "types", "typing", "unicodedata", "uuid", "zlib",
)  # fmt: skip
OPTIONAL = ("rapidfuzz", "rapidfuzz.distance", "rapidfuzz.fuzz", "rapidfuzz.process", "rapidfuzz.utils")
CALLS = (
    "read", "write", "brk", "mmap", "munmap", "mremap", "madvise", "mprotect", "futex", "exit", "exit_group",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "clock_gettime", "clock_nanosleep", "nanosleep",
    "gettimeofday", "time", "getrandom", "sched_yield", "getpid", "gettid", "restart_syscall", "rseq",
    "set_robust_list", "membarrier", "close",
)  # fmt: skip


def close_the_door(memory_mb: int, cpu_s: int) -> None:
    """Give up everything but computing. Cannot be undone.

    Raises:
        ImportError, OSError: this machine has no seccomp; nothing may run then.
    """
    import pyseccomp

    memory = memory_mb * 2**20
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        resource.setrlimit(what, (limit, limit))
    door = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
    for call in CALLS:
        executable = [pyseccomp.Arg(2, pyseccomp.MASKED_EQ, 4, 0)] if call in ("mmap", "mprotect") else []
        door.add_rule(pyseccomp.ALLOW, call, *executable)
    door.load()


def prepare() -> None:
    """Import what a grader may use, and whatever those import late."""
    for name in MODULES:
        importlib.import_module(name)
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    sys.modules["datetime"].datetime.strptime("2026", "%Y")
    "é".encode("idna"), "é".encode("utf-16"), "é".encode("latin-1")


def compile_grader(source: str) -> Any:
    """The function `grade` that the source defines."""
    space: dict[str, Any] = {"__name__": "grader", "__builtins__": __builtins__}
    exec(compile(source, "<grader>", "exec"), space)
    grade = space.get("grade")
    if not callable(grade):
        raise TypeError("the source defines no function grade(sample, item)")
    return grade


def answer(grade: Any, task: dict[str, Any]) -> dict[str, Any]:
    """The reward of one answer, or what went wrong."""
    try:
        value = grade(task["sample"], task["item"])
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return {"error": f"grade returned {value!r:.100}, which is no finite number"}
        return {"reward": float(value)}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    """Serve one grader until the other end closes."""
    source, target = os.fdopen(0, "rb", closefd=False), os.fdopen(os.dup(1), "wb")
    prepare()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    replies = _keep_low(target)
    close_the_door(int(sys.argv[1]), int(sys.argv[2]))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes", "pyseccomp")]:
        del sys.modules[name]
    _say(replies, {"ready": True})
    first = source.readline()
    if not first:
        return
    try:
        grade: Any = compile_grader(json.loads(first))
        _say(replies, {"ready": True})
    except BaseException as error:
        _say(replies, {"error": f"{type(error).__name__}: {error}"[:500]})
        return
    for line in source:
        _say(replies, answer(grade, json.loads(line)))


def _keep_low(target: Any) -> Any:
    """Keep the descriptor that replies go to, close every other one that was opened meanwhile."""
    os.closerange(target.fileno() + 1, 64)
    return target


def _say(target: Any, document: dict[str, Any]) -> None:
    target.write(json.dumps(document).encode() + b"\n")
    target.flush()


if __name__ == "__main__":
    main()
