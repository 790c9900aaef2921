"""Every manifest against its schema: KubeRay's CRDs with unknown fields refused, and Ray Serve's own."""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from cluster import metrics
from cluster.runtime import system_config
from cluster.settings import load_settings
from data.outlets.notices import ALERTS
from serve.ingress import ingress_environment, write_haproxy_script
from tests.k8s.schemas import closed
from tests.processes import rayloop

K8S = Path(__file__).parents[2] / "k8s"
CRDS = {
    "RayService": "ray.io_rayservices.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
    "RayCluster": "ray.io_rayclusters.yaml",
}


def documents() -> list[tuple[str, dict[str, Any]]]:
    files = [f for f in sorted((K8S / "base").glob("*.yaml")) if f.name != "kustomization.yaml"]
    return [(f"{f.name}#{n}", d) for f in files for n, d in enumerate(yaml.safe_load_all(f.read_text())) if d]


def of_kind(*kinds: str) -> list[Any]:
    return [pytest.param(d, id=name) for name, d in documents() if d["kind"] in kinds]


@pytest.fixture(scope="session")
def validators(shared_data: Path) -> dict[str, Draft202012Validator]:
    """Kind -> what its manifests are held to; to check a CRD takes longer than to check against it."""
    found = {}
    for kind, file in CRDS.items():
        crd = yaml.load((shared_data / "kuberay-crds" / file).read_text(), yaml.CSafeLoader)
        version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        Draft202012Validator.check_schema(schema)
        found[kind] = Draft202012Validator(schema)
    return found


@pytest.mark.parametrize("manifest", of_kind(*CRDS))
def test_ray_manifest_meets_its_crd_with_unknown_fields_refused(
    manifest: dict[str, Any], validators: dict[str, Draft202012Validator]
) -> None:
    assert manifest["apiVersion"] == "ray.io/v1"
    validators[manifest["kind"]].validate(manifest)


@pytest.mark.parametrize("manifest", of_kind(*CRDS))
def test_a_misspelt_field_is_noticed(manifest: dict[str, Any], validators: dict[str, Draft202012Validator]) -> None:
    broken = copy.deepcopy(manifest)
    broken["spec"]["rayVersionn"] = "2.60.0"
    with pytest.raises(ValidationError, match="rayVersionn"):
        validators[manifest["kind"]].validate(broken)


@pytest.mark.parametrize("manifest", of_kind("RayJob"))
def test_rayjob_keeps_the_rules_the_schema_cannot_say(manifest: dict[str, Any]) -> None:
    spec = manifest["spec"]
    strategy = spec.get("deletionStrategy")
    if strategy:  # the CRD's validation rules on deletionStrategy
        legacy = {"onSuccess", "onFailure"} & set(strategy)
        assert not (legacy and "deletionRules" in strategy)
        assert len(legacy) == 2 or "deletionRules" in strategy
        assert not (strategy.get("deletionRules") and spec.get("shutdownAfterJobFinishes"))
    assert spec["entrypoint"].startswith("python -m cluster ")


CRONJOB = {
    "schedule", "timeZone", "concurrencyPolicy", "startingDeadlineSeconds", "successfulJobsHistoryLimit",
    "failedJobsHistoryLimit", "suspend", "jobTemplate",
}  # fmt: skip
"""Fields of a `CronJobSpec`. Source: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/cron-job-v1/"""


@pytest.mark.parametrize("manifest", of_kind("CronJob"))
def test_cronjob_submits_a_command_that_there_is(manifest: dict[str, Any]) -> None:
    spec = manifest["spec"]
    assert (manifest["apiVersion"], spec["timeZone"], spec["concurrencyPolicy"]) == ("batch/v1", "Etc/UTC", "Forbid")
    assert set(spec) <= CRONJOB and len(spec["schedule"].split()) == 5
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:4] == ["python", "-m", "cluster", "submit"]
    command = container["command"][container["command"].index("--") + 1 :]
    done = rayloop(*command, "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("manifest", of_kind("RayService"))
def test_embedded_serve_config_meets_rays_own_schema(manifest: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert [a.name for a in config.applications] == ["gateway", "engine", "grader", "tools", "control"]


def test_pods_have_the_ingress_and_the_bounds_that_the_settings_ask_for(tmp_path: Path) -> None:
    maps = {d["metadata"]["name"]: d["data"] for _, d in documents() if d["kind"] == "ConfigMap"}
    file = tmp_path / "rayloop.yaml"
    file.write_text(maps["rayloop-config"]["rayloop.yaml"])
    environment = maps["rayloop-environment"]
    settings = load_settings(file)[0]
    assert ingress_environment(settings).items() <= environment.items()
    assert environment["RAY_task_rpc_inlined_bytes_limit"] == str(
        system_config(settings)["task_rpc_inlined_bytes_limit"]
    )
    script = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert f"RUN python -m serve.ingress {script}" in (K8S / "image" / "Dockerfile").read_text()


def test_haproxy_keeps_statistics_to_itself_and_waits_for_no_head_for_ever(tmp_path: Path) -> None:
    script, config = tmp_path / "haproxy", tmp_path / "haproxy.cfg"
    write_haproxy_script(script)
    script.write_text(script.read_text().replace("exec ", "exit 0 # "))
    config.write_text("    bind *:9101\n    bind :8404\n    bind *:8000\n    timeout client 31s\n")
    subprocess.run([script, "-f", config], check=True)
    assert config.read_text() == (
        "    bind 127.0.0.1:9101\n    bind 127.0.0.1:8404\n    bind *:8000\n"
        "    timeout client 31s\n    timeout http-request 31s\n"
    )


def test_every_alert_has_a_rule_on_metrics_that_exist_and_a_runbook() -> None:
    (group,) = yaml.safe_load((K8S / "components" / "alerts" / "rules.yaml").read_text())["spec"]["groups"]
    known = {sample.name for family in metrics.REGISTRY.collect() for sample in family.samples} | {
        f"{family.name}_total" for family in metrics.REGISTRY.collect() if family.type == "counter"
    }
    runbooks = set(re.findall(r"^## `(\w+)`$", (K8S.parent / "docs" / "alerts.md").read_text(), re.MULTILINE))
    assert runbooks == set(ALERTS)
    told = {}
    for rule in group["rules"]:
        assert set(re.findall(r"rayloop_\w+", rule["expr"])) <= known
        event = rule["labels"]["event"]
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{event}"
        told[event] = rule["labels"]["severity"]
    without_metric = {"drift", "capture_failed"}
    assert told == {name: severity for name, (severity, _) in ALERTS.items() if name not in without_metric}


def scraped() -> Any:
    return next(yaml.safe_load_all((K8S / "components" / "alerts" / "podmonitor.yaml").read_text()))


@pytest.mark.parametrize("pods", [0, 1], ids=["head", "workers"])
def test_prometheus_reaches_ports_that_the_pods_have_with_what_their_processes_write(pods: int) -> None:
    service = next(d for _, d in documents() if d["kind"] == "RayService")["spec"]["rayClusterConfig"]
    template = [service["headGroupSpec"], service["workerGroupSpecs"][0]][pods]["template"]
    wanted = scraped()["spec"]["selector"]["matchLabels"].items()
    assert wanted <= template["metadata"]["labels"].items()
    containers = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for c in containers for port in c["ports"]}
    assert {e["port"] for e in scraped()["spec"]["podMetricsEndpoints"]} <= ports.keys()
    ray, exporter = containers
    config = next(d for _, d in documents() if d["metadata"]["name"] == "rayloop-config")["data"]["rayloop.yaml"]
    folder = yaml.safe_load(config)["metrics"]["folder"]
    for container in (ray, exporter):
        assert folder in [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "metrics"]
    assert exporter["command"][:2] == ["rayloop", "metrics"] and ports["rayloop-metrics"] == 9464


def test_the_network_lets_prometheus_to_every_port_that_it_scrapes() -> None:
    monitor, policy = yaml.safe_load_all((K8S / "components" / "alerts" / "podmonitor.yaml").read_text())
    assert policy["spec"]["podSelector"] == monitor["spec"]["selector"]
    (rule,) = policy["spec"]["ingress"]
    assert {port["port"] for port in rule["ports"]} == {9464, 8080}


def test_every_resource_is_listed_and_every_listed_file_exists() -> None:
    listed = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())["resources"]
    present = {f.name for f in (K8S / "base").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed) == present


PATCHES = ["overlays/dev", "overlays/gpu", "overlays/production", "components/rayservice-driver"]


@pytest.mark.parametrize("folder", PATCHES)
def test_patches_point_at_what_exists(folder: str) -> None:
    kustomization = yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())
    by_name = {(d["kind"], d["metadata"]["name"]): d for _, d in documents()}
    for patch in kustomization["patches"]:
        target = by_name[(patch["target"]["kind"], patch["target"]["name"])]
        for step in yaml.safe_load(patch["patch"]):
            node: Any = target
            *parents, last = [p.replace("~1", "/") for p in step["path"].strip("/").split("/")]
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node[part]
            assert step["op"] == "add" or last in node


def test_the_rayservice_driver_may_read_and_patch_one_rayservice_and_nothing_else() -> None:
    role, binding = yaml.safe_load_all((K8S / "components" / "rayservice-driver" / "access.yaml").read_text())
    (rule,) = role["rules"]
    assert (rule["resources"], rule["resourceNames"]) == (["rayservices"], ["rayloop"])
    assert set(rule["verbs"]) == {"get", "patch"}
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    service = next(d for _, d in documents() if d["kind"] == "RayService")
    account = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["serviceAccountName"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]


def test_no_pod_runs_as_root_or_without_limits() -> None:
    def pods(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, list):
            return [p for item in node for p in pods(item)]
        if not isinstance(node, dict):
            return []
        own = [node] if "containers" in node else []
        return own + [p for value in node.values() for p in pods(value)]

    found = [p for _, d in documents() for p in pods(d)]
    assert found
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert all({"cpu", "memory"} <= set(c["resources"]["limits"]) for c in pod["containers"])
