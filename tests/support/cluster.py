"""A real Ray cluster on this machine: a head and nodes as separate processes, each with its own address."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.processes import descendants

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "60",  # on a busy machine
    # a node that is gone is noticed in seconds
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


@dataclass
class Node:
    """A machine as Ray sees it: an address, and a tree of processes."""

    name: str
    address: str
    namespace: str | None
    process: subprocess.Popen | None = None
    command: list[str] = field(default_factory=list)
    starts: int = 0

    def processes(self, name: str) -> list[int]:
        """Those of its processes that go by this name."""
        below = descendants(self.process.pid) if self.process else {}
        return [pid for pid, title in below.items() if name in title]

    def kill(self) -> None:
        """Pull the plug."""
        if self.process:
            for pid in (self.process.pid, *descendants(self.process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@dataclass
class Cluster:
    """Nodes in network namespaces on a bridge, where we may make them; else on loopback, on ports of their own."""

    folder: Path
    environment: dict[str, str]
    number: int = field(default_factory=os.getpid)
    nodes: list[Node] = field(default_factory=list)
    own_addresses: bool = False

    def __post_init__(self) -> None:
        self.bridge = f"avsep{self.number % 100_000}"
        self.network = f"10.213.{self.number % 250}"
        self.host = "127.0.0.1"
        if _ip("link", "add", self.bridge, "type", "bridge"):
            self.own_addresses = _ip("addr", "add", f"{self.network}.1/24", "dev", self.bridge)
            self.own_addresses &= _ip("link", "set", self.bridge, "up")
            self.host = f"{self.network}.1" if self.own_addresses else self.host
        self.port = 6379 if self.own_addresses else free_port()
        self.dashboard_port = 8265 if self.own_addresses else free_port()

    def _machine(self) -> Node:
        name = f"{self.bridge}n{len(self.nodes) + 1}"
        if not self.own_addresses:
            return Node(name, self.host, None)
        address, link = f"{self.network}.{len(self.nodes) + 2}", f"v{name[5:]}"
        inside = ["netns", "exec", name, "ip"]
        made = (
            _ip("netns", "add", name)
            and _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            and _ip("link", "set", link, "master", self.bridge, "up")
            and _ip(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
            and _ip(*inside, "link", "set", "eth0", "up")
            and _ip(*inside, "link", "set", "lo", "up")
        )
        assert made, f"no network namespace for {name}"
        return Node(name, address, name)

    def start(self, *options: str) -> Node:
        """Start a node, the head first; wait before the next one, since two may choose the same socket."""
        node = self._machine()
        command = ["ip", "netns", "exec", node.namespace] if node.namespace else []
        command += [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address", node.address, "--object-store-memory", str(200 << 20), *options]
        if not self.nodes:
            command += ["--head", "--port", str(self.port), "--temp-dir", str(self.folder)]
            command += ["--dashboard-host", node.address, "--dashboard-port", str(self.dashboard_port)]
        else:
            command += ["--address", f"{self.nodes[0].address}:{self.port}"]
        if not node.namespace:
            command += ["--dashboard-agent-listen-port", str(free_port())]
        node.command = command
        self._launch(node)
        self.nodes.append(node)
        return node

    def _launch(self, node: Node) -> None:
        node.starts += 1
        with (self.folder / f"{node.name}.log").open("wb") as log:
            node.process = subprocess.Popen(
                node.command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def url(self) -> str:
        """The dashboard's, which is the Jobs API's."""
        return f"http://{self.nodes[0].address}:{self.dashboard_port}"

    def wait(self, n_alive: int, timeout_s: float = 300) -> None:
        """Wait until the head counts so many nodes."""
        deadline, alive = time.monotonic() + timeout_s, -1
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, KeyError):
                alive = self._count()
                if alive == n_alive:
                    return
            for (
                node
            ) in self.nodes:  # on a busy machine a raylet's agents may not start within the 15 s that it gives them
                if node.process and node.process.poll() is not None and node.starts < 3:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(node.process.pid, signal.SIGKILL)
                    self._launch(node)
            time.sleep(1)
        logs = "\n".join((self.folder / f"{n.name}.log").read_text()[-500:] for n in self.nodes)
        raise AssertionError(f"{alive} nodes are alive, not {n_alive}\n{logs}")

    def _count(self) -> int:

        with urllib.request.urlopen(f"{self.url}/nodes?view=summary", timeout=5) as answer:
            summary = json.load(answer)["data"]["summary"]
        return sum(node["raylet"]["state"] == "ALIVE" for node in summary)

    def stop(self) -> None:
        """Kill what was started, the head last, and take the network down."""
        for node in reversed(self.nodes):
            node.kill()
            if node.namespace:
                _ip("netns", "del", node.namespace)
        _ip("link", "del", self.bridge)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Give a cluster without nodes; whatever is started is killed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="avsep"))  # short: the sockets' paths may have 107 bytes
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    made = Cluster(folder, bare | ENVIRONMENT | {"PATH": path, "RAY_worker_niceness": "0"})
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
