"""An export as Croissant 1.0 describes data sets: JSON-LD, for search engines and for loaders.

The format: https://docs.mlcommons.org/croissant/docs/croissant-spec.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
_ENCODING = {"tar": "application/x-tar", "parquet": "application/x-parquet"}
_CONTEXT: dict[str, Any] = {  # the specification's own
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}

_COLUMNS = {  # what they mean
    "segment_id": "the clip's name",
    "source": "the file or address that the clip is an excerpt of",
    "start_s": "where the excerpt starts in the source, in seconds",
    "end_s": "where it ends, in seconds; null: at the source's end",
    "split": "train, val or test",
    "objects": "those known to be audible; null where that isn't known",
    "labels": "weak labels, given or decided from the pictures; null where nobody looked",
    "label_source": "given, pictures or none",
    "duration_s": "how long the clip is, in seconds",
    "media_sha256": "the hash of the media file",
    "audio_scale": "the waveform is the decoded sound times this; 1 unless samples exceed full scale",
    "audio": "the sound: mono, FLAC of 16 bits",
    "images": "one picture a second, JPEG",
    "image": "the picture of one second, JPEG",
}


def describe(
    name: str,
    url: str,
    published: str,
    description: str,
    files: Iterable[tuple[str, int, str]],
    columns: pa.Schema,
) -> dict[str, Any]:
    """Describe archives of `KEY.flac`, `KEY.json` and `KEY.0.jpg` …, or Parquet files with the same in columns.

    Args:
        name: of the data set.
        url: where it is.
        published: the day, as 2026-01-31.
        description: a sentence or two.
        files: path, relative to the description, size in bytes and SHA-256 of each; all of one kind.
        columns: what is known of a clip besides sound and pictures.
    """
    files = sorted(set(files))
    suffix = files[0][0].rpartition(".")[2] if files else "parquet"
    objects = [
        {
            "@type": "cr:FileObject",
            "@id": path,
            "name": path,
            "contentUrl": path,
            "contentSize": f"{size} B",
            "encodingFormat": _ENCODING[suffix],
            "sha256": sha256,
        }
        for path, size, sha256 in files
    ]
    held = [{"@id": o["@id"]} for o in objects]
    sets, records = (_archived if suffix == "tar" else _tabled)(held, columns)
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": name,
        "description": description,
        "url": url,
        "license": "unknown",
        "creator": {"@type": "sc:Organization", "name": "unknown"},
        "datePublished": published,
        "version": "1.0.0",
        "distribution": [*objects, *sets],
        "recordSet": records,
    }


def _archived(
    held: Sequence[Mapping[str, str]], columns: pa.Schema
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sets = [
        _file_set(kind, held, pattern, encoding)
        for kind, pattern, encoding in (
            ("descriptions", "*.json", "application/json"),
            ("sounds", "*.flac", "audio/flac"),
            ("pictures", "*.jpg", "image/jpeg"),
        )
    ]
    clips = [
        _field("clips", c.name, _type_of(c.type), "descriptions", {"jsonPath": f"$.{c.name}"}, _listed(c.type))
        for c in columns
    ]
    key = {"fileProperty": "filename"}
    content = {"fileProperty": "content"}
    sounds = [
        _field("sound", "key", "sc:Text", "sounds", key) | {"description": "the name, KEY.flac"},
        _field("sound", "audio", "sc:AudioObject", "sounds", content),
    ]
    pictures = [
        _field("picture", "key", "sc:Text", "pictures", key) | {"description": "the name, KEY.SECOND.jpg"},
        _field("picture", "image", "sc:ImageObject", "pictures", content),
    ]
    return sets, [_records("clips", clips), _records("sound", sounds), _records("picture", pictures)]


def _tabled(held: Sequence[Mapping[str, str]], columns: pa.Schema) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    fields = [_field("clips", c.name, _type_of(c.type), "tables", {"column": c.name}, _listed(c.type)) for c in columns]
    for name, kind, repeated in (("audio", "sc:AudioObject", False), ("images", "sc:ImageObject", True)):
        field = _field("clips", name, kind, "tables", {"column": name}, repeated)
        field["source"]["transform"] = {"jsonPath": "bytes"}
        fields.append(field)
    return [_file_set("tables", held, "*.parquet", _ENCODING["parquet"])], [_records("clips", fields)]


def _file_set(kind: str, held: Sequence[Mapping[str, str]], pattern: str, encoding: str) -> dict[str, Any]:
    inside = {"containedIn": list(held)} if encoding != _ENCODING["parquet"] else {}
    includes = pattern if inside else f"data/{pattern}"
    return {
        "@type": "cr:FileSet",
        "@id": kind,
        "name": kind,
        **inside,
        "encodingFormat": encoding,
        "includes": includes,
    }


def _records(name: str, fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "field": list(fields)}


def _field(
    records: str,
    name: str,
    kind: str,
    files: str,
    extract: Mapping[str, str],
    repeated: bool = False,
) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{records}/{name}",
        "name": name,
        "description": _COLUMNS.get(name, name),
        "dataType": kind,
        **({"repeated": True} if repeated else {}),
        "source": {"fileSet": {"@id": files}, "extract": dict(extract)},
    }


def _listed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind))


def _type_of(kind: pa.DataType) -> str:
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"
