import json
import resource
import subprocess
import sys

import pytest

from cluster.cli import COMMANDS


def rayloop(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cluster", *arguments], capture_output=True, text=True)


def loaded_modules(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_help_lists_every_command() -> None:
    shown = rayloop("--help").stdout
    assert all(name in shown for name in COMMANDS)


def test_help_costs_less_than_half_a_second_of_processor_time() -> None:
    def cost() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        rayloop("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cost() for _ in range(3)) < 0.5


def test_misspelt_command_is_refused_with_the_likely_name() -> None:
    run = rayloop("confg")
    assert run.returncode == 2
    assert "Did you mean 'config'" in run.stderr


def test_deliberate_error_is_one_line_and_exit_code_two() -> None:
    run = rayloop("config", "--config", "/does/not/exist.yaml")
    assert run.returncode == 2
    assert run.stderr == "error: config='/does/not/exist.yaml' does not exist; name an existing file\n"


def test_config_prints_value_and_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLOOP_DATABASE__URL", "postgresql://user:hunter2@db/rayloop")
    shown = rayloop("config", "--json").stdout
    assert json.loads(shown)["database.url"] == {
        "value": "postgresql://user:***@db/rayloop",
        "origin": "RAYLOOP_DATABASE__URL",
    }


@pytest.mark.parametrize("statement", ["import data", "import data.log", "import cluster.cli"])
def test_light_imports_load_no_torch_and_no_ray(statement: str) -> None:
    assert not {"torch", "ray", "mlflow", "transformers"} & loaded_modules(statement)


def test_json_output_holds_nothing_but_the_object() -> None:
    code = (
        "import typer; from cluster.cli import run_app; app = typer.Typer()\n"
        "@app.command()\n"
        "def go(as_json: bool = typer.Option(False, '--json')) -> None:\n"
        "    print('(raylet) chatter'); print('{\"a\": 1}'); print('{not json'); print('more chatter', flush=True)\n"
        "run_app(app, ['--json'], 'go')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == '{"a": 1}\n'
    assert run.stderr.splitlines() == ["(raylet) chatter", "{not json", "more chatter"]


def test_sigterm_unwinds_what_a_command_has_open() -> None:
    code = (
        "import os, signal, typer; from cluster.cli import run_app; app = typer.Typer()\n"
        "@app.command()\n"
        "def go() -> None:\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); signal.pause()\n"
        "    finally:\n"
        "        print('recorded', flush=True)\n"
        "run_app(app, [], 'go')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (143, "recorded\n", "")
