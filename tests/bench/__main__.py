"""`python -m tests.bench [NAME …]`: run the named benchmarks, or all of them, one after the other."""

import pkgutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> int:
    """Run them; the exit code is 1 if any failed, 2 for an unknown name."""
    known = sorted(m.name for m in pkgutil.iter_modules([str(FOLDER)]) if not m.name.startswith("_"))
    wanted = sys.argv[1:] or known
    if unknown := [name for name in wanted if name not in known]:
        print(f"error: no benchmark {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    failed = [name for name in wanted if subprocess.run([sys.executable, "-m", f"tests.bench.{name}"]).returncode]
    return 1 if failed else 0


sys.exit(main())
