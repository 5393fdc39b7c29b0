"""Train the separator that people would use instead: a U-Net that learns to separate mixtures of weakly labelled clips.

python -m tests.benchmarks.unet --segments clips/segments.csv --out out/unet --cpu-seconds 900
python -m pipelines.evaluate --model out/run/model --compare unet=out/unet \\
    --segments clips/segments.csv --references clips/references --out out/results

It gets the time that the default's extraction and training take: CPU seconds, reading the clips included. What the
table's `labels` say is all that it learns from.
"""

import argparse
import dataclasses
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from avsep import media, storage
from avsep.learning import mixing
from avsep.records import Segment, read_segments, read_vocabulary
from avsep.unet import UNetConfig, UNetSeparator

_READERS = 2


def main() -> None:
    """Run the command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--segments", required=True, help="a table with labels, or a manifest's folder; its split `train`")
    p.add_argument("--out", required=True, help="folder of config.json and unet.safetensors")
    p.add_argument("--cpu-seconds", type=float, default=900.0, help="what it may take")
    p.add_argument("--minutes", type=float, help="what it may last, on a machine that others use too")
    p.add_argument("--seed", type=int, default=0)
    arguments = p.parse_args()
    began = time.monotonic()
    vocabulary = read_vocabulary(arguments.segments)
    segments = [s for s in read_segments(arguments.segments, print, vocabulary) if s.split == "train"]
    segments = [s for s in segments if s.labels is not None]
    heard = {name for s in segments for name in s.labels or ()}
    config = UNetConfig(tuple(n for n in vocabulary.names if n in heard), vocabulary)
    rate = mixing.halved(config.stft).sample_rate

    def read(segment: Segment) -> mixing.LabelledSound:
        with storage.local_file(segment.source) as path:
            sound = media.decode(path, segment.start_s, segment.end_s, sample_rate=rate, images=False)
        return mixing.LabelledSound.of(sound.waveform, [n in (segment.labels or ()) for n in config.objects])

    with ThreadPoolExecutor(_READERS) as pool:
        sounds = list(pool.map(read, segments))
    print(f"{len(sounds)} clips of {', '.join(config.objects)} read in {cpu_seconds():.0f} CPU-s", flush=True)

    def done(step: int) -> float:
        most = arguments.minutes and (time.monotonic() - began) / 60 / arguments.minutes
        return max(cpu_seconds() / arguments.cpu_seconds, most or 0.0)

    losses: list[tuple[float, float]] = []

    def report(step: int, separated: float, consistent: float) -> None:
        losses.append((separated, consistent))
        if step % 100 == 0:
            both = np.mean(losses[-100:], 0)
            print(f"{cpu_seconds():6.0f} CPU-s, {step:5} batches: losses {both[0]:.4f} {both[1]:.3f}", flush=True)

    network = mixing.train(sounds, config, done, seed=arguments.seed, report=report)
    facts = {"clips": len(sounds), "batches": len(losses), "cpu_seconds": round(cpu_seconds())}
    UNetSeparator(dataclasses.replace(config, training=facts), network).save(arguments.out)
    print(f"{arguments.out}: {facts}")


def cpu_seconds() -> float:
    """Return what this process and those that it waited for have taken of the processors."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
