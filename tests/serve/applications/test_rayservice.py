"""The RayService driver against an API server over HTTP that checks every patch against KubeRay's schema."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.errors import ConfigError, ConflictError, UnavailableError
from cluster.settings.experiments import ApplicationSettings
from serve.applications.document import Application, application_name
from serve.applications.rayservice import RayServiceDriver, access
from tests.serve.applications.api_server import TOKEN, ApiServer, ReadTrouble, Trouble, rayservice_validator

LLAMA = Application(application_name("meta/llama", "abc"), "meta/llama")
QWEN = Application(application_name("/models/qwen", None), "/models/qwen")
BASE = ["gateway", "engine", "grader", "tools", "control"]


@pytest.fixture(scope="module")
def validator(shared_data: Path) -> Draft202012Validator:
    return rayservice_validator(shared_data)


@pytest.fixture
def server(validator: Draft202012Validator) -> ApiServer:
    return ApiServer(validator)


@pytest.fixture
def settings(server: ApiServer, tmp_path: Path) -> Iterator[ApplicationSettings]:
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "namespace").write_text("prod")
    with server as url:
        yield ApplicationSettings(driver="rayservice", api_url=url, account_dir=tmp_path, timeout_s=5)


@pytest.fixture
def driver(settings: ApplicationSettings) -> RayServiceDriver:
    return RayServiceDriver(access(settings), settings)


def test_an_application_is_added_once_and_taken_down_and_the_others_stay(
    server: ApiServer, driver: RayServiceDriver
) -> None:
    before = yaml.safe_load(server.resource["spec"]["serveConfigV2"])
    cluster = server.resource["spec"]["rayClusterConfig"]
    assert driver.apply([LLAMA]) == {}
    driver.apply([LLAMA])
    assert (server.names, server.patches) == ([*BASE, LLAMA.name], 1)
    after = yaml.safe_load(server.resource["spec"]["serveConfigV2"])
    assert after["applications"][:-1] == before["applications"]
    assert after["applications"][-1] == {
        "name": LLAMA.name,
        "route_prefix": f"/{LLAMA.name}",
        "import_path": "serve.app:engine",
        "args": {"engine": LLAMA.name, "base_model": "meta/llama"},
    }
    driver.apply([LLAMA, QWEN])
    driver.apply([QWEN])
    assert server.names == [*BASE, QWEN.name]
    driver.apply([])
    assert yaml.safe_load(server.resource["spec"]["serveConfigV2"]) == before
    assert server.resource["spec"]["rayClusterConfig"] == cluster


def test_the_status_is_what_kuberay_reports(server: ApiServer, driver: RayServiceDriver) -> None:
    driver.apply([LLAMA, QWEN])
    server.say({"gateway": ("RUNNING", ""), LLAMA.name: ("RUNNING", ""), QWEN.name: ("DEPLOY_FAILED", "no such model")})
    assert driver.apply([LLAMA, QWEN]) == {LLAMA.name: ("ready", "RUNNING"), QWEN.name: ("failed", "no such model")}
    server.edit(lambda spec: spec.update(rayClusterDeletionDelaySeconds=90))
    assert driver.apply([LLAMA, QWEN]) == {}  # KubeRay has not seen that yet: what it says is of before
    server.say({LLAMA.name: ("DEPLOYING", "")})
    assert driver.apply([LLAMA, QWEN]) == {LLAMA.name: ("loading", "DEPLOYING")}


def test_somebody_elses_write_in_between_is_a_conflict_and_both_stand(
    server: ApiServer, driver: RayServiceDriver
) -> None:
    """A person scales a worker group between the driver's reading and its patch."""

    def scale() -> None:
        server.edit(lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].update(replicas=5))

    server.on_patch = scale
    driver.apply([LLAMA])
    assert [request for request in server.requests if request[0] == "PATCH"] == [("PATCH", 409), ("PATCH", 200)]
    assert server.names == [*BASE, LLAMA.name]
    assert server.resource["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] == 5


def test_a_conflicting_edit_of_the_serve_config_is_kept(server: ApiServer, driver: RayServiceDriver) -> None:
    def edit(spec: dict[str, Any]) -> None:
        document = yaml.safe_load(spec["serveConfigV2"])
        document["applications"][0]["deployments"] = [{"name": "Router", "num_replicas": 3}]
        spec["serveConfigV2"] = yaml.safe_dump(document)

    server.on_patch = lambda: server.edit(edit)
    driver.apply([LLAMA])
    document = yaml.safe_load(server.resource["spec"]["serveConfigV2"])
    assert document["applications"][0]["deployments"] == [{"name": "Router", "num_replicas": 3}]
    assert server.names == [*BASE, LLAMA.name]


@pytest.mark.parametrize(
    ("troubles", "patches"),
    [
        (["drop-before"], 1),
        (["drop-after"], 0),  # it was done: the second reading shows it, and nothing is sent again
        (["conflict", "conflict", "busy", "error"], 1),
    ],
)
def test_lost_connections_and_busy_servers_are_tried_again(
    server: ApiServer, driver: RayServiceDriver, troubles: list[Trouble], patches: int
) -> None:
    server.troubles.extend(troubles)
    driver.apply([LLAMA])
    assert (server.names, server.patches) == ([*BASE, LLAMA.name], patches)
    assert int(server.resource["metadata"]["resourceVersion"]) == 2


@pytest.mark.parametrize("troubles", [["drop"], ["cut"], ["drop", "busy", "cut", "error"]])
def test_a_resource_that_cannot_be_read_is_read_again(
    server: ApiServer, driver: RayServiceDriver, troubles: list[ReadTrouble]
) -> None:
    server.read_troubles.extend(troubles)
    driver.apply([LLAMA])
    assert (server.names, server.patches) == ([*BASE, LLAMA.name], 1)
    assert [status for method, status in server.requests if method == "GET"][-1] == 200


def test_an_api_server_that_never_answers_is_given_up_and_nothing_is_written(
    server: ApiServer, settings: ApplicationSettings
) -> None:
    hasty = settings.model_copy(update={"timeout_s": 0.2, "attempts": 2})
    server.read_troubles.extend(["hang"] * 2)
    with pytest.raises(UnavailableError, match="timed out"):
        RayServiceDriver(access(hasty), hasty).apply([LLAMA])
    assert (server.names, server.patches) == (BASE, 0)


def test_a_conflict_that_never_ends_is_given_up_and_the_next_call_goes_on(
    server: ApiServer, driver: RayServiceDriver, settings: ApplicationSettings
) -> None:
    server.troubles.extend(["conflict"] * settings.attempts)
    with pytest.raises(ConflictError, match="HTTP 409"):
        driver.apply([LLAMA])
    assert server.names == BASE
    driver.apply([LLAMA])
    assert server.names == [*BASE, LLAMA.name]


def test_nothing_is_written_while_kuberay_upgrades_the_cluster(server: ApiServer, driver: RayServiceDriver) -> None:
    condition = {"type": "UpgradeInProgress", "status": "True", "reason": "Upgrading", "message": ""}
    condition["lastTransitionTime"] = "2026-11-20T00:00:00Z"
    server.resource["status"] = {"conditions": [condition]}
    with pytest.raises(UnavailableError, match="UpgradeInProgress"):
        driver.apply([LLAMA])
    assert server.requests == [("GET", 200)]
    condition["status"] = "False"
    driver.apply([LLAMA])
    assert server.names == [*BASE, LLAMA.name]


def test_a_refusal_is_final_and_says_why(server: ApiServer, driver: RayServiceDriver, tmp_path: Path) -> None:
    server.resource["spec"]["serveConfigV3"] = "a field that KubeRay does not know"
    with pytest.raises(ConflictError, match=r"HTTP 422.*serveConfigV3"):
        driver.apply([LLAMA])
    (tmp_path / "token").write_text("expired")
    with pytest.raises(ConflictError, match="HTTP 401"):
        driver.apply([LLAMA])
    assert server.patches == 0 and len(server.requests) == 3


def test_a_renewed_token_is_read(server: ApiServer, driver: RayServiceDriver, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("expired")
    with pytest.raises(ConflictError):
        driver.apply([LLAMA])
    (tmp_path / "token").write_text(TOKEN)
    driver.apply([LLAMA])
    (tmp_path / "token").unlink()
    with pytest.raises(ConfigError, match="mount the service account's token"):
        driver.apply([])


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ("applications: [", ConfigError, "is no YAML"),
        ("- gateway", ConfigError, "must be a mapping"),
        ("applications: [{name: gateway, import_path: a.b}]", ConfigError, "'engine' is not deployed"),
        (
            "applications: [{name: engine, import_path: 'a:b', deployments: [{name: E, num_replicas: -1}]}]",
            ConfigError,
            "num_replicas",
        ),
    ],
)
def test_a_deployed_config_that_cannot_be_extended_is_left_alone(
    server: ApiServer, driver: RayServiceDriver, config: str, error: type[Exception], said: str
) -> None:
    server.resource["spec"]["serveConfigV2"] = config
    with pytest.raises(error, match=said):
        driver.apply([LLAMA])
    assert server.patches == 0


def test_an_unreachable_api_server_is_unavailable(settings: ApplicationSettings) -> None:
    nowhere = settings.model_copy(update={"api_url": "http://127.0.0.1:9", "attempts": 2})
    with pytest.raises(UnavailableError, match="refused"):
        RayServiceDriver(access(nowhere), nowhere).apply([LLAMA])


def test_outside_a_cluster_the_api_server_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="is needed outside a cluster"):
        access(ApplicationSettings(driver="rayservice"))
    monkeypatch.setitem(os.environ, "KUBERNETES_SERVICE_HOST", "10.0.0.1")
    found = access(ApplicationSettings(driver="rayservice", account_dir=tmp_path))
    assert found.api.url == "https://10.0.0.1:443" and found.path.endswith("/namespaces/default/rayservices/rayloop")
