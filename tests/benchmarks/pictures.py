"""What labels from pictures find, and what looking costs: one look at the middle of each picture beside tiles.

python -m tests.benchmarks.pictures --segments clips.csv     # its labels say what is shown

For each network and way of looking: the share of the shown objects among the labels, by how many are shown; false
labels per clip; clips without any; CPU seconds per clip.
"""

import argparse
import time
from collections import defaultdict

import numpy as np

from avsep import media, storage
from avsep.factors import ExtractionConfig
from avsep.model import Labelling, label_config
from avsep.objects import AUDIOSET_23, OBJECT_NAMES
from avsep.records import read_segments
from avsep.vision import ImageLabeller


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--segments", required=True, help="a table whose labels are what is shown")
    p.add_argument("--labellers", nargs="+", default=["efficientnet_lite0", "efficientnet_lite2"], metavar="NAME")
    p.add_argument("--clips", type=int, default=100, help="at most")
    arguments = p.parse_args()
    segments = [s for s in read_segments(arguments.segments) if s.labels][: arguments.clips]
    clips = []
    for s in segments:
        with storage.local_file(s.source) as path:
            images = media.decode(path, s.start_s, s.end_s, image_size=ExtractionConfig.image_size, sound=False).images
        clips.append((set(s.labels or ()), images))
    for name in arguments.labellers:
        labeller = ImageLabeller.load(name)
        for way in ("centre", "tiles"):
            config = Labelling(label_config(name, way), AUDIOSET_23)
            found: dict[int, list[bool]] = defaultdict(list)
            false, empty, began = 0, 0, time.process_time()
            for shown, images in clips:
                marks = config.choose(config.scores(labeller.evidence(images, way)))
                labels = {OBJECT_NAMES[i] for i in marks.nonzero().flatten().tolist()}
                found[len(shown)] += [o in labels for o in shown]
                false += len(labels - shown)
                empty += not labels
            seconds = (time.process_time() - began) / len(clips)
            recall = ", ".join(f"{n} shown: {np.mean(hits):.2f} of {len(hits)}" for n, hits in sorted(found.items()))
            print(f"{name}, {way}: {recall}; false {false / len(clips):.2f} per clip, none in {empty}; {seconds:.2f} s")


if __name__ == "__main__":
    main()
