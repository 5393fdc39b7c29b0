"""Albums: the middles of clips' pictures, as JPEGs in Parquet files."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from avsep import media, shards, storage
from avsep.fetching import MediaStore
from avsep.looks import Looking
from avsep.records import ClipError, Segment

_JPEG_QUALITY = 90
_SCHEMA = pa.schema([("segment_id", pa.string()), ("pictures", pa.list_(pa.binary()))])


def album_name(split: str, shard: shards.Shard) -> str:
    """Name the album of a shard's pictures; other excerpts under the same ids get another name."""
    excerpts = [(s.segment_id, s.source, s.start_s, s.end_s) for s in shard.segments]
    return f"{split}-{shard.name}-{hashlib.sha256(json.dumps(excerpts).encode()).hexdigest()[:8]}.parquet"


def keep_images(path: str, looking: Looking, segments: Sequence[Segment], store: MediaStore | None) -> tuple[int, int]:
    """Write the middles of some segments' pictures to an album; return how many have any, and how many can't be had.

    `store` has the media of remote segments.
    """
    clips, missing = [], 0
    for segment in segments:
        try:
            s = store.locate(segment) if store else segment
            with storage.local_file(s.source) as file:
                images = looking(media.decode(file, s.start_s, s.end_s).images).crops
        except (ClipError, FileNotFoundError, ValueError):
            missing += 1
            continue
        if len(images):
            clips.append((segment.segment_id, images))
    write_album(path, clips)
    return len(clips), missing


def write_album(path: str, clips: Sequence[tuple[str, NDArray[np.uint8]]]) -> None:
    """Write clips' pictures, each `(n, height, width, 3)`, as JPEGs in one Parquet file."""
    rows = [{"segment_id": i, "pictures": [_jpeg(x) for x in images]} for i, images in clips]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer)
    storage.write_bytes(path, buffer.getbuffer())


def read_album(path: str) -> list[tuple[str, list[bytes]]]:
    """Read each clip's id and JPEGs."""
    return [(row["segment_id"], row["pictures"]) for row in shards.read_table(path).to_pylist()]


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def open_images(jpegs: Sequence[bytes]) -> NDArray[np.uint8]:
    """Decode JPEGs of one size, `(n, height, width, 3)`."""
    return np.stack([np.asarray(Image.open(io.BytesIO(j))) for j in jpegs])
