"""`avsep separate` on a stereo file of 44.1 kHz, as the file is and with --mono, from start to end.

python -m tests.benchmarks.stems
python -m tests.benchmarks.stems --seconds 60 --rounds 3 --json stems.json
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from avsep.synthetic import SceneConfig, render_scene
from tests.benchmarks import measure

RATE = 44_100
SIDES = {"as the file is": [], "--mono": ["--mono"]}
MOST = 2.0  # times mono's seconds and bytes


def write_duet(path: Path, seconds: int) -> Path:
    """A generated duet of two objects that stand apart, over and over, `(seconds, 2)`."""
    scene = render_scene(0, "test", 5, SceneConfig(seconds=10, sample_rate=RATE), 2)
    left, right = (np.resize(np.roll(np.asarray(scene.mix), shift), RATE * seconds) for shift in (0, 30))
    soundfile.write(path, np.stack([left, 0.7 * right], 1), RATE, subtype="PCM_16")
    return path


def once(file: Path, out: Path, *options: str) -> tuple[float, int]:
    """Separate in a process of its own; return the seconds, and the bytes of memory that it held at most."""
    command = [sys.executable, "-m", "avsep.cli", "separate", str(file), "--out", str(out), *options]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    """Run the command."""
    p = measure.parser(__doc__ or "")
    p.set_defaults(rounds=3)
    p.add_argument("--seconds", type=int, default=60, help="of sound")
    p.add_argument("--objects", default="violin,dog")
    arguments = p.parse_args()
    found: dict[str, list[tuple[float, int]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        file = write_duet(Path(folder, "duet.wav"), arguments.seconds)
        for _ in range(arguments.rounds):
            for side, options in SIDES.items():
                found[side].append(once(file, Path(folder, "out"), "--objects", arguments.objects, *options))
    print(f"\navsep separate, {arguments.seconds} s of stereo at {RATE} Hz, {arguments.objects}")
    figures: dict[str, Any] = {}
    for side, turns in found.items():
        seconds, size = min(s for s, _ in turns), min(b for _, b in turns)
        figures[side] = {"seconds": seconds, "bytes": size}
        print(f"  {side:<16} {seconds:7.2f} s  {size / 1e6:6.0f} MB")
    own, mono = (figures[side] for side in SIDES)
    figures["ratio"] = {what: own[what] / mono[what] for what in own}
    print(
        f"  {'ratio':<16} {figures['ratio']['seconds']:7.2f}    {figures['ratio']['bytes']:6.2f}     (at most {MOST:g})"
    )
    measure.write(arguments.json, figures)


if __name__ == "__main__":
    main()
