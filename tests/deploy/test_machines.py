"""Machines reached by ssh: the recipe of deploy/README.md, and Ray's cluster launcher with the commands of vms.yaml."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from avsep import shards
from tests.support.cluster import Cluster, free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
BOOT = """
mount --bind {folder}/passwd /etc/passwd
mkdir -p /run/sshd /tmp/ray
mount --bind {folder}/ray /tmp/ray
exec {sshd} -D -f {folder}/sshd_config -E {folder}/sshd.log
"""
CONFIG = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
UsePAM no
PermitRootLogin yes
StrictModes no
Subsystem sftp internal-sftp
"""


def missing() -> str:
    """Say what these tests lack here."""
    if SSHD is None or subprocess.run([SSHD, "-V"], capture_output=True, check=False).returncode not in (0, 1):
        return "needs sshd, of Debian's package openssh-server"
    if not all(map(shutil.which, ("ssh", "ssh-keygen", "unshare", "ip"))):
        return "needs ssh, ssh-keygen, unshare and ip"
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        return "needs leave to make namespaces"
    return ""


pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900), pytest.mark.skipif(bool(missing()), reason=missing())]


class Machine:
    """An ssh server with an address, processes, a home and a folder for Ray of its own."""

    def __init__(self, network: Cluster, folder: Path, key: Path, settings: str) -> None:
        node = network._machine()
        network.nodes.append(node)
        self.address, self.folder, self.key = node.address, folder, key
        route = ["ip", "-n", str(node.namespace), "route", "add", "default", "via", network.host]
        subprocess.run(route, check=True)  # by which Ray finds its own address
        for name in ("ray", "home"):
            (folder / name).mkdir(parents=True)
        (folder / "passwd").write_text(
            f"root:x:0:0:root:{folder}/home:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        )
        (folder / "home" / ".bashrc").write_text(settings)
        (folder / "home" / ".profile").write_text(". ~/.bashrc\n")
        shutil.copy(f"{key}.pub", folder / "authorized_keys")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")], check=True)
        (folder / "sshd_config").write_text(CONFIG.format(address=self.address, folder=folder))
        boot = BOOT.format(folder=folder, sshd=SSHD)
        command = ["ip", "netns", "exec", node.namespace, "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        command += ["--mount-proc", "sh", "-ec", boot]
        node.process = subprocess.Popen(command, start_new_session=True)
        self.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while self.ssh("true", check=False).returncode:
            assert time.monotonic() < deadline, (self.folder / "sshd.log").read_text()
            time.sleep(0.5)

    def ssh_command(self) -> list[str]:
        options = ["-i", str(self.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        return ["ssh", "-q", *options, f"root@{self.address}"]

    def ssh(self, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*self.ssh_command(), command], capture_output=True, text=True, timeout=400)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(
        tmp_path, dict(os.environ), number=secrets.randbelow(100_000)
    )  # the last one's links take a while to go
    try:
        if not made.own_addresses:
            pytest.skip("needs leave to make network namespaces")
        yield made
    finally:
        made.stop()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    return tmp_path / "key"


def recipe() -> list[list[str]]:
    """The command lines of deploy/README.md's section, block by block."""
    section = (DEPLOY / "README.md").read_text().split("\n## Machines reached by ssh\n")[1].split("\n## ")[0]
    return [block.strip().splitlines() for block in re.findall(r"```\n(.*?)```", section, re.S)]


def n_nodes(head: Machine) -> int:
    """How many nodes `ray status` counts."""
    said = head.ssh("ray status", check=False).stdout
    return sum(map(int, re.findall(r"^ (\d+) \S+$", said.partition("Pending")[0], re.M)))


def wait_for_nodes(head: Machine, count: int, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while (found := n_nodes(head)) != count:
        assert time.monotonic() < deadline, f"{found} nodes, not {count}\n{head.ssh('ray status', check=False).stdout}"
        time.sleep(2)


def addresses(url: str) -> set[str]:
    """Which addresses the nodes have for one another."""
    with urllib.request.urlopen(f"{url}/nodes?view=summary", timeout=30) as answer:
        nodes = json.load(answer)["data"]["summary"]
    return {node["raylet"]["nodeManagerAddress"] for node in nodes if node["raylet"]["state"] == "ALIVE"}


@contextlib.contextmanager
def tunnel(head: Machine) -> Iterator[str]:
    """Bring the dashboard here as the README has it; gives the address."""
    port = free_port()
    (line,) = re.findall(r"`ssh (-L 8265:[^`]*) HEAD`", (DEPLOY / "README.md").read_text())
    forward = line.replace("-L 8265", f"-L{port}")
    command = [*head.ssh_command(), "-N", "-o", "ExitOnForwardFailure=yes", forward]
    with subprocess.Popen(command) as process:
        try:
            time.sleep(2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def submit(address: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, str(DEPLOY / "submit"), "--address", address, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_recipe_for_machines_reached_by_ssh(rendered: Path, network: Cluster, key: Path, tmp_path: Path) -> None:
    """Word for word, but for addresses, paths, and the installation, which is there."""
    (*exports, install), (first, other), (program, stop) = recipe()
    assert install.startswith("pip install ") and stop.startswith("ray stop ")
    settings = "\n".join([f"export PATH={os.environ['PATH']}", *exports])
    head, worker = (Machine(network, tmp_path / name, key, settings) for name in ("head", "worker"))
    head.ssh(first.replace("10.0.0.1", head.address))
    worker.ssh(other.replace("10.0.0.1", head.address))
    wait_for_nodes(head, 2)
    paths = {"s3://yours/manifest": str(tmp_path / "manifest"), "s3://yours/clips": str(tmp_path / "clips")}
    with tunnel(head) as address:
        assert addresses(address) == {head.address, worker.address}
        table = str(rendered / "segments.csv")
        said = submit(address, "manifest", "--table", table, "--out", paths["s3://yours/manifest"])
        assert "14 segments" in said
    for uri, path in paths.items():
        program = program.replace(uri, path)
    head.ssh(f"cd {ROOT} && {program.replace('10.0.0.1', head.address)}")
    assert len(shards.read_ids(paths["s3://yours/clips"])[0]) == 14
    for machine in (worker, head):
        assert "raylet" in machine.ssh("ps -ef").stdout
        machine.ssh(stop)
        assert "raylet" not in machine.ssh("ps -ef").stdout


@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync, which Ray's launcher copies files with")
def test_the_cluster_launchers_commands(rendered: Path, network: Cluster, key: Path, tmp_path: Path) -> None:
    """`ray up`, `ray dashboard` and `ray down` with vms.yaml, its cloud and image replaced by machines that are there.

    By Ray's older autoscaler: the newer one of 2.60 takes the head of such machines for gone, and starts no worker.
    """
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "vms.yaml").read_text())
    image = config.pop("docker")
    exports = [o.replace("--env ", "export ") for o in image["run_options"] if o.startswith("--env ")]
    assert len(exports) >= 7
    settings = "\n".join([f"export PATH={os.environ['PATH']}", *exports, "export RAY_enable_autoscaler_v2=0\n"])
    head, worker = (Machine(network, tmp_path / name, key, settings) for name in ("head", "worker"))
    for name in ("available_node_types", "head_node_type"):
        del config[name]
    config["cluster_name"] = f"avsep-{os.getpid()}"
    config["max_workers"] = 1
    config["provider"] = {"type": "local", "head_ip": head.address, "worker_ips": [worker.address]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    file, port = tmp_path / "vms.yaml", free_port()
    file.write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "ray.scripts.scripts"]

    def ray(*arguments: str) -> None:
        environment = os.environ | {"RAY_UP_enable_autoscaler_v2": "0"}
        command = [*launcher, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    ray("up", "--yes", "--no-config-cache", str(file))
    wait_for_nodes(head, 2)
    with subprocess.Popen([*launcher, "dashboard", "--port", str(port), str(file)]) as process:
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while not answers(address):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(1)
            assert addresses(address) == {head.address, worker.address}
            out = str(tmp_path / "clips")
            said = submit(address, "extract", "--segments", str(rendered / "segments.csv"), "--out", out)
            assert len(shards.read_ids(out)[0]) == 14, said
        finally:
            process.terminate()
    ray("down", "--yes", str(file))  # of machines that are there, it knows the head alone
    assert "raylet" not in head.ssh("ps -ef").stdout


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False
