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

from pipelines import console, runners
from tests.support.cluster import ENVIRONMENT

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
MANIFESTS = sorted(p.name for p in KUBERAY.glob("*.yaml"))
JOBS = ("manifest", "extract", "train", "collect", "evaluate")
OLDEST, NEWEST = ("1.29", "1.4"), ("1.37", "1.7")  # Kubernetes and KubeRay that we say we support
CRDS = "AVSEP_KUBERAY_CRDS"  # a file or folder of KubeRay's own, from its chart or `kubectl get crd -o yaml`
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


def validate(document: dict[str, Any], kubernetes: str, kuberay: str) -> None:
    """Validate against Kubernetes' schemas, and around them against KubeRay's fields; unknown fields are errors.

    KubeRay's are those of `tests/deploy/kuberay.yaml`, whose head says what they were held to.
    """
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, kubernetes, strict=True)
        return
    fields = strict(yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text()), kuberay)
    pods = schema_contents(f"kubernetes-json-schema/v{kubernetes}.0-local-strict/_definitions.json", kubernetes)
    pods["$defs"]["io.k8s.apimachinery.pkg.api.resource.Quantity"] = fields["$defs"]["Quantity"]
    registry = referencing.Registry().with_resources(
        (schema["$id"], referencing.Resource.from_contents(schema)) for schema in (fields, pods)
    )
    schema = {"$ref": f"{fields['$id']}#/$defs/{document['kind']}"}
    jsonschema.Draft202012Validator(schema, registry=registry).validate(document)


def strict(schema: Any, release: str = "", closed: bool = True) -> Any:
    """Make a schema say what the API server does: no unknown field passes, and a default fills in what is required.

    Leaves out what came after a release, where one is given.
    """
    if not isinstance(schema, dict):
        return [strict(s, release, closed) for s in schema] if isinstance(schema, list) else schema
    made = dict(schema)
    for key in schema.keys() & {"items", "additionalProperties"}:
        made[key] = strict(schema[key], release, closed)
    for key in schema.keys() & {"allOf", "anyOf", "oneOf", "not"}:  # they say more of fields declared elsewhere
        made[key] = strict(schema[key], release, closed=False)
    for key in schema.keys() & {"properties", "$defs", "dependentSchemas"}:
        known = {
            n: s for n, s in schema[key].items() if not release or number(s.get("x-since", "0")) <= number(release)
        }
        made[key] = {n: strict(s, release, closed and key != "dependentSchemas") for n, s in known.items()}
    if closed and "properties" in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
        made["required"] = [n for n in schema.get("required", ()) if "default" not in schema["properties"].get(n, {})]
    return made


def number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def custom_schemas(where: Path) -> dict[str, Any]:
    """Read the schemas of ray.io/v1 by kind from custom resource definitions; their CEL rules are not evaluated."""
    files = (
        [where] if where.is_file() else sorted(f for f in where.rglob("*") if f.suffix in (".yaml", ".yml", ".json"))
    )
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    documents = [d for f in files for d in yaml.load_all(f.read_text(), loader) if isinstance(d, dict)]
    definitions = [i for d in documents for i in d.get("items", [d]) if i.get("kind") == "CustomResourceDefinition"]
    return {
        definition["spec"]["names"]["kind"]: strict(version["schema"]["openAPIV3Schema"])
        for definition in definitions
        if definition["spec"]["group"] == "ray.io"
        for version in definition["spec"]["versions"]
        if version["name"] == "v1"
    }


# ------------------------------------------------------------------------------------------ Kubernetes


@pytest.mark.parametrize("versions", [OLDEST, NEWEST], ids=["oldest", "newest"])
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_valid(name: str, versions: tuple[str, str]) -> None:
    for document in documents(name):
        validate(document, *versions)


@pytest.mark.skipif(CRDS not in os.environ, reason=f"{CRDS} names no file or folder of KubeRay's own definitions")
def test_manifests_are_valid_by_kuberays_own_definitions() -> None:
    schemas = custom_schemas(Path(os.environ[CRDS]))
    for document in (d for name in MANIFESTS for d in documents(name) if d["apiVersion"] == "ray.io/v1"):
        assert document["kind"] in schemas, f"{os.environ[CRDS]} defines {sorted(schemas)} of ray.io/v1"
        jsonschema.Draft202012Validator(schemas[document["kind"]]).validate(document)


def test_the_validation_sees_mistakes() -> None:
    (cluster, policy), (job,) = documents("cluster.yaml"), documents("train.yaml")
    group = ("spec", "workerGroupSpecs", 0)
    pod = (*group, "template", "spec")
    rule = {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}
    mistakes = (
        (cluster, ("spec", "workerGroupSpec"), []),
        (cluster, (*group, "maxReplicas"), "4"),
        (cluster, (*pod, "toleration"), []),
        (cluster, (*pod, "containers", 0, "livenessProbe", "httpGet", "prot"), 1),
        (cluster, ("spec", "autoscalerOptions", "upscalingMode"), "Fast"),
        (cluster, ("metadata", "name"), "Avsep"),
        (policy, ("spec", "ingres"), []),
        (job, ("spec", "clusterSelector"), {"cluster": "avsep"}),
        (job, ("spec", "backoffLimit"), 2),
        (job, ("spec", "submitterConfig", "retries"), 2),
        (job, ("spec", "deletionStrategy"), {"onSuccess": {"policy": "DeleteNone"}, "deletionRules": [rule]}),
        (cluster, (*group, "template", "metadata"), {"generateName": "avsep-"}),
        (cluster, (*pod, "containers", 0, "resources", "requests", "cpu"), 0.5),
        (cluster, (*pod, "containers", 0, "resources", "requests", "memory"), "8GB"),
    )
    for document, path, value in mistakes:
        with pytest.raises(jsonschema.ValidationError):
            validate(changed(document, path, value), *NEWEST)
    validate(
        changed(cluster, group, {"groupName": "cpu", "template": cluster["spec"]["headGroupSpec"]["template"]}), *OLDEST
    )
    validate(changed(job, ("spec", "deletionStrategy"), {"deletionRules": [rule]}), *NEWEST)
    newer = changed(cluster, (*group, "priority"), 1)
    validate(newer, *NEWEST)
    with pytest.raises(jsonschema.ValidationError, match="priority"):
        validate(newer, *OLDEST)


def test_custom_resource_definitions_are_read_as_the_api_server_does(tmp_path: Path) -> None:
    """Unknown fields are errors, defaults fill in what is required, other groups and versions do not count."""
    text: dict[str, Any] = {"type": "string"}
    size = {"anyOf": [{"type": "integer"}, text], "x-kubernetes-int-or-string": True}
    group = {
        "type": "object",
        "required": ["name", "replicas"],
        "properties": {"name": text, "replicas": {"type": "integer", "default": 0}, "size": size},
        "anyOf": [{"properties": {"name": {"enum": ["cpu", "gpu"]}}}],
    }
    spec = {
        "type": "object",
        "properties": {
            "groups": {"type": "array", "items": group},
            "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
            "params": {"type": "object", "additionalProperties": text},
        },
    }
    schema = {"type": "object", "properties": {"kind": text, "metadata": {"type": "object"}, "spec": spec}}
    versions = [{"name": "v1alpha1", "schema": {}}, {"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    mine = {"group": "ray.io", "names": {"kind": "RayCluster"}, "versions": versions}
    other = mine | {"group": "example.com", "names": {"kind": "Other"}}
    crds = [{"kind": "CustomResourceDefinition", "spec": s} for s in (mine, other)]
    (tmp_path / "list.json").write_text(json.dumps({"kind": "List", "items": crds}))
    (tmp_path / "each.yaml").write_text(yaml.safe_dump_all([*crds, None]))
    right = {
        "kind": "RayCluster",
        "metadata": {"name": "x"},
        "spec": {"groups": [{"name": "cpu", "size": 1}], "free": {"a": 1}, "params": {"a": "1"}},
    }
    mistakes: tuple[tuple[tuple[Any, ...], Any], ...] = (
        (("spec", "groups", 0, "sise"), 1),
        (("spec", "groups", 0, "name"), "tpu"),
        (("spec", "groups", 0, "size"), 1.5),
        (("spec", "groups", 0), {"replicas": 1}),
        (("spec", "params", "a"), 1),
        (("specs",), {}),
    )
    for where in (tmp_path / "list.json", tmp_path / "each.yaml", tmp_path):
        schemas = custom_schemas(where)
        assert schemas.keys() == {"RayCluster"}
        validator = jsonschema.Draft202012Validator(schemas["RayCluster"])
        validator.validate(right)
        for path, value in mistakes:
            with pytest.raises(jsonschema.ValidationError):
                validator.validate(changed(right, path, value))


def changed(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    wrong = copy.deepcopy(document)
    target: Any = wrong
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return wrong


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


def test_the_images_ray_is_the_manifests() -> None:
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
    environment = yaml.safe_load(job["spec"].get("runtimeEnvYAML", "{}")).get("env_vars", {})
    assert environment.keys() <= {"AVSEP_GPUS"} and all(isinstance(v, str) for v in environment.values())


def test_the_service_is_serve_yaml() -> None:
    config = yaml.safe_load(documents("service.yaml")[0]["spec"]["serveConfigV2"])
    plain = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    assert config == plain | {"proxy_location": "EveryNode"}
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)


# ------------------------------------------------------------------------------------ virtual machines


def test_the_cluster_launchers_file_is_valid() -> None:
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
    with runners.session() as runner:
        assert runner.n_workers == 1
        print("started", flush=True)
        assert list(runner.map(wait_for, [(folder, i, 4) for i in range(4)])) == [4] * 4


@pytest.mark.slow
def test_work_fills_nodes_that_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an autoscaler that starts from no worker: its nodes come while the first tasks wait."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    (tmp_path / "started").mkdir()
    code = f"from tests.deploy.test_deploy import four_at_once; four_at_once({str(tmp_path / 'started')!r})"
    try:
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as program:
            assert program.stdout and program.stdout.readline() == b"started\n"
            for _ in range(2):
                cluster.add_node(num_cpus=2)
            assert program.wait(timeout=300) == 0
    finally:
        cluster.shutdown()


def test_numbers_in_the_environment_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    for name in ("AVSEP_CPUS", "AVSEP_GPUS"):
        with monkeypatch.context() as wrong:
            wrong.setenv(name, "two")
            with (
                pytest.raises(console.UsageError, match=f"{name}=two: it must be a whole number"),
                runners.session(),
            ):
                pass


def test_the_cost_of_an_extraction_without_clips_is_a_mistake(tmp_path: Path) -> None:
    """Told as all programs tell theirs: one line, and status 2."""
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits" / "a-g0.json").write_text("{")
    for clips, told in ((tmp_path / "none", f"--clips {tmp_path}/none holds no clips yet"), (tmp_path, "is no commit")):
        program = [sys.executable, str(ROOT / "deploy" / "cost.py"), "--clips", str(clips)]
        done = subprocess.run(
            program, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": ROOT}
        )
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
