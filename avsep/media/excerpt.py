"""An excerpt as ffmpeg's filters give it: samples and pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.limits import DecodeLimits
from avsep.media.ffmpeg import CHUNK_BYTES, FFmpeg, Header, Listening, input_of
from avsep.records import ClipError, Reason

LEAD_S = 1.0  # decoded before an excerpt: decoders need a run-up after a seek …
UNINDEXED_LEAD_S = 12.0  # … and key frames may be this far apart
_WIDEST = 3  # times the short side: of pictures wider or higher than that the middle is kept
_PPM, _PPM_HEADER_BYTES = re.compile(rb"P6\n(\d+) (\d+)\n255\n"), 32


def says_empty(process: FFmpeg, n_bytes: int) -> bool:
    """Tell whether a WAV gave nothing because its header was written before its samples: RF64, to a pipe."""
    endless = process.listening is None or process.listening.endless
    return not n_bytes and not endless and process.header.format == "wav"


def open_excerpt(
    path: Path,
    header: Header,
    start_s: float,
    length_s: float,
    sample_rate: int,
    image_size: int,
    limits: DecodeLimits,
    look: Callable[[Header], None] = lambda header: None,
    listening: Listening = Listening(),
) -> FFmpeg:
    """Start decoding: output 0 is float32 samples, output 1 PPM pictures, if there; `look` is shown the header.

    The first picture is the one shown at the start; those at 0.5, 1.5, … s follow. Samples that are
    timed are pairs of float64: sample, and seconds after the excerpt's start.
    """
    info = header.info
    source, lead_s = seek(path, header, start_s, limits, listening)
    outputs = []
    if info.has_audio:
        filters = sound_filters(listening, lead_s, length_s, sample_rate)
        coding = "f64le" if listening.timed else "f32le"
        outputs.append(source[f"a:{listening.track - 1}"].output("pipe:1", format=coding, af=filters))
    if info.has_video:
        # What is shown at the start comes at 0 s, what is shown after n + 0.5 s at n + 1 s.
        start = round(lead_s * 1e6)
        short, long = image_size, _WIDEST * image_size
        video = [
            "settb=1/1000000",
            f"setpts='PTS-{start}+500000*gt(PTS,{start})'",
            "fps=1:start_time=0:round=up",
            f"trim=end_frame={n_images(length_s)}",
            "setpts=N",
            f"scale='if(gt(dar,1),round({short}*dar),{short})':'if(gt(dar,1),{short},round({short}/dar))'"
            ":flags=bicubic+accurate_rnd+full_chroma_int",
            "format=rgb24",
            f"crop='min(iw,{long})':'min(ih,{long})'",
        ]
        outputs.append(source["V:0"].output("pipe:side", format="image2pipe", vcodec="ppm", r=1, vf=",".join(video)))
    return FFmpeg(outputs, path, limits, look, None if not info.has_audio else listening)


def seek(
    path: Path, header: Header, start_s: float, limits: DecodeLimits, listening: Listening = Listening()
) -> tuple[Any, float]:
    """Open a file shortly before an excerpt → (ffmpeg's input, where the excerpt starts on its clock, in s)."""
    seek_s = max(0.0, start_s - (LEAD_S if header.indexed else UNINDEXED_LEAD_S))
    options: dict[str, Any] = {"ss": f"{seek_s:.6f}", "noaccurate_seek": None} if seek_s else {}
    if header.info.has_video:
        options["max_pixels:v"] = limits.max_pixels
        options["reinit_filter:v"] = 0  # scale copes with a change of size; fps would start over
    if listening.endless:
        options["ignore_length"] = 1
    return input_of(path, limits, listening.link, **options), header.zero_s + start_s - seek_s


def sound_filters(
    listening: Listening,
    lead_s: float,
    length_s: float,
    sample_rate: int,
    samples: str = "flt",
    layouts: str = "mono",
) -> str:
    """Return ffmpeg's filters for what follows `lead_s` on its clock: `samples` is their format.

    `layouts` counts where the listening takes no layout of its own.
    """
    bounded = math.isfinite(length_s)
    # atrim before aresample: the latter lets a start up to 1 ms early pass, and fills gaps of any length
    filters = [f"atrim=start={lead_s:.6f}" + (f":end={lead_s + length_s + 0.1:.6f}" if bounded else "")]
    if listening.mix and not listening.layout:
        filters.append(f"aeval='{listening.mix}':c=mono")
    placed = "" if listening.timed else f":async=1:first_pts={round(lead_s * sample_rate)}"
    filters.append(f"aresample={sample_rate}{placed}:rematrix_maxval=1")
    layouts = listening.layout or layouts
    wanted = "" if " " in layouts else f":channel_layouts={layouts}"  # "3 channels" have no layout to convert to
    filters.append(f"aformat=sample_fmts={samples}{wanted}:sample_rates={sample_rate}")
    if listening.timed:  # a change makes the filters anew: what counts from the start would start again
        values = "|".join(f"val({c})" for c in range(listening.n_channels))
        filters.append(f"aeval='{values}|t-{lead_s:.6f}':c={(2 << listening.n_channels) - 1:#x}")
    elif bounded:
        filters.append(f"atrim=end_sample={round(length_s * sample_rate)}")
    return ",".join(filters)


def read_excerpt(
    process: FFmpeg, length_s: float, sample_rate: int, image_size: int, timeout_s: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Read an excerpt's waveform `(S,)` and images; TOO_LARGE for more of them than its length allows."""
    image_bytes = 3 * _WIDEST * image_size**2 + _PPM_HEADER_BYTES
    outputs = (bytearray(), bytearray())
    bounds = (4 * round(length_s * sample_rate), image_bytes * n_images(length_s))
    timed = process.listening is not None and process.listening.timed
    placing = _Placing(sample_rate) if timed else None
    for number, data in process.pieces(timeout_s):
        if placing is not None and number == 0:
            for piece in placing(data):
                outputs[0].extend(piece[: bounds[0] - len(outputs[0])])
                if len(outputs[0]) == bounds[0]:
                    break
        else:
            outputs[number].extend(data)
        if len(outputs[number]) > bounds[number]:
            raise ClipError(Reason.TOO_LARGE, f"more output than {length_s:g} s can give")
    waveform = np.frombuffer(outputs[0], "<f4", len(outputs[0]) // 4)
    images = _images(outputs[1])
    return waveform, images[1:] if len(images) > 1 else images


def _images(stream: bytearray) -> NDArray[np.uint8]:
    """Read PPM pictures, `(n, height, width, 3)`, up to one of another size or that isn't whole."""
    header = _PPM.match(stream)
    if header is None:
        return np.zeros((0, 0, 0, 3), np.uint8)
    width, height = int(header[1]), int(header[2])
    n_bytes = header.end() + 3 * width * height
    rows = np.frombuffer(stream, np.uint8, len(stream) // n_bytes * n_bytes).reshape(-1, n_bytes)
    same = [bytes(row[: header.end()]) == header[0] for row in rows]
    rows = rows[: same.index(False)] if False in same else rows
    return np.ascontiguousarray(rows[:, header.end() :]).reshape(-1, height, width, 3)


def samples_of(process: FFmpeg, sample_rate: int, timeout_s: float) -> Iterator[bytes]:
    """Give an excerpt's float32 samples as they come; TIMEOUT where none come for that long."""
    timed = process.listening is not None and process.listening.timed
    placing = _Placing(sample_rate, process.listening.n_channels) if timed and process.listening else None
    for _, data in process.pieces(timeout_s, renewed=True):
        if placing is None:
            yield data
        else:
            yield from placing(data)


class _Placing:
    """Put timed samples, of all channels at a time, one after the other, and silence where times leave a gap.

    Times that go back or drift are not believed: formats without timestamps count them by a rate that
    holds no longer.
    """

    def __init__(self, sample_rate: int, n_channels: int = 1) -> None:
        self._rate, self._n_channels = sample_rate, n_channels
        self._next_s: float | None = None  # where the samples that have come end
        self._rest = b""

    def __call__(self, data: bytes) -> Iterator[bytes]:
        """Take rows of float64, the channels' samples and their time in s; give float32 samples."""
        data = self._rest + data
        width = 8 * (self._n_channels + 1)
        whole = len(data) // width * width
        self._rest = data[whole:]
        rows = np.frombuffer(data[:whole], "<f8").reshape(-1, self._n_channels + 1)
        samples, times = rows[:, :-1], rows[:, -1]
        jumps = np.flatnonzero(np.abs(np.diff(times) * self._rate - 1) > 0.5) + 1
        for run in np.split(np.arange(len(samples)), jumps):
            if len(run):
                yield from self._silence(times[run[0]])
                yield samples[run].astype("<f4").tobytes()
                self._next_s = times[run[-1]] + 1 / self._rate

    def _silence(self, time_s: float) -> Iterator[bytes]:
        least_s = 0.001 if self._next_s is None else 0.1  # as where nothing changes
        gap_s = time_s - (self._next_s or 0.0)
        if gap_s >= least_s:
            missing = round(gap_s * self._rate)
            for start in range(0, missing, CHUNK_BYTES):
                yield bytes(4 * self._n_channels * min(CHUNK_BYTES, missing - start))


def n_images(length_s: float) -> int:
    """Count those at the start, at 0.5, 1.5, … s."""
    return 1 + max(0, math.ceil(length_s - 0.5))
