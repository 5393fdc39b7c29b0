"""Load on the service beside the same work as a plain function.

python tests/benchmarks/service.py --model out/demo/model --clips out/demo/clips/clips --clients 8 32

Starts the service, asks it with so many clients at once, and calls `VideoSeparator` in a loop in
as many processes as the service has replicas, in turns. Latency counts from the first byte sent to
the result's last one described; a client told 429 or 503 waits as told and asks again. CPU seconds and
private memory are told by what processes do. On a machine that others use too take many short turns
(`--seconds 20 --rounds 4`), and compare within a turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import httpx
import numpy as np


def plain(model: str, files: list[str], seconds: float) -> tuple[int, float, float]:
    """Separate one file after the other for so long; return how many, the time, and the CPU time with ffmpeg's."""
    import torch

    from avsep.videos import VideoSeparator

    torch.set_num_threads(1)
    separate = VideoSeparator.load(model)
    _ = separate.labeller
    separate(Path(files[0]), Path(tempfile.mkdtemp()))  # warm
    count, started, used = 0, time.monotonic(), sum(os.times()[:4])
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - started < seconds:
            separate(Path(files[count % len(files)]), Path(folder), mixture=True)
            count += 1
    return count, time.monotonic() - started, sum(os.times()[:4]) - used


ROLES = {  # of the service's processes, by what is in their titles
    "ServeReplica:avsep:separating": "workers",
    "ServeReplica:avsep:ingress": "ingress",
    "ProxyActor": "proxy",
    "ServeController": "controller",
}


def processes(pid: int) -> dict[int, str]:
    """Name the role of a process and all below it; ffmpeg belongs to whoever started it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found, below = {}, [pid]
    while below:
        for process in below:
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
                found[process] = next((role for part, role in ROLES.items() if part in title), "Ray's others")
        below = [p for p, parent in parents.items() if parent in below]
    return found


def memory(pid: int) -> dict[str, float]:
    """Private MB of each role's processes."""
    sizes: Counter[str] = Counter()
    for process, role in processes(pid).items():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            sizes[role] += sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3
    return dict(sizes)


def cpu(pid: int) -> dict[str, float]:
    """CPU seconds of each role's processes, those of their children that ended among them."""
    used: Counter[str] = Counter()
    for process, role in processes(pid).items():
        with contextlib.suppress(OSError):
            ticks = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:15]
            used[role] += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return dict(used)


class Growth:
    """Sample memory beside the number of requests done, while a load runs."""

    def __init__(self, pid: int, done: Callable[[], int]) -> None:
        self._pid, self._done = pid, done
        self.samples: list[tuple[int, dict[str, float]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(4):
            self.samples.append((self._done(), memory(self._pid)))

    def result(self) -> dict[str, dict[str, float]]:
        """First and last MB of each role, and MB a thousand requests over the second half (least squares)."""
        self._stop.set()
        self._thread.join()
        half = self.samples[len(self.samples) // 2 :]
        found = {}
        for role in self.samples[0][1] if len(half) > 2 else ():
            sizes = [s.get(role, 0.0) for _, s in half]
            slope = np.polyfit([n for n, _ in half], sizes, 1)[0]
            first, last = (self.samples[i][1].get(role, 0.0) for i in (0, -1))
            found[role] = {"mb": [round(first), round(last)], "mb_per_1000": round(1000 * slope, 1)}
        return found


def load(url: str, files: list[Path], clients: int, seconds: float, pid: int = 0) -> dict:
    """Ask with so many clients for so long; with the service's process tell its memory, too."""
    statuses: Counter[str] = Counter()
    latencies: list[float] = []
    contents = [f.read_bytes() for f in files]
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=url, timeout=120) as session:
            while time.monotonic() < end:
                started = time.monotonic()
                try:
                    answer = session.post(
                        "/v1/separations", files={"file": rng.choice(contents)}, headers={"Prefer": "wait=60"}
                    )
                    statuses[str(answer.status_code)] += 1
                    if answer.status_code in (429, 503):
                        time.sleep(int(answer.headers["Retry-After"]) * rng.uniform(0.5, 1.5))
                        continue
                    if answer.status_code == 201:
                        latencies.append(time.monotonic() - started)
                        session.delete(answer.headers["Location"])
                except httpx.HTTPError as error:
                    statuses[type(error).__name__] += 1

    growth = Growth(pid, lambda: len(latencies)) if pid else None
    started = time.monotonic()
    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - started
    p50, p95 = np.percentile(latencies, (50, 95)) if latencies else (float("nan"),) * 2
    return {
        "clients": clients,
        "clips": len(latencies),
        "clips_a_minute": round(60 * len(latencies) / took, 1),
        "p50_s": round(p50, 2),
        "p95_s": round(p95, 2),
        "answers": dict(statuses),
        **({"memory": growth.result()} if growth else {}),
    }


def main() -> None:
    """Run the benchmark and print a line of JSON a measurement."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--clips", type=Path, required=True, help="folder of videos")
    p.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    p.add_argument("--seconds", type=float, default=120)
    p.add_argument("--rounds", type=int, default=2, help="of service and plain function, in turns")
    arguments = p.parse_args()
    files = sorted(f for f in arguments.clips.iterdir() if f.is_file())[:20]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    replicas = len(os.sched_getaffinity(0))
    service = subprocess.Popen(
        [sys.executable, "-m", "pipelines.serve", "--model", arguments.model, "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/healthz").status_code == 200:
                    break
            if service.poll() is not None:
                raise SystemExit(f"the service ended with {service.returncode} before it was ready; try it by hand")
            time.sleep(1)
        else:
            raise SystemExit("the service isn't ready after five minutes")
        load(url, files, replicas, 10)  # warm
        for _ in range(arguments.rounds):
            with ProcessPoolExecutor(replicas) as pool:
                names = [str(f) for f in files]
                jobs = [
                    pool.submit(plain, arguments.model, names[n:] + names[:n], arguments.seconds)
                    for n in range(replicas)
                ]
                done = [j.result() for j in jobs]
            rate = sum(60 * count / took for count, took, _ in done)
            work = sum(used for *_, used in done) / sum(count for count, *_ in done)
            row = {
                "plain function, processes": replicas,
                "clips_a_minute": round(rate, 1),
                "cpu_s_a_clip": round(work, 4),
            }
            print(json.dumps(row), flush=True)
            for clients in arguments.clients:
                before = cpu(service.pid)
                found = load(url, files, clients, arguments.seconds, service.pid)
                used = {k: v - before.get(k, 0.0) for k, v in cpu(service.pid).items()}
                clips = max(1, found["clips"])
                found["cpu_s_a_clip"] = {k: round(v / clips, 4) for k, v in used.items()}
                found["overhead_in_cpu"] = round(sum(used.values()) / clips / work - 1, 3)
                found["rate_of_plain"] = round(found["clips_a_minute"] / rate, 3)
                print(json.dumps(found), flush=True)
    finally:
        service.terminate()
        service.wait(60)


if __name__ == "__main__":
    main()
