"""The ffmpeg edge: media files in, arrays out, bounded in time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import itertools
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
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avsep.records import Clip, ClipError, Reason

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
_UNFRAMED = {"aiff", "au", "avr", "caf", "ircam", "nistsphere", "sox", "voc", "w64", "wav"}  # may hold bare samples
# Layouts of which ffmpeg mixes every channel, but for the effects channel; of others it drops some, or fails.
_MIXED = {
    *("mono", "stereo", "downmix", "2.1", "3.0", "3.0(back)", "4.0", "quad", "quad(side)", "3.1", "5.0", "5.0(side)"),
    *("4.1", "5.1", "5.1(side)", "6.0", "6.0(front)", "3.1.2", "hexagonal", "6.1", "6.1(back)", "6.1(front)", "7.0"),
    *("7.0(front)", "7.1", "7.1(wide)", "7.1(wide-side)", "5.1.2", "5.1.2(back)", "octagonal", "7.1.2"),
}
# For aeval, whose ld(1) counts the channels.
_SUM = "st(0,0);st(1,0);while(lt(ld(1),nb_in_channels),st(0,ld(0)+val(ld(1)){});st(1,ld(1)+1));ld(0)/nb_in_channels"
_OMNI = "val(0)"  # ambisonic W: what an omnidirectional microphone hears
_MEAN = _SUM.format("")
_ALTERNATING = _SUM.format("*(1-2*mod(ld(1),2))")  # of two channels half the difference
_QUIET = 1e-2  # peaks below this may be what channels in opposite phase have left of each other …
_CANCELLED_DB = 20.0  # … and are, when the alternating sum is this much louder
_SILENT = 1e-4  # peaks below this are no sound
_LOST = 10  # packets that don't decode are worth a note; a few at the start of a recording aren't
_UNREAD = 0.1  # of a file's bytes: more than that, left over where reading fails, are missed
_PLACEHOLDER = 0.01  # lengths this near to the largest number that a header's field holds were never filled in
LOUDEST = 1e10  # of a sample, full scale 1: sums of squares of what is louder overflow
_LEAD_S = 1.0  # decoded before an excerpt: decoders need a run-up after a seek …
_UNINDEXED_LEAD_S = 12.0  # … and key frames may be this far apart
_SLACK_S = 1.0  # media may end this much before their header says
_LOG_BYTES = 1 << 20
_CHUNK_BYTES = _PIPE_BYTES = 1 << 18
_WIDEST = 3  # times the short side: of pictures wider or higher than that the middle is kept
_PPM, _PPM_HEADER_BYTES = re.compile(rb"P6\n(\d+) (\d+)\n255\n"), 32
_MAPPING = re.compile(rb"^\[info\] Stream mapping:", re.MULTILINE)  # follows the description of the input
_NOT_RUN = (126, 127)  # setpriv's statuses when it can't run a program, and the loader's when it can't map one
_NO_ROOM = re.compile(r"cannot allocate memory|failed to map segment", re.IGNORECASE)  # what they say of memory
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


@dataclass(frozen=True)
class DecodeLimits:
    """What one call may use before it gives up with a `ClipError`."""

    timeout_s: float = 120.0
    max_duration_s: float = 900.0
    max_pixels: int = 8192 * 4320
    max_memory_bytes: int = 4 << 30  # ffmpeg's address space
    threads: int = 1  # ffmpeg's, a decoder


class _TooManyPixels(ClipError):
    """Pictures above the limit: that refuses the file, where pictures that fail are done without."""


class _OtherHeader(Exception):
    """A file isn't as was assumed."""

    def __init__(self, header: _Header) -> None:
        super().__init__()
        self.header = header


class _Changed(Exception):
    """The sound's rate, channels or sample format change on the way."""


@dataclass(frozen=True)
class Track:
    """One of a file's sounds, as its header describes it."""

    stream: int  # ffmpeg's number
    codec: str
    layout: str  # of its channels
    language: str

    @property
    def mix(self) -> str:
        """How its channels become one, an expression for aeval; empty where ffmpeg knows."""
        if self.layout.startswith("ambisonic"):
            return _OMNI
        return "" if self.layout in _MIXED else _MEAN

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.codec, self.layout, self.language)))


@dataclass(frozen=True)
class Listening:
    """How one channel of sound is taken from a file."""

    track: int = 1  # counted from 1
    mix: str = ""  # an expression for aeval; empty: as ffmpeg mixes the layout
    timed: bool = False  # whether samples come with their times: those of sound whose parameters change
    endless: bool = False  # whether a WAV is read to the file's end, whatever its header says
    link: tuple[int, int] | None = None  # of an Ogg chain, where it starts and ends in the file, in bytes


@dataclass(frozen=True)
class _Header:
    info: MediaInfo
    zero_s: float  # where the media begin on ffmpeg's clock, which starts with the first timestamp
    indexed: bool  # whether seeking finds the key frame before a time
    tracks: tuple[Track, ...] = ()
    picture: int | None = None  # ffmpeg's number of the picture stream
    format: str = ""


@dataclass(frozen=True)
class _Request:
    """What is to be decoded of a file, and by when."""

    path: Path
    start_s: float
    end_s: float  # may be infinite
    sample_rate: int
    image_size: int
    limits: DecodeLimits
    deadline: float

    @property
    def length_s(self) -> float:
        return min(self.end_s - self.start_s, self.limits.max_duration_s + 1)  # headers may promise too little

    @property
    def too_long(self) -> ClipError:
        return ClipError(Reason.TOO_LONG, f"more than {self.limits.max_duration_s:g} s")

    def remaining(self) -> DecodeLimits:
        """Return the limits with the time that is left."""
        return replace(self.limits, timeout_s=max(0.0, self.deadline - time.monotonic()))


@dataclass
class _Taken:
    """What one pass of ffmpeg gave."""

    header: _Header
    listening: Listening
    waveform: NDArray[np.float32]
    images: NDArray[np.uint8]
    process: _FFmpeg


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
    track: int = 1,
) -> Clip:
    """Decode the excerpt `start_s … end_s` (None: the file's end), as a rule in one pass of ffmpeg.

    The waveform is mono float32 `(S,)` at `sample_rate` Hz, of the audio track with that number.
    Channels are downmixed: surround as ffmpeg does it, ambisonics to W, others to their mean. Where
    they cancel each other, the waveform is their sum with alternating signs: of stereo the side
    signal, (L − R) / 2. Silence fills gaps in the timestamps (from 0.1 s on, at the start from 1 ms
    on), so that sound and pictures stay together; samples that are mono at this rate already come
    out unchanged. After a seek they are placed as exactly as the timestamps are: Matroska rounds
    these to milliseconds.

    The images are `(n_images, height, width, 3)` RGB uint8: what a player shows 0.5, 1.5, … s into
    the excerpt, upright and whole, the short side resized to `image_size`; of a long side of more
    than three times that the middle is kept. Video too short for that gives its first picture, a
    file without usable video none. Neither `pictures` nor `sound` is decoded unless it is wanted.

    The clip's notes say what a user should know: pictures that can't be used, channels that cancel,
    silence, a header that promises more than there is. A file that ends before `end_s` gives a
    shorter clip. Raises ValueError for times that bound no excerpt, and ClipError: MISSING, EMPTY,
    UNREADABLE, NO_AUDIO, NO_VIDEO (without `sound`), PAST_END, TRUNCATED, TOO_LONG, TOO_LARGE,
    CRASHED_DECODER, TIMEOUT (transient).
    """
    if not (math.isfinite(start_s) and start_s >= 0 and (end_s is None or start_s < end_s)):
        raise ValueError(f"the excerpt is {start_s}…{end_s} s; it must start from 0 up and end after that")
    if track < 1:
        raise ValueError(f"the audio track is {track}; tracks are counted from 1")
    deadline = time.monotonic() + limits.timeout_s
    end_s = math.inf if end_s is None else end_s
    request = _Request(path, start_s, end_s, sample_rate, image_size, limits, deadline)
    _check_file(path)
    taken, trouble = _take_each(request, Listening(track), sound, pictures)
    if sound and len(_links(path, taken.header)) > 1:
        _chain(request, taken)
    notes = _missing(request, taken, sound)
    if trouble:
        state = "end early" if len(taken.images) else "can't be used"
        notes.append(f"the pictures {state}: {trouble}")
    if sound:
        _check_samples(taken.waveform)
        notes += _hear(request, taken)
    return Clip(taken.waveform, sample_rate, taken.images, tuple(notes))


def _take_each(request: _Request, listening: Listening, sound: bool, pictures: bool) -> tuple[_Taken, str]:
    """Take sound and pictures together; where that fails each by itself, so that neither is blamed for the other.

    Returns what was taken, and what is wrong with the pictures.
    """
    if not (sound and pictures):
        return _take(request, listening, sound, pictures), ""
    try:
        taken = _take(request, listening)
        info = taken.header.info
        if not taken.process.returncode or not info.has_video:
            return taken, ""
    except ClipError as error:
        refused = error.transient or isinstance(error, _TooManyPixels)
        if refused or error.reason not in (Reason.TOO_LARGE, Reason.CRASHED_DECODER):
            raise
    taken = _take(request, listening, pictures=False)
    if not taken.header.info.has_video:
        return taken, ""
    try:
        seen = _take(request, listening, sound=False)
    except ClipError as error:
        if error.transient:
            raise
        return taken, error.detail
    taken.images = seen.images
    return taken, seen.process.last_words() if seen.process.returncode else ""


def _take(request: _Request, listening: Listening, sound: bool = True, pictures: bool = True) -> _Taken:
    """Decode in one pass of ffmpeg, or in another where the file turns out not to be as most are."""
    assumed = _Header(MediaInfo(None, sound, pictures, None, None, None), zero_s=0.0, indexed=True)

    def look(header: _Header) -> None:
        _check(request, header, listening.track, sound, pictures)
        blind = assumed.info.has_video and not header.info.has_video
        sought = request.start_s > _LEAD_S and header.indexed != assumed.indexed
        unmixed = sound and not listening.mix and header.tracks[listening.track - 1].mix
        if blind or sought or unmixed or header.zero_s != assumed.zero_s:
            raise _OtherHeader(header)

    while True:
        length_s, limits = request.length_s, request.remaining()
        size = request.sample_rate, request.image_size
        try:
            with _excerpt(request.path, assumed, request.start_s, length_s, *size, limits, look, listening) as excerpt:
                waveform, images = _read(excerpt, length_s, *size, limits.timeout_s)
        except _OtherHeader as other:
            info = replace(other.header.info, has_audio=sound, has_video=pictures and other.header.info.has_video)
            assumed = replace(other.header, info=info)
            if sound and not listening.mix:
                listening = replace(listening, mix=other.header.tracks[listening.track - 1].mix)
        except _Changed:
            listening = replace(listening, timed=True)
        else:
            if excerpt.unmixable and not listening.mix:
                listening = replace(listening, mix=_MEAN)
            elif _says_empty(excerpt, len(waveform)) and not request.start_s:
                listening, assumed = replace(listening, endless=True), excerpt.header
            else:
                return _Taken(excerpt.header, listening, waveform, images, excerpt)


def _says_empty(process: _FFmpeg, n_bytes: int) -> bool:
    """Tell whether a WAV gave nothing because its header was written before its samples: RF64, to a pipe."""
    endless = process.listening is None or process.listening.endless
    return not n_bytes and not endless and process.header.format == "wav"


def _check(request: _Request, header: _Header, track: int, sound: bool, pictures: bool) -> None:
    """Raise the ClipError of a file whose header says that it can't be used."""
    info = header.info
    if sound and track > len(header.tracks):
        there = f"no audio track {track}; there are {len(header.tracks)}" if header.tracks else "no audio stream"
        raise ClipError(Reason.NO_AUDIO, there)
    if pictures and not sound and not info.has_video:
        raise ClipError(Reason.NO_VIDEO, "no video stream")
    limit = request.limits.max_pixels
    if pictures and (info.width or 0) * (info.height or 0) > limit:
        raise _TooManyPixels(Reason.TOO_LARGE, f"{info.width}x{info.height}; the limit is {limit} pixels")
    end_s, longest_s = min(request.end_s, _or_inf(info.duration_s)), request.limits.max_duration_s
    too_long = math.isfinite(end_s) and end_s - request.start_s > longest_s  # says the header; is it true?
    if too_long and reaches(request.path, request.start_s + longest_s, limits=request.remaining()):
        raise request.too_long


def _missing(request: _Request, taken: _Taken, sound: bool) -> list[str]:
    """Say what the header promises and the file hasn't; raise the ClipError of a file that is at fault."""
    process, header, start_s = taken.process, taken.header, request.start_s
    decoded_s = len(taken.waveform) / request.sample_rate if sound else max(0.0, len(taken.images) - 0.5)
    if decoded_s > request.limits.max_duration_s + 0.5:  # codecs pad the end
        raise request.too_long
    if process.too_many_errors or (not decoded_s and process.returncode):
        raise ClipError(Reason.UNREADABLE, process.last_words() or "nothing decodes")
    if not decoded_s and not start_s:
        raise ClipError(Reason.EMPTY, process.last_words() or "no samples")
    end_s, promised_s = start_s + decoded_s, min(request.end_s, _or_inf(header.info.duration_s))
    notes = []
    if end_s < promised_s - _SLACK_S < math.inf or (process.stopped and end_s < request.end_s):
        own = header.tracks[taken.listening.track - 1].stream if sound else header.picture
        notes = _judge(request.path, process, own, end_s, promised_s, request.remaining())
    if sound and (lost := process.lost(header.tracks[taken.listening.track - 1].stream)) >= _LOST:
        notes.append(f"{lost} packets of the sound are damaged: {process.last_words()}")
    if process.cut and end_s < request.end_s and header.info.duration_s is None:
        notes.append(f"the file ends in the middle of its data, at {end_s:.2f} s: it may have been cut")
    if not decoded_s and not len(taken.images) and not reaches(request.path, start_s, limits=request.remaining()):
        raise ClipError(Reason.PAST_END, f"nothing follows {start_s:g} s")
    if not decoded_s:
        raise ClipError(Reason.EMPTY, process.last_words() or f"no samples follow {start_s:g} s")
    return notes


def _judge(
    path: Path, process: _FFmpeg, own: int | None, end_s: float, promised_s: float, limits: DecodeLimits
) -> list[str]:
    """Find out why a stream ends before its file's header says: note a header that is wrong.

    A container's length is that of its longest stream, whatever it holds, and a header may have
    been written before its file was whole. So what counts is where the file's packets end, and
    whether something says that the file was cut or damaged: then a ClipError, TRUNCATED.
    """
    packets = _survey(path, limits)
    if (process.stopped or packets.process.stopped) and packets.n_bytes < (1 - _UNREAD) * path.stat().st_size:
        raise ClipError(Reason.TRUNCATED, f"can't be read on from {end_s:.2f} s: {process.last_words()}")
    own_s = min(packets.ends_s.get(own, 0.0) if own is not None else 0.0, promised_s)
    if math.isfinite(own_s) and end_s < own_s - _SLACK_S:
        raise ClipError(Reason.TRUNCATED, f"decodes up to {end_s:.2f} s of {own_s:.2f} s: {process.last_words()}")
    if not math.isfinite(promised_s) or end_s >= promised_s - _SLACK_S:
        return []
    cut = process.cut or packets.process.cut
    if not cut and max(packets.ends_s.values(), default=0.0) >= promised_s - _SLACK_S:
        return []
    if cut or process.header.format in _UNFRAMED or process.last_words():
        raise ClipError(Reason.TRUNCATED, f"ends at {end_s:.2f} s, not at {promised_s:.2f} s")
    return [f"the header promises {promised_s:.2f} s; the file ends at {end_s:.2f} s"]


def _hear(request: _Request, taken: _Taken) -> list[str]:
    """Take the channels' differences where they cancel each other; say that, and say what is silent."""
    if np.abs(taken.waveform).max() >= _QUIET:
        return []
    track = taken.header.tracks[taken.listening.track - 1]
    notes = []
    if track.layout != "mono":
        other = _take(request, replace(taken.listening, mix=_ALTERNATING), pictures=False)
        if _cancelled(_energy(taken.waveform), _energy(other.waveform)):
            taken.waveform = _check_samples(other.waveform)
            notes = [_cancelled_note(track)]
    return notes + _silence_notes(float(np.abs(taken.waveform).max()), taken.header, taken.listening.track)


def _energy(samples: NDArray[np.float32]) -> float:
    return float(np.square(samples, dtype=np.float64).sum())


def _cancelled(mixed: float, alternating: float) -> bool:
    """Tell from the energies of both sums of its channels whether a sound is lost in the usual one."""
    return alternating > mixed * 10 ** (_CANCELLED_DB / 10)


def _cancelled_note(track: Track) -> str:
    if track.layout in ("stereo", "downmix"):
        return "left and right cancel each other: half their difference was taken"
    return f"the mix of the channels ({track.layout}) is silent: they were added with alternating signs"


def _silence_notes(peak: float, header: _Header, track: int) -> list[str]:
    if peak >= _SILENT:
        return []
    others = [f"{n} ({t})" for n, t in enumerate(header.tracks, 1) if n != track]
    if not others:
        return ["the sound is silent"]
    return [f"audio track {track} is silent; the file's others are {'; '.join(others)}"]


def listen(path: Path, *, limits: DecodeLimits = DecodeLimits(), track: int = 1) -> tuple[Listening, tuple[str, ...]]:
    """Find out how the sound of a file too long for `decode` is taken, for `iter_audio`, and what to note.

    Reads until the sound isn't quiet any more, as a rule its first second. Raises as `iter_audio` does.
    """
    found = Listening(track)
    header = _probe_audio(path, limits, found)
    energies = []
    for mix in ("", _ALTERNATING):
        peak, energy = 0.0, 0.0
        tried = replace(found, mix=mix)
        for block in iter_audio(path, sample_rate=8000, block=1 << 13, limits=limits, listening=tried):
            peak, energy = max(peak, float(np.abs(block).max())), energy + _energy(block)
            if not mix and peak >= _QUIET:
                return found, ()
        energies.append(energy)
        if header.tracks[track - 1].layout == "mono":
            return found, tuple(_silence_notes(peak, header, track))
    if _cancelled(*energies):
        return tried, (_cancelled_note(header.tracks[track - 1]),)
    return found, tuple(_silence_notes(peak, header, track))


def iter_audio(
    path: Path,
    *,
    sample_rate: int,
    block: int,
    limits: DecodeLimits = DecodeLimits(),
    listening: Listening = Listening(),
) -> Iterator[NDArray[np.float32]]:
    """Decode a whole file's audio as `decode` does, `block` samples at a time, the last block shorter.

    Memory stays the same however long the file is: `max_duration_s` doesn't apply, and
    `timeout_s` bounds the wait for each piece. What channels have left of each other isn't looked
    for: `listen` does. Raises ClipError while iterating: MISSING, EMPTY, UNREADABLE, NO_AUDIO,
    CRASHED_DECODER, TIMEOUT (transient) and, after the last block, TRUNCATED.
    """
    if block < 1:
        raise ValueError(f"block is {block}; it must be a positive number of samples")
    header = _probe_audio(path, limits, listening)
    excerpt, n_samples = yield from _blocks(_sound(path, header, listening, sample_rate, limits), block)
    if excerpt.too_many_errors or (not n_samples and excerpt.returncode):
        raise ClipError(Reason.UNREADABLE, excerpt.last_words() or "nothing decodes")
    if not n_samples:
        raise ClipError(Reason.EMPTY, excerpt.last_words() or "no samples")
    end_s, promised_s = n_samples / sample_rate, _or_inf(header.info.duration_s)
    if end_s < promised_s - _SLACK_S < math.inf or excerpt.stopped:
        own = header.tracks[listening.track - 1].stream
        _judge(path, excerpt, own, end_s, promised_s, limits)


def _blocks(
    pieces: Generator[bytes, None, _FFmpeg], block: int
) -> Generator[NDArray[np.float32], None, tuple[_FFmpeg, int]]:
    """Divide float32 samples into blocks; return what `pieces` returns, and their number."""
    n_samples, rest = 0, bytearray()
    while True:
        try:
            rest += next(pieces)
        except StopIteration as end:
            samples = np.frombuffer(rest, "<f4", len(rest) // 4)
            if len(samples):
                yield _check_samples(samples)
            return end.value, n_samples + len(samples)
        while len(rest) >= 4 * block:
            yield _check_samples(np.frombuffer(rest[: 4 * block], "<f4"))
            del rest[: 4 * block]
            n_samples += block


def _sound(
    path: Path, header: _Header, listening: Listening, sample_rate: int, limits: DecodeLimits
) -> Generator[bytes, None, _FFmpeg]:
    """Give a whole file's float32 samples as they come; return the ffmpeg that read the last."""
    links = _links(path, header)
    for link in links:
        listening = replace(listening, link=link if len(links) > 1 else None)
        if listening.link:
            header = _probe_audio(path, limits, listening)
        mix = listening.mix or header.tracks[listening.track - 1].mix
        sound = replace(header, info=replace(header.info, has_video=False))
        excerpt = yield from _link_sound(path, sound, replace(listening, mix=mix), sample_rate, limits)
    return excerpt


def _link_sound(
    path: Path, sound: _Header, listening: Listening, sample_rate: int, limits: DecodeLimits
) -> Generator[bytes, None, _FFmpeg]:
    given = 0  # bytes
    while True:
        at = 0
        try:
            with _excerpt(path, sound, 0.0, math.inf, sample_rate, 0, limits, listening=listening) as excerpt:
                for data in _samples(excerpt, sample_rate, limits.timeout_s):
                    fresh = data[max(0, given - at) :]
                    at += len(data)
                    given = max(given, at)
                    yield fresh
            if not _says_empty(excerpt, at):
                return excerpt
            listening = replace(listening, endless=True)
        except _Changed:
            listening = replace(listening, timed=True)


def _links(path: Path, header: _Header) -> list[tuple[int, int]]:
    """Return where each link of an Ogg chain starts and ends, in bytes; of other files none but the whole.

    A link starts with pages that begin a stream, after others. ffmpeg itself goes on to the next
    link only where that is like the first.
    """
    starts, position, head = [0], 0, True
    n_bytes = path.stat().st_size
    with path.open("rb") as f:
        while header.format == "ogg" and position < n_bytes:
            f.seek(position)
            page = f.read(27 + 255)
            if len(page) < 27 or not page.startswith(b"OggS"):
                break
            begins = bool(page[5] & 2)
            if begins and not head:
                starts.append(position)
            head = begins
            position += 27 + page[26] + sum(page[27 : 27 + page[26]])
    return list(itertools.pairwise([*starts, n_bytes]))


def _chain(request: _Request, taken: _Taken) -> None:
    """Take the excerpt's sound from all links of an Ogg chain, of which `taken` has the first."""
    start = 4 * round(request.start_s * request.sample_rate)
    end = start + 4 * round(request.length_s * request.sample_rate)
    pieces = _sound(request.path, taken.header, taken.listening, request.sample_rate, request.remaining())
    at, kept = 0, bytearray()
    while at < end:
        try:
            data = next(pieces)
        except StopIteration as last:
            taken.process = last.value
            break
        kept += data[max(0, start - at) : max(0, end - at)]
        at += len(data)
        if time.monotonic() > request.deadline:
            raise ClipError(Reason.TIMEOUT, f"ffmpeg took more than {request.limits.timeout_s:.3g} s", transient=True)
    taken.waveform = np.frombuffer(kept, "<f4", len(kept) // 4)


def reaches(path: Path, time_s: float, *, limits: DecodeLimits = DecodeLimits()) -> bool:
    """Tell whether any of a file's streams has something after a time, whatever the header says."""
    return any(end_s > 0 for end_s in _survey(path, limits, time_s).ends_s.values())


@dataclass
class _Packets:
    """What is in a file, undecoded."""

    process: _FFmpeg
    ends_s: dict[int, float]  # of each stream, on the file's clock, or after the start of the survey
    n_bytes: int


def _survey(path: Path, limits: DecodeLimits, start_s: float = 0.0) -> _Packets:
    """Read a file's packets, those of a second where a start is given."""
    options: dict[str, Any] = {"ss": f"{start_s:.6f}"} if start_s else {}
    until = {"t": 1} if start_s else {}
    source = _input(path, limits, **options)
    listed = source.output("pipe:1", format="framecrc", c="copy", map="0", copy_unknown=None, **until)
    bases: dict[int, float] = {}
    ends_s: dict[int, float] = {}
    n_bytes, rest = 0, b""
    with _FFmpeg([listed], path, limits) as process:
        for _, data in process.pieces(limits.timeout_s):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if tick := re.match(rb"#tb (\d+): (\d+)/(\d+)", line):
                    bases[int(tick[1])] = int(tick[2]) / int(tick[3])
                elif packet := re.match(rb"(\d+), *(?:-?\d+|NOPTS), *(-?\d+), *(\d+), *(\d+),", line):
                    stream, time, duration, size = map(int, packet.groups())
                    ends_s[stream] = max(ends_s.get(stream, -math.inf), (time + duration) * bases.get(stream, 0.0))
                    n_bytes += size
    return _Packets(process, ends_s, n_bytes)


def _or_inf(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _check_samples(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return samples that can be sound; ClipError (UNREADABLE) where damage has made others of them."""
    if len(samples) and not np.abs(samples).max() <= LOUDEST:  # NaN isn't either
        raise ClipError(Reason.UNREADABLE, f"samples that are not finite numbers, or above {LOUDEST:.0e}")
    return samples


def _probe_audio(path: Path, limits: DecodeLimits, listening: Listening) -> _Header:
    header = _probe(path, limits, listening.link)
    whole = _Request(path, 0.0, 0.0, 1, 0, limits, math.inf)
    _check(whole, header, listening.track, sound=True, pictures=False)
    return header


def _probe(path: Path, limits: DecodeLimits, link: tuple[int, int] | None = None) -> _Header:
    _check_file(path)
    nowhere = _input(path, limits, link).output("pipe:1", c="copy", t=0, format="null")
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


def _parse_header(log: str, n_bytes: int = 0) -> _Header | None:
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
        if begin[1] in _UNFRAMED and rate and bits:
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
    )
    # What comes before timestamp zero, a codec's run-up, isn't played.
    return _Header(
        info,
        max(0.0, -first_s),
        indexed=not begin[1].startswith("mpeg"),
        tracks=tuple(_track(*described) for described in audio),
        picture=video[0][0] if video else None,
        format=begin[1],
    )


def _track(stream: int, language: str, words: str) -> Track:
    layout = re.search(r"\d+ Hz, ([^,]+)", words)
    return Track(stream, words.split(",")[0].split(" ")[0], layout[1] if layout else "", language.replace("und", ""))


def _never_filled(length: float) -> bool:
    """Tell whether a header's length is what is written before it is known: about the largest number there is."""
    return length > 2**40 or any(abs(length / 2**bits - 1) < _PLACEHOLDER for bits in (31, 32))


def _input(path: Path, limits: DecodeLimits, link: tuple[int, int] | None = None, **options: Any) -> Any:
    import ffmpeg  # nobody needs it who has waveforms already

    part = "subfile,,start,{},end,{},,:".format(*link) if link else ""
    return ffmpeg.input(
        f"{part}file:{path.absolute()}",
        protocol_whitelist="file,subfile" if link else "file",
        format_whitelist=_FORMATS,
        threads=limits.threads,
        guess_layout_max=2,  # more channels without a layout are microphones or instruments as often as loudspeakers
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
    listening: Listening = Listening(),
) -> _FFmpeg:
    """Start decoding: output 0 is float32 samples, output 1 PPM pictures, if there; `look` is shown the header.

    The first picture is the one shown at the start; those at 0.5, 1.5, … s follow. Samples that are
    timed are pairs of float64: sample, and seconds after the excerpt's start.
    """
    info = header.info
    seek_s = max(0.0, start_s - (_LEAD_S if header.indexed else _UNINDEXED_LEAD_S))
    options: dict[str, Any] = {"ss": f"{seek_s:.6f}", "noaccurate_seek": None} if seek_s else {}
    if info.has_video:
        options["max_pixels:v"] = limits.max_pixels
        options["reinit_filter:v"] = 0  # scale copes with a change of size; fps would start over
    if listening.endless:
        options["ignore_length"] = 1
    source = _input(path, limits, listening.link, **options)
    lead_s = header.zero_s + start_s - seek_s
    outputs = []
    if info.has_audio:
        filters = _sound_filters(listening, lead_s, length_s, sample_rate)
        coding = "f64le" if listening.timed else "f32le"
        outputs.append(source[f"a:{listening.track - 1}"].output("pipe:1", format=coding, af=",".join(filters)))
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
    return _FFmpeg(outputs, path, limits, look, None if not info.has_audio else listening)


def _sound_filters(listening: Listening, lead_s: float, length_s: float, sample_rate: int) -> list[str]:
    """Return ffmpeg's filters for what follows `lead_s` on its clock."""
    bounded = math.isfinite(length_s)
    # atrim before aresample: the latter lets a start up to 1 ms early pass, and fills gaps of any length
    filters = [f"atrim=start={lead_s:.6f}" + (f":end={lead_s + length_s + 0.1:.6f}" if bounded else "")]
    if listening.mix:
        filters.append(f"aeval='{listening.mix}':c=mono")
    placed = "" if listening.timed else f":async=1:first_pts={round(lead_s * sample_rate)}"
    filters.append(f"aresample={sample_rate}{placed}:rematrix_maxval=1")
    filters.append(f"aformat=sample_fmts=flt:channel_layouts=mono:sample_rates={sample_rate}")
    if listening.timed:  # a change makes the filters anew: what counts from the start would start again
        filters.append(f"aeval='val(0)|t-{lead_s:.6f}':c=stereo")
    elif bounded:
        filters.append(f"atrim=end_sample={round(length_s * sample_rate)}")
    return filters


def _read(
    process: _FFmpeg, length_s: float, sample_rate: int, image_size: int, timeout_s: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    picture_bytes = 3 * _WIDEST * image_size**2 + _PPM_HEADER_BYTES
    outputs = (bytearray(), bytearray())
    bounds = (4 * round(length_s * sample_rate), picture_bytes * _n_pictures(length_s))
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
    pictures = _pictures(outputs[1])
    return waveform, pictures[1:] if len(pictures) > 1 else pictures


def _pictures(stream: bytearray) -> NDArray[np.uint8]:
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


def _samples(process: _FFmpeg, sample_rate: int, timeout_s: float) -> Iterator[bytes]:
    """Give an excerpt's float32 samples as they come; TIMEOUT where none come for that long."""
    timed = process.listening is not None and process.listening.timed
    placing = _Placing(sample_rate) if timed else None
    for _, data in process.pieces(timeout_s, renewed=True):
        if placing is None:
            yield data
        else:
            yield from placing(data)


class _Placing:
    """Put timed samples one after the other, and silence where their times leave a gap.

    Times that go back or drift are not believed: formats without timestamps count them by a rate that
    holds no longer.
    """

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self._next_s: float | None = None  # where the samples that have come end
        self._rest = b""

    def __call__(self, data: bytes) -> Iterator[bytes]:
        """Take pairs of float64, sample and time in s; give float32 samples."""
        data = self._rest + data
        whole = len(data) // 16 * 16
        self._rest = data[whole:]
        samples, times = np.frombuffer(data[:whole], "<f8").reshape(-1, 2).T
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
            for start in range(0, missing, _CHUNK_BYTES):
                yield bytes(4 * min(_CHUNK_BYTES, missing - start))


def _n_pictures(length_s: float) -> int:
    """Count those at the start, at 0.5, 1.5, … s."""
    return 1 + max(0, math.ceil(length_s - 0.5))


class _FFmpeg:
    """A supervised ffmpeg, in a process group of its own that ends with the `with` block.

    Its outputs are `pipe:1`, number 0, and `pipe:side`, number 1. As soon as it has described its
    input, `look` is called, which may raise. Where `listening` isn't for it, sound whose parameters
    change raises _Changed.
    """

    def __init__(
        self,
        outputs: list[Any],
        path: Path,
        limits: DecodeLimits,
        look: Callable[[_Header], None] = lambda header: None,
        listening: Listening | None = None,
    ) -> None:
        self.log = ""
        self.listening = listening
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
                for key, _ in sorted(ready, key=lambda r: r[0].data is not None):  # the log first
                    data = os.read(key.fd, _CHUNK_BYTES)
                    if key.data is None:
                        log = self._heed(log, data)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data is None:
                        continue
                    else:
                        # What is said of these data was said before them.
                        if key.data == 0 and select.select([self._process.stderr], [], [], 0)[0]:
                            log = self._heed(log, os.read(self._process.stderr.fileno(), _CHUNK_BYTES))
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
            raise _TooManyPixels(Reason.TOO_LARGE, too_many[0])
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
            raise _Changed
        return log

    def _read_header(self, log: bytes) -> None:
        self._header = _parse_header(log.decode(errors="replace"), self._path.stat().st_size)
        if self._header:
            self._look(self._header)

    @property
    def header(self) -> _Header:
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


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
