"""`rayloop up` and `rayloop down`: the live side on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from cluster.database import connect
from cluster.errors import ConflictError, InputError, UnavailableError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import Settings, load_settings
from serve.config import write_files, write_private
from serve.keys import EVERYDAY, KeyRing, create_key
from serve.ports import free_ports, require_free

app = typer.Typer(no_args_is_help=True, add_completion=False)


RUN_RECORD = "run/up.json"
KEY_FILE = "run/api_key"
LOG_FILE = "run/up.log"
END_S = 40.0
WAIT_S = 0.1


@app.command()
def up(
    config: ConfigOption = None,
    json_output: JsonOption = False,
    port: Annotated[int | None, typer.Option(help="Port of the API; 0 takes a free one.")] = None,
    foreground: Annotated[bool, typer.Option("--foreground/--detach", help="Stay until Ctrl-C.")] = False,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Start MLflow's web page too.")] = False,
) -> None:
    """Start the live side: router, engine, grader, tools and control, on a Ray cluster of its own."""
    overrides: dict[str, Any] = {} if port is None else {"serve": {"port": port}}
    settings, _ = load_settings(config, **overrides)
    configure_logging(settings.logging)
    _refuse_second(settings)
    _require_base_model(settings)
    settings = _with_port(settings)
    secret = everyday_key(settings)
    write_files(settings)
    process = _launch(settings, mlflow)
    record = _wait_until_ready(settings, process)
    result = {
        "urls": record["urls"], "ray_address": record["ray_address"], "pid": process.pid,
        "api_key_file": str(settings.home / KEY_FILE), "serve_config": str(settings.home / "serve.yaml"),
    }  # fmt: skip
    print(json.dumps(result) if json_output else _described(result, secret), flush=True)
    if foreground:
        _stay(process)


@app.command()
def down(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Stop what `up` started, and nothing else."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    record = _read_record(settings)
    ended = _end(record) if record else 0
    (settings.home / RUN_RECORD).unlink(missing_ok=True)
    if json_output:
        print(json.dumps({"ended": ended}))
    else:
        print(f"ended {ended} processes" if ended else "nothing was running; start it with `rayloop up`")


def everyday_key(settings: Settings) -> str:
    """The key in `<home>/run/api_key`, made at first use or when the database does not know it."""
    path = settings.home / KEY_FILE
    engine = connect(settings)
    try:
        if path.exists():
            secret = path.read_text(encoding="utf-8").strip()
            if KeyRing.read(engine).find(secret) is not None:
                return secret
        secret = create_key(engine, "local", settings.tenant, settings.workspace, EVERYDAY)
    finally:
        engine.dispose()
    write_private(path, secret + "\n")
    return secret


def _require_base_model(settings: Settings) -> None:
    """Say at once what the engine would say after half a minute."""
    base = settings.engine.base_model
    if "engine" not in settings.serve.applications:
        return
    if base is None:
        remedy = "set it in rayloop.yaml; `rayloop demo` trains a small one"
        raise InputError("engine.base_model", base, "must name the model to serve", remedy)
    if base.startswith(("/", ".", "~")) and not (Path(base).expanduser() / "config.json").is_file():
        raise InputError("engine.base_model", base, "is no model directory", "name one that holds config.json")


def _with_port(settings: Settings) -> Settings:
    serve = settings.serve
    if serve.port == 0:
        serve = serve.model_copy(update={"port": free_ports(1)[0]})
        return settings.model_copy(update={"serve": serve})
    require_free(serve.host, serve.port, "serve.port")
    return settings


def _refuse_second(settings: Settings) -> None:
    record = _read_record(settings)
    if record and _process(record, record["pids"]["supervisor"]) is not None:
        url = record["urls"].get("api", "an address it has not chosen yet")
        raise ConflictError(f"the live side of {settings.home} is up already at {url}; `rayloop down` ends it")
    if record:
        _end(record)  # what a killed supervisor left behind
        (settings.home / RUN_RECORD).unlink(missing_ok=True)


def _launch(settings: Settings, mlflow: bool) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable,
        "-m",
        "serve.supervisor",
        str(settings.home),
        *(["--mlflow"] if mlflow else []),
    ]
    project = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([project, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    with (settings.home / LOG_FILE).open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )


def _wait_until_ready(settings: Settings, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    deadline = time.monotonic() + 2 * settings.serve.start_timeout_s + END_S  # Ray, then the applications
    try:
        while True:
            record = _read_record(settings)
            if record and record["pids"]["supervisor"] == process.pid:
                if record["ready"]:
                    return record
                if record["failure"]:
                    raise UnavailableError(
                        f"the live side did not start: {record['failure']}; see {settings.home / LOG_FILE}"
                    )
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"the live side did not start; see {settings.home / LOG_FILE}")
            time.sleep(WAIT_S)
    except BaseException:
        process.terminate()
        process.wait(END_S)
        (settings.home / RUN_RECORD).unlink(missing_ok=True)
        raise


def _stay(process: "subprocess.Popen[bytes]") -> None:
    """Until the supervisor ends, passing our own end on to it."""
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()


def _read_record(settings: Settings) -> dict[str, Any] | None:
    try:
        return json.loads((settings.home / RUN_RECORD).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _process(record: dict[str, Any], pid: int) -> psutil.Process | None:
    """The recorded process, unless it ended and its number went to another."""
    try:
        process = psutil.Process(pid)
        begun = record["started"].get(str(pid))
        return process if begun is None or abs(process.create_time() - begun) < 1 else None
    except psutil.NoSuchProcess:
        return None


def _end(record: dict[str, Any]) -> int:
    """End the supervisor, which ends the rest; what it leaves, or left when it was killed, is ended here."""
    from serve.supervisor import end_processes, sockets_folder

    numbers = [record["pids"]["supervisor"], *map(int, record["started"])]
    found = [p for pid in numbers if (p := _process(record, pid)) is not None]
    supervisor = [p for p in found if p.pid == record["pids"]["supervisor"]]
    end_processes(supervisor, END_S)
    left = [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    end_processes(left, WAIT_S * 50)
    shutil.rmtree(sockets_folder(record["pids"]["supervisor"]), ignore_errors=True)
    return len(found)


def _described(result: dict[str, Any], secret: str) -> str:
    lines = [f"{name:<10} {url}" for name, url in result["urls"].items()]
    lines += [
        f"{'key':<10} {secret}  (also in {result['api_key_file']})",
        f"{'config':<10} {result['serve_config']}",
        "",
        f"next: curl {result['urls']['api']}/models -H 'authorization: Bearer {secret}'",
    ]
    if "dashboard" in result["urls"]:
        lines.append(f"      serve deploy -a {result['urls']['dashboard']} {result['serve_config']}")
    return "\n".join(lines)
