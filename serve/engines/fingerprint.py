"""`system_fingerprint` of the embedded engine: it changes when the same request and seed may be answered otherwise."""

import hashlib
import json

import torch
import transformers

from serve.engines.base_model import BaseIdentity

HEX_DIGITS = 8


def fingerprint(base: BaseIdentity, dtype: str, device: str) -> str:
    """Of the base model, the libraries that run it, and the arithmetic they do it in."""
    of = [base.revision, torch.__version__, transformers.__version__, dtype, device]
    return f"rayloop-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:HEX_DIGITS]}"
