"""Load on the service beside the same work as a plain function.

python tests/benchmarks/service.py --model out/demo/model --clips out/demo/clips/clips --clients 8 32

Starts the service, asks it with so many clients at once, and calls `VideoSeparator` in a loop in
as many processes as the service has replicas, in turns. Latency counts from the first byte sent to
the result's last one described; a client told 429 or 503 waits as told and asks again. On a machine
that others use too, compare CPU seconds a clip rather than rates.
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


def below(pid: int) -> list[int]:
    """List a process and its descendants."""
    found, parents = [pid], {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    for process in found:
        found += [p for p, parent in parents.items() if parent == process]
    return found


def memory(pid: int) -> dict[str, float]:
    """Resident MB of the service's own processes, by what they do."""
    sizes: Counter[str] = Counter()
    for process in below(pid):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
            for kind in ("ServeReplica:avsep:ingress", "ServeReplica:avsep:separating", "ProxyActor"):
                if kind in title:
                    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
                    sizes[kind.removeprefix("ServeReplica:avsep:")] += pages * 4096 / 1e6
    return dict(sizes)


def cpu(pid: int) -> float:
    """CPU seconds of a process and all below it, of those that ended too."""
    total = 0
    for process in below(pid):
        with contextlib.suppress(OSError):
            total += sum(map(int, Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def load(url: str, files: list[Path], clients: int, seconds: float) -> dict:
    """Ask with so many clients for so long."""
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
            time.sleep(1)
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
                "cpu_s_a_clip": round(work, 2),
            }
            print(json.dumps(row), flush=True)
            for clients in arguments.clients:
                before, used = memory(service.pid), cpu(service.pid)
                found = load(url, files, clients, arguments.seconds)
                after, used = memory(service.pid), cpu(service.pid) - used
                found["cpu_s_a_clip"] = round(used / max(1, found["clips"]), 2)
                found["overhead_in_cpu"] = round(found["cpu_s_a_clip"] / work - 1, 3)
                found["rate_of_plain"] = round(found["clips_a_minute"] / rate, 3)
                found["memory_mb"] = {k: [round(before[k]), round(after[k])] for k in before if k in after}
                print(json.dumps(found), flush=True)
    finally:
        service.terminate()
        service.wait(60)


if __name__ == "__main__":
    main()
