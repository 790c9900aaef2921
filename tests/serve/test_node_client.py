"""The official Node client: `npm ci --prefix tests/interop/node` installs it, then this runs."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import Live

FOLDER = Path(__file__).parents[1] / "interop" / "node"
ANSWER = "It is a false alarm"


@pytest.mark.skipif(
    shutil.which("node") is None or not (FOLDER / "node_modules" / "openai").is_dir(),
    reason="needs Node and its client: npm ci --prefix tests/interop/node",
)
def test_node_client_chats_streams_and_reads_errors(live: Live) -> None:
    command = ["node", str(FOLDER / "client.mjs"), f"{live.url}/v1", live.secret]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "chat": ANSWER,
        "version": "triage/1",
        "requestId": True,
        "stream": ANSWER,
        "tokens": 8,
        "runner": ANSWER,
        "text": ANSWER,
        "models": ["triage", "triage/1", "triage/2"],
        "unknownModel": ["NotFoundError", 404, "model_not_found", "model"],
        "badRequest": ["BadRequestError", 400, "invalid_value", "messages"],
        "wrongKey": ["AuthenticationError", 401, "invalid_api_key", None],
        "afterLeaving": ANSWER,
    }
