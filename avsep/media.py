"""The ffmpeg edge: media files in, arrays out, bounded in time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import math
import os
import re
import resource
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.records import Clip, ClipError, Reason

# What a file may be. The rest stays closed: playlists (hls, concat, dash, sdp …) open other files.
_FORMATS = (
    "3gp,aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,dv,eac3,flac,flv,gxf,h264,hevc,ivf,m4a,m4v,matroska,mov,"
    "mp3,mp4,mpc,mpc8,mpeg,mpegts,mxf,nut,ogg,rm,tta,voc,w64,wav,webm,wtv,wv"
)
LOUDEST = 1e10  # of a sample, full scale 1: sums of squares of what is louder overflow
_LEAD_S = 1.0  # decoded before an excerpt: decoders need a run-up after a seek …
_UNINDEXED_LEAD_S = 12.0  # … and key frames may be this far apart
_SLACK_S = 1.0  # media may end this much before their header says
_LOG_BYTES = 1 << 20
_CHUNK_BYTES = _PIPE_BYTES = 1 << 18
_WIDEST = 3  # times the short side: of pictures wider or higher than that the middle is kept
_PPM, _PPM_HEADER_BYTES = re.compile(rb"P6\n(\d+) (\d+)\n255\n"), 32
_MAPPING = re.compile(rb"^\[info\] Stream mapping:", re.MULTILINE)  # follows the description of the input
_NOT_RUN = (126, 127)  # setpriv's statuses when it can't run a program
_NOISE = re.compile(
    "Error opening (in|out)put|Conversion failed|Terminating thread|Task finished|Nothing was written"
    "|Last message repeated"
)
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.PyDLL(None).prctl  # looked up here: the child must not import or take locks


@dataclass(frozen=True)
class MediaInfo:
    """What a file's header says; attached pictures (cover art) are not video."""

    duration_s: float | None  # None when the header doesn't say
    has_audio: bool
    has_video: bool
    sample_rate: int | None  # Hz, of the first audio stream
    width: int | None  # pixels, of the first video stream, before rotation
    height: int | None


@dataclass(frozen=True)
class DecodeLimits:
    """What one call may use before it gives up with a `ClipError`."""

    timeout_s: float = 120.0
    max_duration_s: float = 900.0
    max_pixels: int = 8192 * 4320
    max_memory_bytes: int = 4 << 30  # ffmpeg's address space
    threads: int = 1  # ffmpeg's, a decoder


class _OtherHeader(Exception):
    """A file isn't as was assumed."""

    def __init__(self, header: _Header) -> None:
        super().__init__()
        self.header = header


@dataclass(frozen=True)
class _Header:
    info: MediaInfo
    zero_s: float  # where the media begin on ffmpeg's clock, which starts with the first timestamp
    indexed: bool  # whether seeking finds the key frame before a time


def ffmpeg_executable() -> str:
    """Return the system's ffmpeg, else the one that comes with imageio-ffmpeg."""
    import imageio_ffmpeg

    return shutil.which("ffmpeg") or str(imageio_ffmpeg.get_ffmpeg_exe())


def probe(path: Path, *, timeout_s: float = 30.0) -> MediaInfo:
    """Read a file's header.

    Raises ClipError: MISSING, EMPTY, UNREADABLE, CRASHED_DECODER, TIMEOUT (transient).
    """
    return _probe(path, DecodeLimits(timeout_s=timeout_s)).info


def decode(
    path: Path,
    start_s: float = 0.0,
    end_s: float | None = None,
    *,
    sample_rate: int = 48_000,
    image_size: int = 256,
    limits: DecodeLimits = DecodeLimits(),
    pictures: bool = True,
    sound: bool = True,
) -> Clip:
    """Decode the excerpt `start_s … end_s` (None: the file's end) in one pass of ffmpeg.

    The waveform is mono float32 `(S,)` at `sample_rate` Hz. Channels are downmixed; silence fills
    gaps in the timestamps (from 0.1 s on, at the start from 1 ms on), so that sound and pictures
    stay together; samples that are mono at this rate already come out unchanged. After a seek
    they are placed as exactly as the timestamps are: Matroska rounds these to milliseconds.

    The images are `(n_images, height, width, 3)` RGB uint8: what a player shows 0.5, 1.5, … s into
    the excerpt, upright and whole, the short side resized to `image_size`; of a long side of more
    than three times that the middle is kept. Video too short for that gives its first picture, a
    file without video none. Without `pictures` the video is only looked at where it may outlast
    the sound. Without `sound` a video may have none.

    A file that ends before `end_s` gives a shorter clip. Raises ValueError for times that bound no
    excerpt, and ClipError: MISSING, EMPTY, UNREADABLE, NO_AUDIO, PAST_END, TRUNCATED, TOO_LONG,
    TOO_LARGE, CRASHED_DECODER, TIMEOUT (transient).
    """
    if not (math.isfinite(start_s) and start_s >= 0 and (end_s is None or start_s < end_s)):
        raise ValueError(f"the excerpt is {start_s}…{end_s} s; it must start from 0 up and end after that")
    deadline = time.monotonic() + limits.timeout_s
    end_s = math.inf if end_s is None else end_s
    length_s = min(end_s - start_s, limits.max_duration_s + 1)  # headers may promise too little
    too_long = ClipError(Reason.TOO_LONG, f"more than {limits.max_duration_s:g} s")

    def check(info: MediaInfo) -> None:
        if not info.has_audio and (sound or not info.has_video):
            raise ClipError(Reason.NO_AUDIO, "no audio stream")
        if (info.width or 0) * (info.height or 0) > limits.max_pixels:
            raise ClipError(Reason.TOO_LARGE, f"{info.width}x{info.height}; the limit is {limits.max_pixels} pixels")
        duration_s = math.inf if info.duration_s is None else info.duration_s
        if start_s >= duration_s:
            raise ClipError(Reason.PAST_END, f"starts at {start_s:g} s; the media end at {duration_s:g} s")
        if math.isfinite(min(end_s, duration_s)) and min(end_s, duration_s) - start_s > limits.max_duration_s:
            raise too_long

    # Most files are as assumed here, and save the start of an ffmpeg that only reads the header.
    assumed = _Header(MediaInfo(None, True, pictures, None, None, None), zero_s=0.0, indexed=True)

    def look(header: _Header) -> None:
        check(header.info)
        blind = assumed.info.has_video and not header.info.has_video
        mute = assumed.info.has_audio and not header.info.has_audio
        sought = start_s > _LEAD_S and header.indexed != assumed.indexed
        if blind or mute or sought or header.zero_s != assumed.zero_s:
            raise _OtherHeader(header)

    _check_file(path)
    while True:
        try:
            with _excerpt(path, assumed, start_s, length_s, sample_rate, image_size, limits, look) as excerpt:
                waveform, images = _read(excerpt, length_s, sample_rate, image_size, deadline - time.monotonic())
            break
        except _OtherHeader as other:
            shown = replace(other.header.info, has_video=pictures and other.header.info.has_video)
            assumed = replace(other.header, info=shown)
    info = excerpt.header.info
    promised_s = min(end_s, math.inf if info.duration_s is None else info.duration_s)

    sound_s = len(waveform) / sample_rate
    decoded_s = start_s + max(sound_s, len(images) - 0.5)
    if not pictures and info.has_video and decoded_s < promised_s - _SLACK_S:
        limits = replace(limits, timeout_s=max(0.0, deadline - time.monotonic()))
        return decode(path, start_s, end_s, sample_rate=sample_rate, image_size=image_size, limits=limits)
    nothing = not len(waveform) and not len(images)
    if decoded_s - start_s > limits.max_duration_s + 0.5:  # codecs pad the end
        raise too_long
    if excerpt.too_many_errors or (nothing and excerpt.returncode):
        raise ClipError(Reason.UNREADABLE, excerpt.last_words() or "nothing decodes")
    if decoded_s < promised_s - _SLACK_S < math.inf and not (nothing and start_s == 0):
        raise ClipError(Reason.TRUNCATED, f"ends at {decoded_s:.2f} s, not at {promised_s:.2f} s")
    if nothing and start_s > 0:
        raise ClipError(Reason.PAST_END, f"nothing follows {start_s:g} s")
    if nothing or (sound and not len(waveform)):
        raise ClipError(Reason.EMPTY, excerpt.last_words() or "no samples")
    _check_samples(waveform)
    return Clip(waveform, sample_rate, images)


def iter_audio(
    path: Path, *, sample_rate: int, block: int, limits: DecodeLimits = DecodeLimits()
) -> Iterator[NDArray[np.float32]]:
    """Decode a whole file's audio as `decode` does, `block` samples at a time, the last block shorter.

    Memory stays the same however long the file is: `max_duration_s` doesn't apply, and
    `timeout_s` bounds the wait for each piece. Raises ClipError while iterating: MISSING, EMPTY,
    UNREADABLE, NO_AUDIO, TOO_LARGE, CRASHED_DECODER, TIMEOUT (transient) and, after the last block, TRUNCATED.
    """
    if block < 1:
        raise ValueError(f"block is {block}; it must be a positive number of samples")
    header = _probe_audio(path, limits)
    info = header.info
    sound = replace(header, info=replace(info, has_video=False))
    n_samples, rest = 0, bytearray()
    with _excerpt(path, sound, 0.0, math.inf, sample_rate, 0, limits) as excerpt:
        for _, data in excerpt.pieces(limits.timeout_s, renewed=True):
            rest += data
            while len(rest) >= 4 * block:
                yield _check_samples(np.frombuffer(rest[: 4 * block], "<f4"))
                del rest[: 4 * block]
                n_samples += block
    rest = rest[: len(rest) // 4 * 4]
    if rest:
        yield _check_samples(np.frombuffer(rest, "<f4"))
        n_samples += len(rest) // 4
    if excerpt.too_many_errors or (not n_samples and excerpt.returncode):
        raise ClipError(Reason.UNREADABLE, excerpt.last_words() or "nothing decodes")
    if not n_samples:
        raise ClipError(Reason.EMPTY, excerpt.last_words() or "no samples")
    if info.duration_s is not None and n_samples / sample_rate < info.duration_s - _SLACK_S:
        if info.has_video:  # which may rightly outlast its sound
            late_s = info.duration_s - _SLACK_S
            with _excerpt(path, header, late_s, 0.5, sample_rate, 8, limits) as last:
                _, images = _read(last, 0.5, sample_rate, 8, limits.timeout_s)
        if not info.has_video or not len(images):
            raise ClipError(
                Reason.TRUNCATED, f"ends at {n_samples / sample_rate:.2f} s, not at {info.duration_s:.2f} s"
            )


def _check_samples(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return samples that can be sound; ClipError (UNREADABLE) where damage has made others of them."""
    if len(samples) and not np.abs(samples).max() <= LOUDEST:  # NaN isn't either
        raise ClipError(Reason.UNREADABLE, f"samples that are not finite numbers, or above {LOUDEST:.0e}")
    return samples


def _probe_audio(path: Path, limits: DecodeLimits) -> _Header:
    header = _probe(path, limits)
    if not header.info.has_audio:
        raise ClipError(Reason.NO_AUDIO, "no audio stream")
    return header


def _probe(path: Path, limits: DecodeLimits) -> _Header:
    _check_file(path)
    nowhere = _input(path, limits).output("pipe:1", c="copy", t=0, format="null")
    with _FFmpeg([nowhere], path, limits) as process:
        for _ in process.pieces(limits.timeout_s):
            pass
    return process.header


def _check_file(path: Path) -> None:
    try:
        if path.stat().st_size == 0 and path.is_file():
            raise ClipError(Reason.EMPTY, "no bytes")
    except (FileNotFoundError, NotADirectoryError):
        raise ClipError(Reason.MISSING, f"no file {path.name}") from None
    except OSError as error:
        raise ClipError(Reason.UNREADABLE, str(error.strerror)) from None


def _parse_header(log: str) -> _Header | None:
    """Read ffmpeg's description of its input; None where there is none."""
    text = re.sub(r"^((\[[^]]*\] )*)\[info\] ", r"\1", log, flags=re.MULTILINE).partition("\nOutput #")[0]
    begin = re.search(r"^Input #0, ", text, re.MULTILINE)
    if not begin:
        return None
    text = text[begin.start() :]
    audio: list[str] = []
    video: list[str] = []
    for kind, description in re.findall(r"^ +Stream #0:\d+.*?: (Audio|Video): (.*)$", text, re.MULTILINE):
        if "(attached pic)" not in description:
            (audio if kind == "Audio" else video).append(description)
    clock = re.search(r"^  Duration: (?:(\d+):(\d+):([\d.]+)|N/A)(?:, start: (-?[\d.]+))?", text, re.MULTILINE)
    first_s = float(clock[4]) if clock and clock[4] else 0.0
    duration_s = None
    if clock and clock[1] and "Estimating duration from bitrate" not in log:
        duration_s = 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3])
        if text.startswith("Input #0, matroska"):  # counts from zero, not from the first timestamp
            duration_s -= max(0.0, first_s)
    rate = re.search(r", (\d+) Hz", audio[0]) if audio else None
    size = re.search(r", ([1-9]\d*)x([1-9]\d*)", video[0]) if video else None
    info = MediaInfo(
        duration_s=duration_s,
        has_audio=bool(audio),
        has_video=bool(video),
        sample_rate=int(rate[1]) if rate else None,
        width=int(size[1]) if size else None,
        height=int(size[2]) if size else None,
    )
    # What comes before timestamp zero, a codec's run-up, isn't played.
    return _Header(info, max(0.0, -first_s), indexed=not text.startswith("Input #0, mpeg"))


def _input(path: Path, limits: DecodeLimits, **options: Any) -> Any:
    import ffmpeg  # nobody needs it who has waveforms already

    return ffmpeg.input(
        f"file:{path.absolute()}",
        protocol_whitelist="file",
        format_whitelist=_FORMATS,
        threads=limits.threads,
        **options,
    )


def _excerpt(
    path: Path,
    header: _Header,
    start_s: float,
    length_s: float,
    sample_rate: int,
    image_size: int,
    limits: DecodeLimits,
    look: Callable[[_Header], None] = lambda header: None,
) -> _FFmpeg:
    """Start decoding: output 0 is float32 samples, output 1 PPM pictures, if there; `look` is shown the header.

    The first picture is the one shown at the start; those at 0.5, 1.5, … s follow.
    """
    info = header.info
    seek_s = max(0.0, start_s - (_LEAD_S if header.indexed else _UNINDEXED_LEAD_S))
    options: dict[str, Any] = {"ss": f"{seek_s:.6f}", "noaccurate_seek": None} if seek_s else {}
    if info.has_video:
        options["max_pixels:v"] = limits.max_pixels
        options["reinit_filter:v"] = 0  # scale copes with a change of size; fps would start over
    source = _input(path, limits, **options)
    lead_s = header.zero_s + start_s - seek_s
    bounded = math.isfinite(length_s)
    # atrim before aresample: the latter lets a start up to 1 ms early pass, and fills gaps of any length
    audio = [
        f"atrim=start={lead_s:.6f}" + (f":end={lead_s + length_s + 0.1:.6f}" if bounded else ""),
        f"aresample={sample_rate}:async=1:first_pts={round(lead_s * sample_rate)}:rematrix_maxval=1",
        f"aformat=sample_fmts=flt:channel_layouts=mono:sample_rates={sample_rate}",
        *([f"atrim=end_sample={round(length_s * sample_rate)}"] if bounded else []),
    ]
    outputs = [source["a:0"].output("pipe:1", format="f32le", af=",".join(audio))] if info.has_audio else []
    if info.has_video:
        # What is shown at the start comes at 0 s, what is shown after n + 0.5 s at n + 1 s.
        start = round(lead_s * 1e6)
        short, long = image_size, _WIDEST * image_size
        video = [
            "settb=1/1000000",
            f"setpts='PTS-{start}+500000*gt(PTS,{start})'",
            "fps=1:start_time=0:round=up",
            f"trim=end_frame={_n_pictures(length_s)}",
            "setpts=N",
            f"scale='if(gt(dar,1),round({short}*dar),{short})':'if(gt(dar,1),{short},round({short}/dar))'"
            ":flags=bicubic+accurate_rnd+full_chroma_int",
            "format=rgb24",
            f"crop='min(iw,{long})':'min(ih,{long})'",
        ]
        outputs.append(source["V:0"].output("pipe:side", format="image2pipe", vcodec="ppm", r=1, vf=",".join(video)))
    return _FFmpeg(outputs, path, limits, look)


def _read(
    process: _FFmpeg, length_s: float, sample_rate: int, image_size: int, timeout_s: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    picture_bytes = 3 * _WIDEST * image_size**2 + _PPM_HEADER_BYTES
    outputs = (bytearray(), bytearray())
    bounds = (4 * round(length_s * sample_rate), picture_bytes * _n_pictures(length_s))
    for number, data in process.pieces(timeout_s):
        outputs[number].extend(data)
        if len(outputs[number]) > bounds[number]:
            raise ClipError(Reason.TOO_LARGE, f"more output than {length_s:g} s can give")
    waveform = np.frombuffer(outputs[0], "<f4", len(outputs[0]) // 4)
    pictures = _pictures(outputs[1])
    return waveform, pictures[1:] if len(pictures) > 1 else pictures


def _pictures(stream: bytearray) -> NDArray[np.uint8]:
    """Read PPM pictures of one size, `(n, height, width, 3)`; a last one that isn't whole is left out."""
    header = _PPM.match(stream)
    if header is None:
        return np.zeros((0, 0, 0, 3), np.uint8)
    width, height = int(header[1]), int(header[2])
    n_bytes = header.end() + 3 * width * height
    rows = np.frombuffer(stream, np.uint8, len(stream) // n_bytes * n_bytes).reshape(-1, n_bytes)
    if any(bytes(row[: header.end()]) != header[0] for row in rows):
        raise ClipError(Reason.UNREADABLE, "pictures of more than one size")
    return np.ascontiguousarray(rows[:, header.end() :]).reshape(-1, height, width, 3)


def _n_pictures(length_s: float) -> int:
    """Count those at the start, at 0.5, 1.5, … s."""
    return 1 + max(0, math.ceil(length_s - 0.5))


class _FFmpeg:
    """A supervised ffmpeg, in a process group of its own that ends with the `with` block.

    Its outputs are `pipe:1`, number 0, and `pipe:side`, number 1. As soon as it has described its
    input, `look` is called, which may raise.
    """

    def __init__(
        self,
        outputs: list[Any],
        path: Path,
        limits: DecodeLimits,
        look: Callable[[_Header], None] = lambda header: None,
    ) -> None:
        self.log = ""
        self.returncode = 0
        self._header: _Header | None = None
        self._look = look
        self._path = path
        self._side, side = os.pipe()
        import ffmpeg

        command = ffmpeg.merge_outputs(*outputs).global_args(
            "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info", "-filter_threads", "1"
        )
        try:
            self._process = subprocess.Popen(
                [*_setpriv(), *(a.replace("pipe:side", f"pipe:{side}") for a in command.compile(ffmpeg_executable()))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(side,),
                start_new_session=True,
                preexec_fn=None if _setpriv() else _die_with_parent,
            )
        except BaseException:
            os.close(self._side)
            raise
        finally:
            os.close(side)
        assert self._process.stdout
        with contextlib.suppress(OSError):  # a user's pipes together may be as large as the system says
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limits.max_memory_bytes
        with contextlib.suppress(ProcessLookupError):
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.prlimit(self._process.pid, resource.RLIMIT_AS, (soft, hard))

    def __enter__(self) -> _FFmpeg:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        with self._process:  # closes the pipes and waits
            os.close(self._side)

    def pieces(self, timeout_s: float, *, renewed: bool = False) -> Iterator[tuple[int, bytes]]:
        """Give the outputs as they come, as (number, data), until ffmpeg ends and `log` is complete.

        `renewed` starts the time anew after each piece. Raises ClipError: TIMEOUT when it is over,
        TOO_LARGE when memory is, CRASHED_DECODER when ffmpeg dies.
        """
        assert self._process.stdout and self._process.stderr
        log = b""
        timeout = ClipError(Reason.TIMEOUT, f"ffmpeg took more than {timeout_s:.3g} s", transient=True)
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ, 0)
            selector.register(self._side, selectors.EVENT_READ, 1)
            selector.register(self._process.stderr, selectors.EVENT_READ, None)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if time.monotonic() > deadline:
                    raise timeout
                for key, _ in ready:
                    data = os.read(key.fd, _CHUNK_BYTES)
                    if key.data is None:
                        log = (log + data)[-_LOG_BYTES:]
                        if self._header is None and (not data or _MAPPING.search(log)):
                            self._read_header(log)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data is None:
                        continue
                    else:
                        yield key.data, data
                        if renewed:
                            deadline = time.monotonic() + timeout_s
        try:
            self.returncode = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise timeout from None
        self.log = log.decode(errors="replace")
        if self._header is None and self.returncode in _NOT_RUN:
            raise OSError(f"{ffmpeg_executable()} can't be run: {self.log.strip()[-200:]}")
        if any("Cannot allocate memory" in line for line in self._errors()):
            raise ClipError(Reason.TOO_LARGE, "ffmpeg needs more memory than it may have")
        if self.returncode < 0:
            killed = self.returncode == -signal.SIGKILL  # from outside: the system may be short of memory
            detail = f"ffmpeg died of {signal.Signals(-self.returncode).name}"
            raise ClipError(Reason.CRASHED_DECODER, detail, transient=killed)

    def _read_header(self, log: bytes) -> None:
        self._header = _parse_header(log.decode(errors="replace"))
        if self._header:
            self._look(self._header)

    @property
    def header(self) -> _Header:
        """What the input's header says; ClipError UNREADABLE when it ended without one."""
        if self._header is None:
            raise ClipError(Reason.UNREADABLE, self.last_words() or "not media")
        return self._header

    def _errors(self) -> list[str]:
        return re.findall(r"^(?:\[[^]]*\] )*\[(?:error|fatal|panic)\] *(.*\S)", self.log, re.MULTILINE)

    @property
    def too_many_errors(self) -> bool:
        """Whether ffmpeg found that more than two thirds of a stream didn't decode."""
        return self.returncode == 69

    def last_words(self) -> str:
        """The last line of the log that says what is wrong; empty when nothing is."""
        lines = self._errors()
        lines = [line for line in lines if not _NOISE.match(line)] or lines
        return lines[-1].replace(str(self._path.absolute()), self._path.name) if lines else ""


@functools.cache
def _setpriv() -> tuple[str, ...]:
    """Return the command that binds another to its parent's life; empty where there is none.

    What runs between fork and exec makes Python copy its page tables: 10 ms with 700 MB, 45 with 1.5 GB.
    """
    command = ("setpriv", "--pdeathsig", "KILL")
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ()
    return command


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
