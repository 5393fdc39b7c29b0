"""What the benchmarks share: sides measured in turns, a table with ratios, JSON."""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Sides = Mapping[str, Callable[[], Any]]


def parser(what: str) -> argparse.ArgumentParser:
    """Return the arguments that every benchmark takes."""
    p = argparse.ArgumentParser(description=what)
    p.add_argument("--rounds", type=int, default=5, help="turns each side takes; the best one counts")
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many run at the same time")
    p.add_argument("--json", default="", help="file to write the figures to")
    return p


def compare(make: Callable[[], Sides], rounds: int, processes: int = 1) -> dict[str, float]:
    """Time each side that `make` returns, in turns, and return its best seconds.

    With several processes each makes its own sides and all run the same side at once; the
    slowest process counts. `make` is sent to them, so it must be importable.
    """
    if processes == 1:
        return _best(_turns(make, rounds, lambda: None))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_worker, args=(make, rounds, barrier, results)) for _ in range(processes)]
    for w in workers:
        w.start()
    times = [results.get(timeout=3600) for _ in workers]
    for w in workers:
        w.join()
    return _best({side: [max(t) for t in zip(*(one[side] for one in times), strict=True)] for side in times[0]})


def _worker(make: Callable[[], Sides], rounds: int, barrier: Any, results: Any) -> None:
    results.put(_turns(make, rounds, barrier.wait))


def _turns(make: Callable[[], Sides], rounds: int, together: Callable[[], Any]) -> dict[str, list[float]]:
    import torch

    torch.set_num_threads(1)
    sides = make()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, run in sides.items():
            together()
            started = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[side].append(time.perf_counter() - started)
    return times


def _best(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {side: min(t) for side, t in times.items()}


def seconds(run: Callable[[], Any]) -> float:
    """Time one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def table(title: str, ours: str, times: Mapping[str, float], notes: Mapping[str, str] | None = None) -> None:
    """Print each side's seconds, and how many times as fast `ours` is."""
    print(f"\n{title}")
    for side, t in sorted(times.items(), key=lambda item: item[1]):
        ratio = "" if side == ours else f"{ours} is {t / times[ours]:5.2f} times as fast"
        print(f"  {side:<32} {t:9.4f} s  {ratio}  {(notes or {}).get(side, '')}".rstrip(), flush=True)


def write(path: str, figures: Mapping[str, Any]) -> None:
    """Write the figures, with what they were measured on."""
    if not path:
        return
    import torch

    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def growth(title: str, points: Mapping[float, float]) -> float:
    """Print seconds against size; return the exponent p of the best fit `seconds ∝ size^p`."""
    import numpy as np

    print(f"\n{title}")
    for size, t in points.items():
        print(f"  {size:>10g} {t:10.4f} s")
    exponent = float("nan")
    if len(points) > 1:
        exponent = float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])
        print(f"  seconds grow as size to the power {exponent:.2f}")
    return exponent
