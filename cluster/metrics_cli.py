"""`rayloop metrics`: the metrics of every process of this machine at one address."""

from typing import Annotated

import typer

from cluster.errors import ConfigError, UnavailableError
from cluster.metrics_files import MetricsServer, Written
from cluster.options import ConfigOption
from cluster.settings import load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command()
def metrics(
    host: Annotated[str, typer.Option(help="Address to listen on; nobody is asked for a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 9464,
    config: ConfigOption = None,
) -> None:
    """Serve the metrics of every process of this machine at one address, until it is ended."""
    settings, _ = load_settings(config)
    folder = settings.metrics.folder
    if folder is None:
        raise ConfigError("metrics.folder", None, "is not set", "name the folder that the applications write to")
    with _listening(host, port, Written(folder, settings.metrics.forget_after_s)) as server:
        print(f"metrics of {folder} at http://{host}:{server.server_address[1]}/metrics", flush=True)
        server.serve_forever()


def _listening(host: str, port: int, written: Written) -> MetricsServer:
    try:
        return MetricsServer(host, port, written)
    except OSError as error:
        cause = error.strerror or error
        raise UnavailableError(
            f"cannot listen on {host}:{port}: {cause}; choose another `--host` or `--port`"
        ) from None
