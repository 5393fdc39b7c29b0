"""What docstrings promise of any input, tried with inputs that hypothesis makes."""

import csv
import io
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avsep import manifest, tables
from avsep.fetching import TokenBucket
from avsep.records import Segment
from avsep.separation import Separator, ratio_masks, separate
from avsep.shards import plan
from avsep.stft import STFT
from tests.support.tones import model

SMALL = STFT(sample_rate=1000, n_fft=16, hop_length=4)


@st.composite
def magnitudes(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A waveform `(S,)`, and magnitudes of sources `(J, F, N)` at its STFT, from nothing to the largest there are."""
    n_sources, n_samples = draw(st.integers(1, 4)), draw(st.integers(8, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (n_sources, SMALL.n_bins, SMALL.n_frames(n_samples))
    levels = 10.0 ** rng.integers(-38, 38, shape) * (rng.random(shape) < draw(st.floats(0, 1)))
    return torch.from_numpy(rng.standard_normal(n_samples)).float(), torch.from_numpy(levels).float()


@settings(max_examples=20)
@given(magnitudes(), st.floats(0.1, 50))
def test_ratio_masks_sum_to_one_and_estimates_to_the_mixture(drawn: tuple[torch.Tensor, torch.Tensor], power: float):
    waveform, levels = drawn
    masks = ratio_masks(levels, power)
    assert (masks >= 0).all() and (masks <= 1).all()
    torch.testing.assert_close(masks.sum(0), torch.ones_like(masks[0]))
    torch.testing.assert_close(separate(waveform, masks, SMALL).sum(0), waveform, atol=1e-5, rtol=0)


@settings(max_examples=15)
@given(st.integers(1, 21_000), st.integers(1, 30_000))  # a window has 4000 samples
def test_windows_cover_a_sound_exactly_and_its_parts_add_up(n_samples: int, block: int):
    sound = np.random.default_rng(n_samples).standard_normal(n_samples).astype(np.float32)
    blocks = [sound[i : i + block] for i in range(0, n_samples, block)]
    planned = Separator(model(n_iter=1)).plan(blocks, ["dog"])
    spans = [(start, stop) for start, stop, _ in planned.window_scores]
    assert (spans[0][0], spans[-1][1]) == (0, n_samples)
    assert all(later[0] == earlier[1] - planned.heard.overlap for earlier, later in pairwise(spans))
    assert all(stop - start == planned.heard.length for start, stop in spans[:-1])
    assert spans[-1][1] - spans[-1][0] <= planned.heard.length * 1.5
    np.testing.assert_allclose(np.concatenate(list(planned.render(blocks)), 1).sum(0), sound, atol=1e-4)


@given(st.sets(st.text("abc_", min_size=1)), st.integers(1, 8), st.randoms())
def test_each_segment_is_in_one_shard_whatever_the_order_of_rows(ids: set[str], size: int, chance):
    segments = [Segment(i, f"{i}.mp4") for i in sorted(ids)]
    made = plan(segments, size)
    chance.shuffle(segments)
    assert plan(segments, size) == made
    assert sorted(s.segment_id for shard in made for s in shard.segments) == sorted(ids)
    assert all(len(shard.segments) == size for shard in made[:-1])
    assert len({shard.name for shard in made}) == len(made)


@given(st.floats(1, 10_000), st.floats(1, 10), st.lists(st.floats(0, 3600), max_size=60))
def test_a_bucket_never_gives_more_than_burst_and_rate(per_hour: float, burst: float, pauses_s: list[float]):
    now, taken_s = 0.0, []
    bucket = TokenBucket(per_hour, burst, clock=lambda: now)
    for pause_s in pauses_s:
        now += pause_s
        while bucket.take():
            taken_s.append(now)
    for i, first in enumerate(taken_s):
        for n, last in enumerate(taken_s[i:], 1):
            assert n <= burst + per_hour * (last - first) / 3600 + 1e-6


@given(st.binary(max_size=60) | st.text("a\n\r", max_size=60).map(str.encode), st.integers(1, 70))
def test_each_line_is_in_exactly_one_block(text: bytes, size: int):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines")
        path.write_bytes(text)
        blocks = manifest.line_blocks([str(path)], size)
        parts = [part for block in blocks if (part := manifest.read_lines(block))]
    assert b"".join(parts) == text
    assert all(part.endswith(b"\n") for part in parts[:-1])


# Blanks around a cell mean nothing, a row that starts with # is a comment, one of nothing is none: so no such cells.
CELLS = st.text("ab,;\t|\"' \n#é", max_size=6).filter(lambda cell: cell == cell.strip() and not cell.startswith("#"))
ROWS = st.lists(st.tuples(CELLS, CELLS, CELLS).filter(any), max_size=5)


@given(
    rows=ROWS,
    separator=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),  # with "\r" csv leaves a cell's "\n" unquoted
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_table_that_csv_writes_is_read_back_equal(rows, separator: str, end: str, quoting, encoding: str):
    columns = ("segment_id", "source", "labels")
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting).writerows([columns, *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.csv")
        path.write_bytes(text.getvalue().encode(encoding))
        layout = tables.read_layout(str(path), columns, columns)
        read = [(row.problem, tuple(row.cells.values())) for row in tables.read_rows(layout)]
    assert read == [("", row) for row in rows]
