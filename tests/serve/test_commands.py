"""The commands `rayloop keys`, `rayloop route` and the failures of `rayloop up`, as processes."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import run_app
from serve import routes_cli
from tests.processes import rayloop

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "rayloop.yaml"
    models = {f"triage/{number}": "a model elsewhere" for number in (1, 2)}
    serve = {"applications": ["gateway"], "engines": {"local": {"models": models}}}
    file.write_text(yaml.safe_dump({"home": str(tmp_path / "home"), "serve": serve}))
    return file


def run(*arguments: str, config: Path) -> "subprocess.CompletedProcess[str]":
    return rayloop(*arguments, "--config", str(config))


def run_json(*arguments: str, config: Path) -> Any:
    done = run(*arguments, "--json", config=config)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_keys_are_created_listed_without_secret_and_revoked(config: Path) -> None:
    made = run_json("keys", "create", "ann", "--scopes", "chat,label", config=config)
    listed = run("keys", "list", "--json", config=config).stdout
    assert made["secret"] not in listed
    key = json.loads(listed)["keys"][0]
    assert (key["name"], key["scopes"], key["revoked_at"]) == ("ann", ["chat", "label"], None)
    run_json("keys", "revoke", key["key_id"], config=config)
    assert run_json("keys", "list", config=config)["keys"][0]["revoked_at"] is not None


def test_route_is_made_changed_and_pinned(config: Path) -> None:
    run_json("route", "set", "triage", "--stable", "triage/1", config=config)
    set_ = run_json("route", "set", "triage", "--candidate", "triage/2", "--share", "0.25", config=config)
    assert (set_["live_share"], set_["revision"], set_["updated_by"].split(":")[0]) == (0.25, 2, "person")
    assert run_json("route", "pin", "triage", config=config)["live_share"] == 0.0
    assert run_json("route", "unpin", "triage", config=config)["live_share"] == 0.25
    assert run_json("route", "set", "triage", "--candidate", "none", config=config)["candidate"] is None
    assert run_json("route", "show", config=config)["routes"][0]["revision"] == 5


def test_route_takes_a_version_that_is_not_ready_by_force_only(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def set_route(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            run_app(routes_cli.app, ["set", "triage", *arguments, "--config", str(config), "--json"], "rayloop route")
        said = capsys.readouterr()
        return said.out + said.err

    assert "`--force` writes the route all the same" in set_route("--stable", "triage/9")
    assert json.loads(set_route("--stable", "triage/9", "--force"))["stable"] == "triage/9"
    assert json.loads(set_route("--candidate", "triage/8"))["share"] == 0.0  # nobody gets it
    assert "triage/8 may not answer for triage (text, tenant default)" in set_route("--share", "0.1")


def one_line_failure(done: "subprocess.CompletedProcess[str]", text: str) -> None:
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr


def test_wrong_input_is_one_line(config: Path) -> None:
    one_line_failure(run("route", "pin", "nobody", config=config), "does not exist; known: none yet")
    one_line_failure(run("route", "set", "triage", "--share", "0.5", config=config), "stable=None must name a version")
    one_line_failure(run("keys", "create", "x", "--scopes", "root", config=config), "must be some of chat")
    run("route", "set", "triage", "--stable", "triage/1", config=config)
    one_line_failure(
        run("route", "set", "triage", "--stable", "triage/2", "--revision", "7", config=config),
        "has revision 1, not 7",
    )


def test_up_with_a_taken_port_is_one_line_and_leaves_nothing(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one_line_failure(run("up", "--port", str(port), config=config), f"serve.port={port} cannot be listened on")
    assert not (config.parent / "home").exists()


def test_up_with_an_unreachable_database_is_one_line(config: Path) -> None:
    config.write_text(config.read_text() + "database:\n  url: postgresql://nobody@127.0.0.1:9/x\n")
    one_line_failure(run("up", "--port", "0", config=config), "does not answer")


def test_up_with_broken_declared_routes_is_one_line(config: Path) -> None:
    config.write_text(config.read_text() + "  routes: [{agent: triage, share: 2}]\n")
    one_line_failure(run("up", "--port", "0", config=config), "user_config.routes.0.share=2")


def test_up_without_a_base_model_is_one_line(config: Path) -> None:
    config.write_text(config.read_text().replace("- gateway", "- gateway\n  - engine"))
    one_line_failure(run("up", "--port", "0", config=config), "engine.base_model=None must name the model")
    config.write_text(config.read_text() + "engine: {base_model: /nowhere}\n")
    one_line_failure(run("up", "--port", "0", config=config), "engine.base_model='/nowhere' is no model directory")


def test_down_with_nothing_running_says_so(config: Path) -> None:
    assert run_json("down", config=config) == {"ended": 0}


def test_application_module_loads_no_torch() -> None:
    code = "import sys, serve.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=60).returncode == 0
