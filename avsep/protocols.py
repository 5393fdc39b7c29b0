"""What is measured of a table's clips: the clips themselves, or what the published protocols make of them.

`pairs` mixes two clips in which one object is alone, `denoising` adds noise to one, `absent` asks of a clip for one
object more, which isn't there. Pairs are drawn once, the same every time, and their list can be kept and read back.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from avsep import media, storage
from avsep.evaluation import Cases
from avsep.fetching import is_remote, open_store, several_of
from avsep.records import ClipError, Reason, Segment

PAIRS_FILE = "pairs.csv"
MOST_PAIRS = 200
TITLES = {  # of what is measured
    "mixtures": "clip{s}",
    "pairs": "pair{s} of single-source clips",
    "denoising": "single-source clip{s} in noise",
    "absent": "clip{s} with an absent object asked for",
}
_COLUMNS = ["one", "other"]


def draw_pairs(singles: Sequence[tuple[Segment, str]], most: int = MOST_PAIRS) -> tuple[Cases, int]:
    """Pair clips in which different objects are alone; return the pairs, of many always the same, and how many."""
    pairs = [(a, b) for (a, x), (b, y) in itertools.combinations(singles, 2) if x != y]
    chosen: Sequence[int] = range(len(pairs))
    if len(pairs) > most:
        chosen = sorted(np.random.default_rng(0).choice(len(pairs), most, replace=False))
    return [pairs[i] for i in chosen], len(pairs)


def pairs_table(pairs: Cases) -> str:
    """Write pairs of clips as CSV, by their ids."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([_COLUMNS, *([s.segment_id for s in pair] for pair in pairs)])
    return text.getvalue()


def read_pairs(uri: str, segments: Sequence[Segment]) -> Cases:
    """Read what `pairs_table` wrote. Raises ValueError for another file, or a clip that the segments lack; OSError."""
    by_id = {s.segment_id: s for s in segments}
    try:
        rows = list(csv.reader(storage.read_bytes(uri).decode("utf-8-sig").splitlines(), strict=True))
    except (csv.Error, UnicodeError) as error:
        raise ValueError(f"{uri} is no list of pairs ({error}); give a {PAIRS_FILE} of pipelines.evaluate") from None
    if not rows or rows[0] != _COLUMNS or any(len(row) not in (0, 2) for row in rows):
        raise ValueError(f"{uri} is no list of pairs, with the columns {' and '.join(_COLUMNS)}")
    pairs = [tuple(row) for row in rows[1:] if row]
    for pair in pairs:
        if not set(pair) <= by_id.keys() or pair[0] == pair[1]:
            raise ValueError(f"{uri}: {' and '.join(pair)} are not two clips of the split that can be measured")
    return [tuple(by_id[i] for i in pair) for pair in pairs]


def heard_in(segments: Sequence[Segment], names: Sequence[str]) -> tuple[str, ...]:
    """Return the objects that clips of a table are known to hold, in the order of `names`; where none is, `names`."""
    there = {name for s in segments for name in s.objects or ()}
    return tuple(name for name in names if name in there) or tuple(names)


def describe(reasons: Counter[str]) -> str:
    """Say why so many clips can't be had.

    >>> describe(Counter(["past_end", "missing", "past_end"]))
    'past_end 2, missing 1'
    """
    return ", ".join(f"{reason} {n}" for reason, n in reasons.most_common())


def located(
    segments: Sequence[Segment], folder: str | None, everything: Sequence[Segment]
) -> tuple[list[Segment], Counter[str]]:
    """Return segments as they are in a media store, and why others are not there, counted; nothing is fetched.

    `everything` is the whole table (`fetching.several_of`). Raises ValueError where the store is needed and not given,
    or holds none of them.
    """
    if not folder and (remote := sum(map(is_remote, segments))):
        raise ValueError(f"{remote} segments are remote; say with --media where pipelines.extract found their media")
    store = open_store(folder, segments, several_of(everything)) if folder else None
    if store is None:
        return list(segments), Counter()
    found, lacking = [], Counter[str]()
    for segment in segments:
        try:
            here = store.locate(segment)
            with storage.local_file(here.source) as path:
                end_s = media.or_inf(media.probe(path).duration_s) if here is not segment else math.inf
            if end_s <= here.start_s:
                raise ClipError(Reason.PAST_END, f"nothing follows {here.start_s:g} s")
            found.append(here)
        except ClipError as error:
            lacking[error.reason] += 1
    if not found:
        raise ValueError(f"none of the {len(segments)} clips is in {folder}: {describe(lacking)}")
    return found, lacking
