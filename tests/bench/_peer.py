"""An environment of its own for a peer, made on first use under `RAYLOOP_BENCH_CACHE`."""

import os
import subprocess
import venv
from pathlib import Path


def peer_python(requirement: str) -> Path:
    """The Python of an environment that holds `requirement`, such as `duckdb==2.0.0`."""
    cache = Path(os.environ.get("RAYLOOP_BENCH_CACHE", Path.home() / ".cache" / "rayloop-bench"))
    folder = cache / requirement.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
        (folder / "ready").touch()
    return python
