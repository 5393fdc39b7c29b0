"""What is done where when Ray offers GPUs: here a logical one, on a machine that has none."""

from concurrent.futures import Future

import numpy as np
import pytest

from avsep import records, shards, stages
from avsep.factors import ExtractionConfig, factorize, factorize_clips
from pipelines import extract, shardtasks


def clip(seconds: float, seed: int) -> np.ndarray:
    t = np.arange(int(48_000 * seconds)) / 48_000
    return (0.1 * np.sin(2 * np.pi * 220 * (seed + 1) * t)).astype(np.float32)


def test_clips_factorised_together_are_those_factorised_alone():
    """In any batch, with clips of other lengths: the same factors up to rounding."""
    config = ExtractionConfig(n_bases=4, n_iter=20)
    waveforms = [clip(1.0, 0), clip(0.7, 1), clip(1.0, 2)]
    together = factorize_clips(waveforms, [5, 6, 7], config, "cpu")
    for waveform, seed, factors in zip(waveforms, (5, 6, 7), together, strict=True):
        alone = factorize(waveform, seed, config)
        np.testing.assert_allclose(factors.W, alone.W, atol=1e-3)
        assert factors.H.shape == alone.H.shape
        assert factors.kl_divergence == pytest.approx(alone.kl_divergence, rel=1e-3)
    assert factorize_clips([], [], config, "cpu") == []


def test_records_are_the_same_wherever_clips_are_factorised(rendered):
    segments = records.read_segments(str(rendered / "segments.csv"))[:3]
    config = ExtractionConfig(n_iter=10)

    def later(waveforms, seeds, how) -> Future:
        future: Future = Future()
        future.set_result(stages.DeviceStages(None, "cpu").factorize(waveforms, seeds, how))
        return future

    here, _, _ = stages.extract_records(segments, config, None)
    there, _, seconds = stages.extract_records(segments, config, None, None, later)
    assert seconds["factorize"] > 0
    for a, b in zip(here, there, strict=True):
        np.testing.assert_allclose(a.bases.astype(float), b.bases.astype(float), atol=2e-3)
        assert a.segment_id == b.segment_id


@pytest.mark.slow
def test_one_gpu_serves_the_stages_of_every_task(rendered, tmp_path, monkeypatch):
    """Two actors share it, tasks claim the part of a CPU that they need, and the shards are as ever."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    import ray

    from pipelines import runners

    claims = []
    options = ["--segments", str(rendered / "segments.csv"), "--out"]
    assert extract.main([*options, str(tmp_path / "here"), "--in-process"]) == 0
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        kept = runners.OnRay.actors

        def actors(self, make, count, *, gpus):
            claims.append((count, gpus))
            made = kept(self, make, count, gpus=gpus)
            asked = stages.DeviceStages.factorize, [clip(1.0, 0)], [1], ExtractionConfig(n_iter=9)
            found = [c(*asked).result() for c in made]
            assert all(len(f) == 1 for f in found)
            assert ray.available_resources().get("GPU", 0) == 0  # both together take the whole of it
            return made

        monkeypatch.setattr(runners.OnRay, "actors", actors)
        monkeypatch.setattr(runners.OnRay, "n_gpus", 1)  # which has no CUDA: a CPU takes its place
        assert extract.main([*options, str(tmp_path / "there")]) == 0
    finally:
        ray.shutdown()
    assert claims == [(2, 0.5)]
    assert shards.read_ids(str(tmp_path / "here")) == shards.read_ids(str(tmp_path / "there"))
    mine, theirs = ({r.segment_id: r for r in shards.read_clips(str(tmp_path / o))} for o in ("here", "there"))
    for segment_id, record in mine.items():
        np.testing.assert_allclose(record.bases.astype(float), theirs[segment_id].bases.astype(float), atol=2e-3)


def test_tasks_claim_what_their_cpu_does():
    assert shardtasks.busy_share({}) == 1.0  # nothing measured yet
    assert shardtasks.busy_share({"decode": 1.0, "factorize": 0.0, "label": 0.0}) == 1.0
    assert shardtasks.busy_share({"decode": 3.0, "factorize": 2.0}) == 0.75
    assert shardtasks.busy_share({"fetch": 1.0, "decode": 1.0, "label": 2.0}) == 0.5
