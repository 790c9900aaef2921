"""Runs llama.cpp's converter; `python -m train.export.convert SCRIPT ARGUMENTS…`.

The converter recognises a byte-level tokenizer by a hash of what it makes of a sample text, which depends
on the vocabulary; tokenizers of somebody's own are in no list. Where the rule that splits the text is
plainly GPT-2's, as `tokenizer.json` says, the file may say so too.
"""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Recognise = Callable[[Any, Any], str]


def main() -> None:
    """Add the converter's folders to the path, teach it the plain rule, and run it."""
    script, *arguments = sys.argv[1:]
    folder = Path(script).parent
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = or_plain(TextModel.get_vocab_base_pre)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def or_plain(recognise: Recognise) -> Recognise:
    """The converter's own answer, else `gpt-2` for a tokenizer that splits text as GPT-2's does."""

    def pre_tokenizer(model: Any, tokenizer: Any) -> str:
        try:
            return recognise(model, tokenizer)
        except NotImplementedError:
            if splits_as_gpt2(tokenizer):
                return "gpt-2"
            raise

    return pre_tokenizer


def splits_as_gpt2(tokenizer: Any) -> bool:
    """True for byte-level BPE with the byte-level step's own pattern and nothing before it."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = document["pre_tokenizer"] or {}
    plain = rule.get("type") == "ByteLevel" and rule.get("use_regex") and not rule.get("add_prefix_space")
    return bool(plain and document["normalizer"] is None)


if __name__ == "__main__":
    main()
