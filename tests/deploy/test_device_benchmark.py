"""The device benchmark, as a program: on the CPU where there is no GPU."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 480  # in which it promises to be done


def benchmark(out: Path, *arguments: str) -> dict[str, Any]:
    """Run it; return what it wrote."""
    command = [sys.executable, "-m", "tests.benchmarks.device", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for stage, told in found["stages"].items():  # all is printed, too
        assert f"\n{stage} (" in done.stdout and told["reason"] in done.stdout
        assert all(figure["what"] in done.stdout for figure in told["figures"])
    return found


def test_a_stage_out_of_time_leaves_the_others_their_figures(tmp_path):
    limits = ["--limit", "machine=0.01", "--limit", "nmf=200"]
    found = benchmark(tmp_path / "f.json", "--device", "cpu", "--stages", "machine", "nmf", *limits)
    late, nmf = (found["stages"][stage] for stage in ("machine", "nmf"))
    assert not late["figures"] and late["reason"].startswith("it took longer than its 0.01 s")
    assert not nmf["reason"] and len(nmf["figures"]) >= 3


def test_a_limit_of_no_stage_is_told(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.device", "--limit", "nfm=30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "'nfm=30': give STAGE=SECONDS, of the stages machine, nmf," in done.stderr


@pytest.mark.slow
def test_every_stage_reports_a_figure_beside_the_plain_way_or_a_reason(tmp_path):
    found = benchmark(tmp_path / "figures.json")
    assert set(found) == {"device", "took_s", "stages"}
    stages = found["stages"]
    assert list(stages) == ["machine", "nmf", "labeller", "training", "separation", "service", "queue"]
    assert sum(told["limit_s"] + 6 for told in stages.values()) <= SECONDS
    for stage, told in stages.items():
        assert set(told) == {"figures", "reason", "took_s", "limit_s"}
        if stage == "queue" and found["device"] == "cpu":
            assert told["reason"] and not told["figures"]
            continue
        slow = told["reason"].startswith("it took longer")  # on a busy machine; what it had is kept
        assert slow or (not told["reason"] and told["figures"]), (stage, told["reason"])
        assert slow or stage == "machine" or any(figure["beside"] for figure in told["figures"])
        for figure in told["figures"]:
            assert figure["what"] and figure["unit"]
            assert math.isfinite(figure["value"]) and figure["value"] > 0
            for other in figure["beside"].values():
                assert other["ratio"] == pytest.approx(figure["value"] / other["value"])
