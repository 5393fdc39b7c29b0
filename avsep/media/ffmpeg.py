"""The supervised ffmpeg, bounded in time and memory, and what it says of a file."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import math
import os
import re
import resource
import select
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avsep.limits import DecodeLimits
from avsep.records import ClipError, Reason

# What a file may be: what holds recorded sound and pictures in one file, and says how to play it. The rest stays
# closed: playlists (hls, concat, dash, imf, sdp …) open other files, scripts (avisynth, sbg …) do what they like,
# pictures and texts have no sound, and of raw samples nobody knows the rate.
_FORMATS = (
    "3g2,3gp,4xm,aa,aac,aax,ac3,ac4,act,adx,aea,aiff,alp,amr,amrnb,amrwb,anm,apac,apc,ape,apm,argo_asf,argo_cvg,asf,"
    "asf_o,ast,au,av1,avi,avr,avs2,avs3,bethsoftvid,bfi,bink,binka,boa,brstm,caf,cavsvideo,cine,daud,derf,dhav,dirac,"
    "dnxhd,dsf,dsicin,dss,dts,dtshd,dv,dxa,ea,eac3,epaf,evc,film_cpk,flac,flic,flv,frm,fwse,g722,g723_1,g729,gdv,gsm,"
    "gxf,h261,h263,h264,hca,hcom,hevc,iamf,idcin,iff,ilbc,ipmovie,ipu,ircam,iss,iv8,ivf,kux,kvag,laf,lc3,live_flv,"
    "lmlm4,loas,lvf,lxf,m4a,m4v,matroska,mgsts,mj2,mjpeg,mjpeg_2000,mlp,mlv,mm,mmf,mov,mp3,mp4,mpc,mpc8,mpeg,mpegts,"
    "mpegvideo,msnwctcp,mtaf,mtv,mv,mvi,mxf,nistsphere,nsv,nut,nuv,obu,ogg,oma,osq,paf,pmp,pp_bnk,psxstr,pva,pvf,qcp,"
    "qoa,r3d,rl2,rm,roq,rpl,rsd,rso,sbc,sdns,sds,sdx,ser,shn,siff,smjpeg,smk,smush,sol,sox,spdif,svag,svs,swf,tak,thp,"
    "tmv,truehd,tta,ty,vag,vc1,vc1test,vividas,vivo,vmd,voc,vpk,vqf,vvc,w64,wav,wavarc,wc3movie,webm,wsaud,wsd,wsvqa,"
    "wtv,wv,wve,xa,xmv,xvag,xwma,yop,yuv4mpegpipe"
)
UNFRAMED = {"aiff", "au", "avr", "caf", "ircam", "nistsphere", "sox", "voc", "w64", "wav"}  # may hold bare samples
# Layouts of which ffmpeg mixes every channel, but for the effects channel; of others it drops some, or fails.
_MIXED = {
    *("mono", "stereo", "downmix", "2.1", "3.0", "3.0(back)", "4.0", "quad", "quad(side)", "3.1", "5.0", "5.0(side)"),
    *("4.1", "5.1", "5.1(side)", "6.0", "6.0(front)", "3.1.2", "hexagonal", "6.1", "6.1(back)", "6.1(front)", "7.0"),
    *("7.0(front)", "7.1", "7.1(wide)", "7.1(wide-side)", "5.1.2", "5.1.2(back)", "octagonal", "7.1.2"),
}
# For aeval, whose ld(1) counts the channels.
_SUM = "st(0,0);st(1,0);while(lt(ld(1),nb_in_channels),st(0,ld(0)+val(ld(1)){});st(1,ld(1)+1));ld(0)/nb_in_channels"
_NAMED = {"mono": 1, "stereo": 2, "downmix": 2, "binaural": 2, "quad": 4, "hexagonal": 6, "octagonal": 8, "cube": 8}
_OMNI = "val(0)"  # ambisonic W: what an omnidirectional microphone hears
MEAN = _SUM.format("")
ALTERNATING = _SUM.format("*(1-2*mod(ld(1),2))")  # of two channels half the difference
_PLACEHOLDER = 0.01  # lengths this near to the largest number that a header's field holds were never filled in
_LOG_BYTES = 1 << 20
CHUNK_BYTES = _PIPE_BYTES = 1 << 18
_MAPPING = re.compile(rb"^\[info\] Stream mapping:", re.MULTILINE)  # follows the description of the input
_NOT_RUN = (126, 127)  # setpriv's statuses when it can't run a program, and the loader's when it can't map one
_NO_ROOM = re.compile(  # what they say of memory
    r"failed to map|cannot (allocate|map|create|change|apply|make) |out of memory", re.IGNORECASE
)
_NOISE = re.compile(
    "Error opening (in|out)put|Conversion failed|Terminating thread|Task finished|Nothing was written"
    "|Last message repeated|Could not open encoder|Error reinitializing filters|Failed to configure (in|out)put pad"
    "|Error submitting packet to decoder|Application provided invalid|Error during demuxing|Packet processing failed"
    "|Link '|Color |Pixel formats|Alpha modes|src: |dst: |Cannot determine format of input"
)
_ANEW = re.compile(rb"Reconfiguring filter graph because audio|non monotonically increasing dts to muxer")
_CUT = re.compile(  # what demuxers say when a file ends before its time
    r"File ended prematurely|partial file|Packet corrupt|corrupt input packet|filesize and duration do not match"
)
_STOPPED = re.compile(r"Error during demuxing: (.*)")
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
    channels: int | None = None  # of the first audio stream; None where nobody knows


class TooManyPixels(ClipError):
    """Pictures above the limit: that refuses the file, where pictures that fail are done without."""


class OtherHeader(Exception):
    """A file isn't as was assumed."""

    def __init__(self, header: Header) -> None:
        super().__init__()
        self.header = header


class Changed(Exception):
    """The sound's rate, channels or sample format change on the way."""


@dataclass(frozen=True)
class Track:
    """One of a file's sounds, as its header describes it."""

    stream: int  # ffmpeg's number
    codec: str
    layout: str  # of its channels
    language: str
    sample_rate: int = 0  # Hz; 0 where the header doesn't say

    @property
    def mix(self) -> str:
        """How its channels become one, an expression for aeval; empty where ffmpeg knows."""
        if self.layout.startswith("ambisonic"):
            return _OMNI
        return "" if self.layout in _MIXED else MEAN

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.codec, self.layout, self.language)))


def count_channels(layout: str) -> int:
    """Count the channels of a layout as ffmpeg names it; 0 for one that isn't known.

    >>> [count_channels(name) for name in ("mono", "5.1(side)", "3.1.2", "6 channels (FL+FR)", "ambisonic 1", "?")]
    [1, 6, 6, 6, 4, 0]
    """
    name = layout.partition("(")[0].strip()
    if named := _NAMED.get(name):
        return named
    if count := re.match(r"(\d+) channels", name):
        return int(count[1])
    if order := re.fullmatch(r"ambisonic (\d+)", name):
        return (int(order[1]) + 1) ** 2
    return sum(map(int, name.split("."))) if re.fullmatch(r"\d+(\.\d+)+", name) else 0


@dataclass(frozen=True)
class Listening:
    """How sound is taken from a file: as one channel, or in a layout of its own."""

    track: int = 1  # counted from 1
    mix: str = ""  # an expression for aeval; empty: as ffmpeg mixes the layout
    timed: bool = False  # whether samples come with their times: those of sound whose parameters change
    endless: bool = False  # whether a WAV is read to the file's end, whatever its header says
    link: tuple[int, int] | None = None  # of an Ogg chain, where it starts and ends in the file, in bytes
    layout: str = ""  # of the channels that are taken; empty: one, mixed

    def __post_init__(self) -> None:
        if self.track < 1:
            raise ValueError(f"track is {self.track}; tracks are counted from 1")

    @property
    def n_channels(self) -> int:
        """How many channels come."""
        return count_channels(self.layout) if self.layout else 1


@dataclass(frozen=True)
class Header:
    """What ffmpeg says of a file before it decodes."""

    info: MediaInfo
    zero_s: float  # where the media begin on ffmpeg's clock, which starts with the first timestamp
    indexed: bool  # whether seeking finds the key frame before a time
    tracks: tuple[Track, ...] = ()
    video: int | None = None  # ffmpeg's number of the video stream
    video_codec: str = ""
    format: str = ""


def ffmpeg_executable() -> str:
    """Return the system's ffmpeg, else the one that comes with imageio-ffmpeg."""
    import imageio_ffmpeg

    return shutil.which("ffmpeg") or str(imageio_ffmpeg.get_ffmpeg_exe())


def probe(path: Path, *, timeout_s: float = 30.0) -> MediaInfo:
    """Read a file's header.

    Raises ClipError: MISSING, EMPTY, UNREADABLE, CRASHED_DECODER, TIMEOUT (transient).
    """
    return read_header(path, DecodeLimits(timeout_s=timeout_s)).info


def time_left(deadline: float, timeout_s: float) -> float:
    """Return the seconds until a deadline, at most `timeout_s`; ClipError (TIMEOUT) when there are none."""
    left_s = min(deadline - time.monotonic(), timeout_s)
    if left_s <= 0:
        raise ClipError(Reason.TIMEOUT, "no time is left to cut and check the excerpt", transient=True)
    return left_s


def or_inf(seconds: float | None) -> float:
    """Return seconds; infinity for None."""
    return math.inf if seconds is None else seconds


def read_header(path: Path, limits: DecodeLimits, link: tuple[int, int] | None = None) -> Header:
    """Read a file's header, or that of one link of a chain."""
    check_file(path)
    nowhere = input_of(path, limits, link).output("pipe:1", c="copy", t=0, format="null")
    with FFmpeg([nowhere], path, limits) as process:
        for _ in process.pieces(limits.timeout_s):
            pass
    return process.header


def check_file(path: Path) -> None:
    """Raise the ClipError of a file that isn't there or is empty."""
    try:
        if path.stat().st_size == 0 and path.is_file():
            raise ClipError(Reason.EMPTY, "no bytes")
    except (FileNotFoundError, NotADirectoryError):
        raise ClipError(Reason.MISSING, f"no file {path.name}") from None
    except OSError as error:
        raise ClipError(Reason.UNREADABLE, str(error.strerror)) from None


def _parse_header(log: str, n_bytes: int = 0) -> Header | None:
    """Read ffmpeg's description of its input, a file of `n_bytes`; None where there is none."""
    text = re.sub(r"^((\[[^]]*\] )*)\[info\] ", r"\1", log, flags=re.MULTILINE).partition("\nOutput #")[0]
    begin = re.search(r"^Input #0, (.*), from ", text, re.MULTILINE)
    if not begin:
        return None
    text = text[begin.start() :]
    streams = re.findall(
        r"^ +Stream #0:(\d+)(?:\[\w+\])?(?:\((\w+)\))?.*?: (Audio|Video): (.*)$", text, re.MULTILINE
    )  # groups and programs list them in an order of their own
    described = {int(number): (kind, language, words) for number, language, kind, words in streams}
    audio = [(n, language, words) for n, (kind, language, words) in sorted(described.items()) if kind == "Audio"]
    video = [(n, words) for n, (kind, _, words) in sorted(described.items()) if kind == "Video"]
    video = [(n, words) for n, words in video if "(attached pic)" not in words]
    rate = re.search(r", (\d+) Hz", audio[0][2]) if audio else None
    bits = re.search(r", (\d+) kb/s", audio[0][2]) if audio else None
    size = re.search(r", ([1-9]\d*)x([1-9]\d*)", video[0][1]) if video else None
    clock = re.search(r"^  Duration: (?:(\d+):(\d+):([\d.]+)|N/A)(?:, start: (-?[\d.]+))?", text, re.MULTILINE)
    first_s = float(clock[4]) if clock and clock[4] else 0.0
    duration_s = None
    if clock and clock[1] and "Estimating duration from bitrate" not in log:
        duration_s = 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3])
        if begin[1].startswith("matroska"):  # counts from zero, not from the first timestamp
            duration_s -= max(0.0, first_s)
        if begin[1] in UNFRAMED and rate and bits:
            promised = duration_s * int(bits[1]) * 125
            if promised > n_bytes and (_never_filled(promised) or _never_filled(duration_s * int(rate[1]))):
                duration_s = None
    info = MediaInfo(
        duration_s=duration_s,
        has_audio=bool(audio),
        has_video=bool(video),
        sample_rate=int(rate[1]) if rate else None,
        width=int(size[1]) if size else None,
        height=int(size[2]) if size else None,
        channels=(count_channels(_track(*audio[0]).layout) or None) if audio else None,
    )
    # What comes before timestamp zero, a codec's run-up, isn't played.
    return Header(
        info,
        max(0.0, -first_s),
        indexed=not begin[1].startswith("mpeg"),
        tracks=tuple(_track(*described) for described in audio),
        video=video[0][0] if video else None,
        video_codec=re.split("[ ,]", video[0][1])[0] if video else "",
        format=begin[1],
    )


def _track(stream: int, language: str, words: str) -> Track:
    sound = re.search(r"(\d+) Hz, ([^,]+)", words)
    rate, layout = (int(sound[1]), sound[2]) if sound else (0, "")
    return Track(stream, words.split(",")[0].split(" ")[0], layout, language.replace("und", ""), rate)


def _never_filled(length: float) -> bool:
    """Tell whether a header's length is what is written before it is known: about the largest number there is."""
    return length > 2**40 or any(abs(length / 2**bits - 1) < _PLACEHOLDER for bits in (31, 32))


def input_of(path: Path, limits: DecodeLimits, link: tuple[int, int] | None = None, **options: Any) -> Any:
    """Return an input of ffmpeg's that opens recorded media alone."""
    import ffmpeg  # nobody needs it who has waveforms already

    # more channels without a layout are microphones or instruments as often as loudspeakers
    options = {"guess_layout_max": 2} | options
    part = "subfile,,start,{},end,{},,:".format(*link) if link else ""
    return ffmpeg.input(
        f"{part}file:{path.absolute()}",
        protocol_whitelist="file,subfile" if link else "file",
        format_whitelist=_FORMATS,
        threads=limits.threads,
        **options,
    )


class FFmpeg:
    """A supervised ffmpeg, in a process group of its own that ends with the `with` block.

    Its outputs are `pipe:1`, number 0, and `pipe:side`, number 1. As soon as it has described its
    input, `look` is called, which may raise. Where `listening` isn't for it, sound whose parameters
    change raises Changed.
    """

    def __init__(
        self,
        outputs: list[Any],
        path: Path,
        limits: DecodeLimits,
        look: Callable[[Header], None] = lambda header: None,
        listening: Listening | None = None,
    ) -> None:
        self.log = ""
        self.listening = listening
        self.returncode = 0
        self._header: Header | None = None
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
                preexec_fn=None if _setpriv() else die_with_parent,
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

    def __enter__(self) -> FFmpeg:
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
                for key, _ in sorted(ready, key=lambda r: r[0].data is not None):  # the log first
                    data = os.read(key.fd, CHUNK_BYTES)
                    if key.data is None:
                        log = self._heed(log, data)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data is None:
                        continue
                    else:
                        # What is said of these data was said before them.
                        if key.data == 0 and select.select([self._process.stderr], [], [], 0)[0]:
                            log = self._heed(log, os.read(self._process.stderr.fileno(), CHUNK_BYTES))
                        yield key.data, data
                        if renewed:
                            deadline = time.monotonic() + timeout_s
        try:
            self.returncode = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise timeout from None
        self.log = log.decode(errors="replace")
        started = self._header is not None or self.returncode not in _NOT_RUN
        if not started and _NO_ROOM.search(self.log):  # the limit was there before ffmpeg was loaded
            raise ClipError(Reason.TOO_LARGE, "ffmpeg needs more memory than it may have")
        if not started:
            raise OSError(f"{ffmpeg_executable()} can't be run: {self.log.strip()[-200:]}")
        if too_many := [line for line in self._errors() if "max pixel count" in line]:
            raise TooManyPixels(Reason.TOO_LARGE, too_many[0])
        if any("Cannot allocate memory" in line for line in self._errors()):
            raise ClipError(Reason.TOO_LARGE, "ffmpeg needs more memory than it may have")
        if self.returncode < 0:
            killed = self.returncode == -signal.SIGKILL  # from outside: the system may be short of memory
            detail = f"ffmpeg died of {signal.Signals(-self.returncode).name}"
            raise ClipError(Reason.CRASHED_DECODER, detail, transient=killed)

    def _heed(self, log: bytes, said: bytes) -> bytes:
        """Append to the log; act on what is said."""
        fresh = log[-200:] + said
        log = (log + said)[-_LOG_BYTES:]
        if self._header is None and (not said or _MAPPING.search(log)):
            self._read_header(log)
        if self.listening is not None and not self.listening.timed and _ANEW.search(fresh):
            raise Changed
        return log

    def _read_header(self, log: bytes) -> None:
        self._header = _parse_header(log.decode(errors="replace"), self._path.stat().st_size)
        if self._header:
            self._look(self._header)

    @property
    def header(self) -> Header:
        """What the input's header says; ClipError UNREADABLE when it ended without one."""
        if self._header is None:
            words = self.last_words()
            if "Format not on whitelist" in self.log:
                words = "a playlist, a script, a picture, a text or bare samples, which aren't opened"
            elif not words or _NOISE.match(words):
                words = "neither sound nor video that ffmpeg knows"
            raise ClipError(Reason.UNREADABLE, words)
        return self._header

    def _errors(self) -> list[str]:
        return re.findall(r"^(?:\[[^]]*\] )*\[(?:error|fatal|panic)\] *(.*\S)", self.log, re.MULTILINE)

    @property
    def too_many_errors(self) -> bool:
        """Whether ffmpeg found that more than two thirds of a stream didn't decode."""
        return self.returncode == 69

    @property
    def unmixable(self) -> bool:
        """Whether ffmpeg didn't know how to make one channel of those that came."""
        return bool(self.returncode) and bool(re.search(r"channel layout .*not supported|[Rr]ematrix", self.log))

    @property
    def cut(self) -> bool:
        """Whether the demuxer found that the file ends before its time."""
        return bool(_CUT.search(self.log))

    @property
    def stopped(self) -> bool:
        """Whether the demuxer gave up before the file's end."""
        return bool(_STOPPED.search(self.log))

    def lost(self, stream: int) -> int:
        """Count a stream's packets that didn't decode."""
        return len(re.findall(rf"\[aist#0:{stream}/.*(?:Error submitting packet|Decoding error)", self.log))

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


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
