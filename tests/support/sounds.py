"""A table of short sounds."""

from pathlib import Path

import numpy as np
import soundfile

RATE = 48_000


def table(folder: Path, n: int, seconds: float = 0.3) -> Path:
    """Write a table of short sounds."""
    folder.mkdir(exist_ok=True)
    lines = ["segment_id,source,labels"]
    for i in range(n):
        rng = np.random.default_rng(i)
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(round(seconds * RATE)), RATE)
        lines.append(f"s{i},{i}.wav,drum")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"
