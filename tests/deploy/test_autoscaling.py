"""Ray's own autoscaler, with the node types of deploy/, brings nodes for our programs and takes them away again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from avsep import shards
from pipelines import actors, extract, runners
from tests.support.cluster import ENVIRONMENT, free_port
from tests.support.processes import descendants
from tests.support.scenes import table_of

ROOT = Path(__file__).parents[2]
IDLE_S = 10
HEAD = "ray.head.default"  # as the provider below calls it


def node_types(name: str) -> dict[str, dict[str, Any]]:
    """A file's node types as its autoscaler reads them, each at most two nodes of one CPU."""
    if name == "vms.yaml":
        from ray.autoscaler._private.util import prepare_config

        types = prepare_config(yaml.safe_load((ROOT / "deploy" / name).read_text()))["available_node_types"]
        of_machines = {"cpu": {"CPU": 4}, "gpu": {"CPU": 4, "GPU": 1}}  # what the provider knows of its machines
        for kind, resources in of_machines.items():
            types[kind]["resources"] = resources | types[kind]["resources"]
        types[HEAD] = types.pop("head")
    else:
        from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

        cluster = next(iter(yaml.safe_load_all((ROOT / "deploy" / name).read_text())))
        cluster["metadata"]["namespace"] = "default"
        types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
        types[HEAD] = types.pop("headgroup")
    assert types[HEAD]["resources"]["CPU"] == 0 and {t["min_workers"] for t in types.values()} == {0}
    for kind in types.values():
        kind["resources"] = {r: min(1, n) for r, n in kind["resources"].items() if r in ("CPU", "GPU")}
        kind["node_config"], kind["max_workers"] = {}, min(2, kind["max_workers"])
    return types


class Growing:
    """A head without CPUs, whose nodes are processes on this machine that an autoscaler starts and ends."""

    def __init__(self, folder: Path, types: dict[str, dict[str, Any]], version: str) -> None:
        import ray
        from ray.autoscaler._private.kuberay.autoscaling_config import _generate_legacy_autoscaling_config_fields

        address, port = ray.util.get_node_ip_address(), free_port()
        self.address = f"{address}:{port}"
        head_id = "f" * 51 + "00000"  # which the provider gives to it
        config = {
            "cluster_name": "avsep",
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": self.address,
                "head_node_id": head_id,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
            },
            "available_node_types": types,
            "head_node_type": HEAD,
            "max_workers": sum(t["max_workers"] for t in types.values()),
            "idle_timeout_minutes": IDLE_S / 60,
            **_generate_legacy_autoscaling_config_fields(),
        }
        (folder / "scaling.json").write_text(json.dumps(config))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | ENVIRONMENT
        scaling = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        scaling["AUTOSCALER_METRIC_PORT"] = str(free_port())
        if version == "v2":
            scaling |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": head_id}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--port", str(port), "--node-ip-address", address, "--temp-dir", str(folder)]
        command += ["--num-cpus", "0", "--object-store-memory", str(100 << 20), "--include-dashboard", "False"]
        command += ["--dashboard-agent-listen-port", str(free_port())]
        command += ["--autoscaling-config", str(folder / "scaling.json")]
        log = folder / "log"
        for _ in range(3):  # on a busy machine a raylet's agents may not start within the 15 s that it gives them
            with log.open("wb") as f:
                self.process = subprocess.Popen(
                    command, env=self.environment | scaling, stdout=f, stderr=f, start_new_session=True
                )
            while self.process.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return
                time.sleep(0.5)
        raise AssertionError(log.read_text()[-2000:])

    def nodes(self, *, alive: bool) -> Counter[str]:
        """Count the nodes by type: those that are there, or all that ever came."""
        from ray._raylet import GcsClient

        nodes = GcsClient(address=self.address).get_all_node_info().values()
        return Counter(
            n.node_type_name for n in nodes if n.node_type_name in ("cpu", "gpu") and not (alive and n.state)
        )

    def run(self, *command: str, timeout_s: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python on the head."""
        environment = self.environment | {"RAY_ADDRESS": self.address} | environment
        return subprocess.run(
            [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True,
            timeout=timeout_s,
        )  # fmt: skip

    def wait_until_empty(self) -> None:
        deadline = time.monotonic() + IDLE_S + 90
        while there := self.nodes(alive=True):
            assert time.monotonic() < deadline, there
            time.sleep(1)


@contextlib.contextmanager
def growing(folder: Path, name: str, version: str) -> Iterator[Growing]:
    made = Growing(folder, node_types(name), version)
    try:
        yield made
    finally:
        for pid in (made.process.pid, *descendants(made.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        made.process.wait()


def one_gpu(command: list[str]) -> None:
    """Extraction, to which a GPU without CUDA is of no use; then a program that takes both halves of it."""
    with runners.session() as runner:
        assert extract.main(command) == 2
        assert len(runner.gpus()) == 1
        for half in runner.actors(actors.nothing, 2, gpus=0.5):
            half(actors.without_cuda).result()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "version"), [("kuberay/cluster.yaml", "v2"), ("vms.yaml", "v1")])
def test_nodes_come_with_the_work_and_go_after_it(rendered, tmp_path_factory, name, version):
    """From none: CPUs for what waits for CPUs, a GPU where a program asks for one, and none for nothing."""
    folder = tmp_path_factory.mktemp("a")  # short: the sockets' paths may have 107 bytes
    (folder / "clips").symlink_to(rendered / "clips")
    table = folder / "table.csv"
    table.write_text(table_of(rendered))
    with growing(folder, name, version) as cluster:
        command = ["--segments", str(table), "--out"]
        done = cluster.run("-m", "pipelines.extract", *command, str(folder / "out"))
        assert done.returncode == 0, done.stderr
        assert sum(map(len, shards.read_ids(str(folder / "out")))) == 50
        brought = cluster.nodes(alive=False)
        assert set(brought) == {"cpu"}  # more tasks wait than they take: no GPU is paid for that
        if version == "v2":  # v1 brings another where launching takes seconds, and ends it at once
            assert brought == {"cpu": 2}
        cluster.wait_until_empty()
        code = f"from tests.deploy.test_autoscaling import one_gpu; one_gpu({[*command, str(folder / 'other')]!r})"
        done = cluster.run("-c", code, AVSEP_GPUS="1")
        assert done.returncode == 0 and "waits for 1 of 1 GPUs, 15 min at most" in done.stdout, done
        assert "AVSEP_GPUS: Ray counts a GPU on " in done.stderr and done.stderr.count("\n") == 1, done.stderr
        brought = cluster.nodes(alive=False) - brought
        assert set(brought) == {"gpu"} and (brought["gpu"] == 1 or version == "v1"), brought
        cluster.wait_until_empty()
