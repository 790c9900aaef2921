"""An API server that knows one RayService, over HTTP: it checks patches against KubeRay's schema and its versions.

It speaks as much of the Kubernetes API as the driver uses: GET, merge PATCH with `resourceVersion`, strict field
validation, `Status` objects for refusals. Trouble is scripted: conflicts, lost connections, refusals.
"""

import copy
import json
import socket
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import jsonschema
import yaml

from tests.k8s.schemas import closed

PATH = "/apis/ray.io/v1/namespaces/prod/rayservices/rayloop"
TOKEN = "account-token"
MANIFEST = Path(__file__).parents[3] / "k8s" / "base" / "rayservice.yaml"
Trouble = Literal["drop-before", "drop-after", "conflict", "busy", "error"]
ReadTrouble = Literal["drop", "cut", "busy", "error", "hang"]


def rayservice_validator(shared_data: Path) -> jsonschema.Draft202012Validator:
    """The CRD's schema with unknown fields refused. Checking takes long for the pod templates alone."""
    crd = yaml.load((shared_data / "kuberay-crds" / "ray.io_rayservices.yaml").read_text(), yaml.CSafeLoader)
    schema = closed(next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


class ApiServer:
    """The state; `with` runs it on a loopback port."""

    def __init__(self, validator: jsonschema.Draft202012Validator) -> None:
        self.validator = validator
        self.resource: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
        self.resource["metadata"] |= {"resourceVersion": "1", "generation": 1, "namespace": "prod"}
        self.troubles: deque[Trouble] = deque()
        """What happens to the next PATCH requests, in turn."""
        self.read_troubles: deque[ReadTrouble] = deque()
        """The same for GET requests."""
        self.released = threading.Event()
        """Ends the hanging ones."""
        self.on_patch: Callable[[], None] | None = None
        """Somebody else who acts between the driver's reading and its patch."""
        self.requests: list[tuple[str, int]] = []
        """Method and status of each answer; 0 for a dropped connection."""
        self.lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return [a["name"] for a in yaml.safe_load(self.resource["spec"]["serveConfigV2"])["applications"]]

    @property
    def patches(self) -> int:
        return sum(1 for method, status in self.requests if (method, status) == ("PATCH", 200))

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Somebody else writes."""
        change(self.resource["spec"])
        self._new_version()

    def say(self, states: dict[str, tuple[str, str]]) -> None:
        """What KubeRay reports of the applications."""
        said = {name: {"status": state, "message": message} for name, (state, message) in states.items()}
        self.resource["status"] = {
            "activeServiceStatus": {"applicationStatuses": said},
            "observedGeneration": self.resource["metadata"]["generation"],
        }

    def patch(self, query: dict[str, list[str]], document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            if query.get("fieldValidation") != ["Strict"] or "fieldManager" not in query:
                return status(400, "BadRequest", "a patch names its manager and asks for strict validation")
            wanted = document.get("metadata", {}).get("resourceVersion")
            if wanted is not None and wanted != self.resource["metadata"]["resourceVersion"]:
                return status(409, "Conflict", "the object has been modified; apply your changes to the latest version")
            merged = merge(self.resource, document)
            if (broken := jsonschema.exceptions.best_match(self.validator.iter_errors(merged))) is not None:
                return status(422, "Invalid", broken.message)
            unchanged = merged == self.resource
            self.resource = merged
            if not unchanged:
                self._new_version()
            return 200, copy.deepcopy(self.resource)

    def _new_version(self) -> None:
        metadata = self.resource["metadata"]
        metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)
        metadata["generation"] += 1

    def __enter__(self) -> str:
        handler = type("Handler", (_Handler,), {"state": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def status(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    return code, {
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code,
    }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    state: ApiServer

    def do_GET(self) -> None:
        trouble = self.state.read_troubles.popleft() if self.state.read_troubles else None
        if trouble in ("busy", "error"):
            return self._send("GET", *status(429 if trouble == "busy" else 500, "TooManyRequests", "try again"))
        if trouble is not None:
            return self._fail_reading(trouble)
        self._answer("GET", lambda query: (200, copy.deepcopy(self.state.resource)))

    def do_PATCH(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers["content-type"] != "application/merge-patch+json":
            return self._send("PATCH", *status(415, "UnsupportedMediaType", self.headers["content-type"]))
        act, self.state.on_patch = self.state.on_patch, None
        if act is not None:
            act()
        trouble = self.state.troubles.popleft() if self.state.troubles else None
        if trouble == "drop-before":
            return self._drop()
        if trouble == "conflict":
            return self._send("PATCH", *status(409, "Conflict", "the object has been modified"))
        if trouble in ("busy", "error"):
            code = 429 if trouble == "busy" else 500
            return self._send("PATCH", *status(code, "TooManyRequests", "try again"))
        made: dict[str, Any] = json.loads(body)
        if trouble == "drop-after":
            self.state.patch(parse_qs(urlsplit(self.path).query), made)
            return self._drop()
        return self._answer("PATCH", lambda query: self.state.patch(query, made))

    def _fail_reading(self, trouble: ReadTrouble) -> None:
        """Nothing, half an answer, or none until the client has given up."""
        self.state.requests.append(("GET", 0))
        if trouble == "hang":
            self.state.released.wait()
        if trouble == "cut":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"spec":')
            self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, method: str, act: Callable[[dict[str, list[str]]], tuple[int, dict[str, Any]]]) -> None:
        url = urlsplit(self.path)
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._send(method, *status(401, "Unauthorized", "Unauthorized"))
        if url.path != PATH:
            return self._send(method, *status(404, "NotFound", f"{url.path} not found"))
        return self._send(method, *act(parse_qs(url.query)))

    def _send(self, method: str, code: int, document: dict[str, Any]) -> None:
        self.state.requests.append((method, code))
        raw = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _drop(self) -> None:
        self.state.requests.append(("PATCH", 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Silence."""
