"""The files of deploy/ against the schemas and parsers of those who read them."""

import copy
import json
import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import referencing
import yaml
from kubernetes_validate.utils import schema_contents

from pipelines import execution

ROOT = Path(__file__).parent.parent
KUBERAY = ROOT / "deploy" / "kuberay"
MANIFESTS = sorted(p.name for p in KUBERAY.glob("*.yaml"))
JOBS = ("manifest", "extract", "train", "collect", "evaluate")
KUBERNETES = ("1.29", "1.37")  # the oldest and the newest that we say we support
HEALTH = {  # with which a lost node is noticed within 20 seconds
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


def validate(document: dict[str, Any], version: str) -> None:
    """Validate against Kubernetes' schemas, and KubeRay's fields around them; unknown fields are errors."""
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, version, strict=True)
        return
    kuberay = json.loads((Path(__file__).parent / "kuberay.json").read_text())
    kubernetes = schema_contents(f"kubernetes-json-schema/v{version}.0-local-strict/_definitions.json", version)
    registry = referencing.Registry().with_resources(
        (schema["$id"], referencing.Resource.from_contents(schema)) for schema in (kuberay, kubernetes)
    )
    schema = {"$ref": f"{kuberay['$id']}#/$defs/{document['kind']}"}
    jsonschema.Draft202012Validator(schema, registry=registry).validate(document)


# ------------------------------------------------------------------------------------------ Kubernetes


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_valid(name: str, version: str) -> None:
    for document in documents(name):
        validate(document, version)


def test_the_validation_sees_mistakes() -> None:
    cluster, policy = documents("cluster.yaml")
    pod = ("spec", "workerGroupSpecs", 0, "template", "spec")
    mistakes = (
        (cluster, ("spec", "workerGroupSpec"), []),
        (cluster, ("spec", "workerGroupSpecs", 0, "maxReplicas"), "4"),
        (cluster, (*pod, "toleration"), []),
        (cluster, (*pod, "containers", 0, "livenessProbe", "httpGet", "prot"), 1),
        (cluster, ("spec", "autoscalerOptions", "upscalingMode"), "Fast"),
        (policy, ("spec", "ingres"), []),
    )
    for document, path, value in mistakes:
        wrong = copy.deepcopy(document)
        target: Any = wrong
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong, KUBERNETES[-1])


def clusters() -> dict[str, dict[str, Any]]:
    return {
        "cluster.yaml": documents("cluster.yaml")[0]["spec"],
        "service.yaml": documents("service.yaml")[0]["spec"]["rayClusterConfig"],
    }


@pytest.mark.parametrize("name", ["cluster.yaml", "service.yaml"])
def test_every_pod_is_confined_bounded_and_watched(name: str) -> None:
    spec = clusters()[name]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert spec["enableInTreeAutoscaling"] and len(groups) > 1
    for number, group in enumerate(groups):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()
        environment = {e["name"]: e["value"] for e in container["env"]}
        assert HEALTH.items() <= environment.items() and environment["RAY_AUTH_MODE"]
        spill = group["rayStartParams"]["object-spilling-directory"]
        (volume,) = (m["name"] for m in container["volumeMounts"] if m["mountPath"] == spill)
        assert volume in {v["name"] for v in pod["volumes"] if "sizeLimit" in v.get("emptyDir", {})}
        assert "startupProbe" in container
        if name == "cluster.yaml":  # for the service KubeRay adds its own, which know of Serve
            assert {"readinessProbe", "livenessProbe"} <= container.keys()
        spot = [t for t in pod.get("tolerations", ()) if "spot" in t["key"]]
        assert not spot if number == 0 else spot, "workers may run on spot nodes, the head may not"
    assert len({json.dumps(g["template"]["spec"]["containers"][0]["env"]) for g in groups}) == 1
    assert len({g["template"]["spec"]["containers"][0]["image"] for g in groups}) == 1


def test_ray_knows_every_start_parameter() -> None:
    from ray.scripts.scripts import start

    known = {option.lstrip("-") for parameter in start.params for option in parameter.opts}
    for spec in clusters().values():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["rayStartParams"].keys() <= known


def test_ray_knows_the_settings_that_notice_lost_nodes() -> None:
    import ray

    binary = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    with binary.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as code:
        assert not [name for name in HEALTH if code.find(name.removeprefix("RAY_").encode()) < 0]
        assert code.find(b"health_check_perioh_ms") < 0
    readme = (ROOT / "deploy" / "README.md").read_text()
    assert not [name for name, value in HEALTH.items() if f"{name}={value}" not in readme]


def test_the_image_s_ray_is_the_manifests() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "deploy" / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert {spec["rayVersion"] for spec in clusters().values()} == {pinned[1]}


@pytest.mark.parametrize("name", JOBS)
def test_jobs_run_on_the_cluster(name: str) -> None:
    (job,) = documents(f"{name}.yaml")
    (cluster, _) = documents("cluster.yaml")
    assert job["kind"] == "RayJob" and job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["spec"]["entrypoint"].startswith(f"python -m pipelines.{name} ")
    # a retry of KubeRay's deletes the cluster that others may be using
    assert "backoffLimit" not in job["spec"] and "shutdownAfterJobFinishes" not in job["spec"]


def test_the_service_is_serve_yaml() -> None:
    config = yaml.safe_load(documents("service.yaml")[0]["spec"]["serveConfigV2"])
    plain = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    assert config == plain | {"proxy_location": "EveryNode"}
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)


# ------------------------------------------------------------------------------------ virtual machines


def test_the_cluster_launcher_s_file_is_valid() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "deploy" / "vms.yaml").read_text()))
    validate_config(config)
    assert set(config["available_node_types"]) == {"head", "cpu", "gpu"}
    options = {o.split(maxsplit=1)[1] for o in config["docker"]["run_options"] if o.startswith("--env ")}
    assert {f"{k}={v}" for k, v in HEALTH.items()} <= options
    wrong = config | {"available_node_types": {"head": {"resources": {"CPU": 0}, "node_configs": {}}}}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(wrong)


# --------------------------------------------------------------------------------- a cluster that grows


def wait_for(folder: str, number: int, count: int) -> int:
    """Wait until so many of us have started."""
    Path(folder, str(number)).touch()
    deadline = time.monotonic() + 60
    while len(os.listdir(folder)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(os.listdir(folder))


def four_at_once(folder: str) -> None:
    """A program that starts on a cluster without workers."""
    with execution.session() as runner:
        assert runner.n_workers == 1
        print("started", flush=True)
        assert list(runner.map(wait_for, [(folder, i, 4) for i in range(4)])) == [4] * 4


@pytest.mark.slow
def test_work_fills_nodes_that_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an autoscaler that starts from no worker: its nodes come while the first tasks wait."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    (tmp_path / "started").mkdir()
    code = f"from tests.test_deploy import four_at_once; four_at_once({str(tmp_path / 'started')!r})"
    try:
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as program:
            assert program.stdout and program.stdout.readline() == b"started\n"
            for _ in range(2):
                cluster.add_node(num_cpus=2)
            assert program.wait(timeout=120) == 0
    finally:
        cluster.shutdown()
