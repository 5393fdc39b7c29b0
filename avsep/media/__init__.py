"""The ffmpeg edge: media files in, arrays out, bounded in time and memory.

From the ground up: `ffmpeg` (the supervised child), `faults`, `excerpt`, `sound`, `decode`, `cut`, `mux`.
"""

from avsep.limits import DecodeLimits
from avsep.media.ffmpeg import Listening, MediaInfo, die_with_parent, ffmpeg_executable, or_inf, probe
from avsep.media.faults import SLACK_S, reaches
from avsep.media.sound import as_it_is, iter_audio, listen
from avsep.media.decode import decode
from avsep.media.cut import CutOptions, cut
from avsep.media.mux import aac_channels, mux, video_container

__all__ = [
    "SLACK_S",
    "CutOptions",
    "DecodeLimits",
    "Listening",
    "MediaInfo",
    "aac_channels",
    "as_it_is",
    "cut",
    "decode",
    "die_with_parent",
    "ffmpeg_executable",
    "iter_audio",
    "listen",
    "mux",
    "or_inf",
    "probe",
    "reaches",
    "video_container",
]
