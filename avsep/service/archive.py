"""Results as ZIP and in other sound formats, as they are sent."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile

from avsep import storage
from avsep.outputs import FORMATS
from avsep.service.failures import as_failure

_FILE_CHUNK = 1 << 18
_VORBIS_BLOCK = 4096  # libvorbis puts what it is given on the stack
_VORBIS_ORDER = {  # of loudspeakers, beside WAV's order: libsndfile writes them as they come, and players reorder them
    3: [0, 2, 1],
    5: [0, 2, 1, 3, 4],
    6: [0, 2, 1, 4, 5, 3],
    7: [0, 2, 1, 5, 6, 4, 3],
    8: [0, 2, 1, 6, 7, 4, 5, 3],
}


def converted(path: Path, kind: str) -> Path | bytes:
    """Convert a WAV once; on a full disk for this once, in memory."""
    target = path.with_suffix(f".{kind}")
    if target.exists():
        return target
    try:
        with storage.aside(target) as part:  # others may be asking for it too
            _encode(path, part, kind)
    except (OSError, soundfile.LibsndfileError) as error:
        if not path.exists() or as_failure(error).status != 507:
            raise
        memory = io.BytesIO()
        _encode(path, memory, kind)
        return memory.getvalue()
    return target


def _encode(path: Path, target: Path | io.BytesIO, kind: str) -> None:
    subtype, block = ("VORBIS", _VORBIS_BLOCK) if kind == "ogg" else (FORMATS[kind], _FILE_CHUNK)
    with (
        soundfile.SoundFile(path) as source,
        soundfile.SoundFile(target, "w", source.samplerate, source.channels, subtype, format=kind) as encoded,
    ):
        order = _VORBIS_ORDER.get(source.channels) if kind == "ogg" else None
        for samples in source.blocks(max(1, block // source.channels), dtype="float32", always_2d=True):
            encoded.write(samples[:, order] if order else samples)


class _Outlet(io.RawIOBase):
    """A stream that a ZIP is written to and read from in turns."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)

    def take(self) -> bytes:
        data, self.data = bytes(self.data), bytearray()
        return data


def zip(files: dict[str, Path | bytes]) -> Iterator[bytes]:
    """Write a ZIP as it is sent: nothing on disk, little in memory."""
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            with (
                archive.open(name, "w", force_zip64=True) as member,
                io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source,
            ):
                while data := source.read(_FILE_CHUNK):
                    member.write(data)
                    yield outlet.take()
    yield outlet.take()
