"""What a GPU gains, stage by stage, beside plain torch and torchvision on the same GPU; in eight minutes at most.

On a rented machine: pip install -e . && python -m tests.benchmarks.device --out device.json

Each stage is a process of its own with a time limit. One that fails, hangs or crashes says why and keeps the figures
that it had; the others go on. Weights are random and clips made up: that changes no time. Without a GPU small sizes
run on the CPU, which shows that everything runs and nothing else; `queue`, whose Ray takes longest to start, is then
left out unless it is named.

python -m tests.benchmarks.device --stages nmf labeller --limit nmf=30
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.device_stages import STAGES, Report

ROOT = Path(__file__).parent.parent.parent
LIMITS_S = {"machine": 60, "nmf": 65, "labeller": 75, "training": 75, "separation": 50, "service": 45, "queue": 60}
GRACE_S = 3.0  # for a stage that is told to end


def run_here(stage: str, device: str, path: Path) -> int:
    """Run a stage in this process; its report says how it ended."""
    report = Report(path, device)
    try:
        import torch

        if device == "auto":
            report.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(1)  # as the pipeline's processes have it
        STAGES[stage](report)
    except Exception as error:
        traceback.print_exc()
        report.write(f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


def run(stage: str, device: str, limit_s: float) -> dict[str, Any]:
    """Run a stage in a process of its own; return its figures, and why there are no more."""
    command = [sys.executable, "-m", "tests.benchmarks.device", "--stages", stage, "--device", device]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "report.json"), Path(folder, "log")
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, "--report", str(path)], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
            )
            try:
                status = process.wait(limit_s)
                reason = f"it ended with status {status}" if status else ""
                reason = f"it was ended by {signal.Signals(-status).name}" if status < 0 else reason
            except subprocess.TimeoutExpired:
                reason = f"it took longer than its {limit_s:g} s"
            finally:
                end(process)
        found = json.loads(path.read_text()) if path.exists() else {"figures": [], "reason": ""}
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
    if reason:
        found["reason"] = found["reason"] or "; ".join([reason, *last])[:300]
    return {**found, "took_s": round(time.monotonic() - started, 1), "limit_s": limit_s}


def end(process: subprocess.Popen) -> None:
    """End a stage and what it started, first so that it can tidy up; one that hangs in a driver is left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def lines_of(stage: str, found: Mapping[str, Any]) -> list[str]:
    """Put a stage's figures into words."""
    lines = [f"\n{stage} ({found['took_s']:.0f} s)"]
    for figure in found["figures"]:
        lines.append(f"  {figure['what']}: {figure['value']:.4g} {figure['unit']}")
        lines += [f"    {x['ratio']:.2f} times {name} ({x['value']:.4g})" for name, x in figure["beside"].items()]
        more = {k: v for k, v in figure.items() if k not in ("what", "unit", "value", "beside")}
        lines += [f"    {k}: {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in more.items()]
    return [*lines, *([f"  no more figures: {found['reason']}"] if found["reason"] else [])]


def limit(text: str) -> tuple[str, float]:
    """Take STAGE=SECONDS."""
    stage, _, seconds = text.partition("=")
    if stage not in STAGES or not re.fullmatch(r"\d+(\.\d+)?", seconds):
        raise argparse.ArgumentTypeError(f"{text!r}: give STAGE=SECONDS, of the stages {', '.join(STAGES)}")
    return stage, float(seconds)


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", nargs="+", choices=STAGES, help="only these")
    p.add_argument("--limit", type=limit, action="append", default=[], metavar="STAGE=SECONDS", help="not its own")
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: as `machine` finds")
    p.add_argument("--out", type=Path, help="JSON file for the figures")
    p.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if arguments.report:
        return run_here(arguments.stages[0], arguments.device, arguments.report)
    limits, device, started = LIMITS_S | dict(arguments.limit), arguments.device, time.monotonic()
    chosen = set(arguments.stages or STAGES) | ({"machine"} if device == "auto" else set())
    found: dict[str, dict[str, Any]] = {}
    for stage in filter(chosen.__contains__, STAGES):
        if stage == "queue" and device == "cpu" and not arguments.stages:
            found[stage] = {"figures": [], "reason": "without a GPU it must be named", "took_s": 0.0, "limit_s": 0.0}
        else:
            found[stage] = run(stage, device, limits[stage])
        print("\n".join(lines_of(stage, found[stage])), flush=True)
        if device == "auto":  # `machine` comes first
            device = "cuda" if any("gpu" in figure for figure in found[stage]["figures"]) else "cpu"
            if device == "cpu":
                print(
                    "\nno GPU was found: small sizes on the CPU, which show that it runs and nothing else", flush=True
                )
        if arguments.out:
            figures = {"device": device, "took_s": round(time.monotonic() - started, 1), "stages": found}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
