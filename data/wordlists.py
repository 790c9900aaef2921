"""Word lists in `data/words`: lower-case words between blanks; lines that begin with `#` are comments."""

from pathlib import Path

FOLDER = Path(__file__).parent / "words"


def word_list(name: str) -> frozenset[str]:
    """The words of a list."""
    lines = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())
