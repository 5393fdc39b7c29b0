"""Tables of public sets, MUSIC, AVE and VGGSound, to segments with each set's own vocabulary.

A row names a video and a label. A label is what can be heard and seen there, so it gives both `objects` and `labels`.
Labels become objects by the set's own vocabulary; where another one is asked for, by the names that they have in both.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from avsep import audioset, storage, tables
from avsep.audioset import BadLine, Counts
from avsep.fetching import ave, youtube
from avsep.manifest import Block, Plan, Report, check_exist, line_blocks, read_lines, with_report
from avsep.objects import AUDIOSET_23, SoundObject, Vocabulary
from avsep.records import SEGMENT_SCHEMA, SPLITS

MUSIC_STARTS_S = (10, 30, 50, 70, 90, 110)  # of a video's excerpts: its length isn't in the table
MUSIC_TEST_PERCENT = 10  # of the videos, beside AudioSet's VAL_PERCENT
EXCERPT_S = 10  # in MUSIC, and in VGGSound as published; AVE's files are as long
_VOCABULARIES = Path(__file__).with_name("vocabularies")
_SCHEMA = SEGMENT_SCHEMA.append(pa.field("line", pa.int64())).append(pa.field("text", pa.string()))


@dataclass(frozen=True)
class Row:
    """A row of a set's table: excerpts of one video under one label, or a problem."""

    line: int  # in its block, from 1
    text: str
    label: str = ""
    video: str = ""
    times: tuple[tuple[float, float], ...] = ()  # seconds
    split: str = ""
    problem: str = ""


@functools.cache
def vocabulary(name: str) -> Vocabulary:
    """Read one of the vocabularies that come with the package: `music_11`, `music_21` or `ave_28`.

    >>> vocabulary("ave_28").find("Violin, fiddle"), vocabulary("ave_28").find("Bark")
    ('violin', 'dog')
    """
    return Vocabulary.parse((_VOCABULARIES / f"{name}.csv").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------ labels


@functools.lru_cache(maxsize=4096)
def objects_of(label: str, own: Vocabulary, asked: Vocabulary | None = None) -> tuple[str, ...]:
    """Return the objects that a label means in `asked` (default: the set's `own` vocabulary); none where it lacks them.

    A label may name several objects, as `cello violin` does. Of another vocabulary an object is taken that has the
    label as name or alias, else one that has the own object's name, else the only one that has one of its aliases.
    Raises ValueError for a label that the set doesn't have.

    >>> objects_of("cello violin", vocabulary("music_11")), objects_of("Bark", vocabulary("ave_28"), AUDIOSET_23)
    (('cello', 'violin'), ('dog',))
    """
    try:
        names: tuple[str, ...] = (own.find(label),)
    except ValueError as error:
        words = label.split()
        try:
            names = tuple(dict.fromkeys(own.find(word) for word in words)) if len(words) > 1 else ()
        except ValueError:
            names = ()
        if not names:
            raise ValueError(f"label: {error}") from None
    if asked is None:
        return names
    found = []
    for name in names:
        one = own.objects[own.index(name)]
        typed = [[label]] if len(names) == 1 else []
        meant = (_found(asked, group) for group in (*typed, [name], one.aliases))
        found.append(next((next(iter(some)) for some in meant if len(some) == 1), None))
    return tuple(dict.fromkeys(name for name in found if name is not None))


def _found(asked: Vocabulary, names: Iterable[str]) -> set[str]:
    """Return the objects that names mean; one that is unknown or ambiguous means none."""
    found = set()
    for name in names:
        try:
            found.add(asked.find(name))
        except ValueError:
            continue
    return found


def vocabulary_of(labels: Iterable[str]) -> Vocabulary:
    """Make VGGSound's vocabulary of its labels: an object per label, in sorted order of the labels.

    A label that is the only one for one of the default's 23 objects gives that object, such as `violin`; each other
    label gives an object of its own, with the look of one of the 23 where it has it: `dog_barking` looks like a dog.
    Labels that can't be names of objects are left out.

    >>> v = vocabulary_of(["playing violin, fiddle", "dog barking", "dog howling", "playing oboe"])
    >>> v.names, v.find("playing violin, fiddle"), v.find("oboe"), v.objects[0].imagenet[0]
    (('dog_barking', 'dog_howling', 'playing_oboe', 'violin'), 'violin', 'playing_oboe', 151)
    """
    same = vocabulary("vggsound_23")
    made: dict[str, SoundObject] = {}
    for label in sorted(set(labels)):
        try:
            one = _object_of(label, same)
        except ValueError:
            continue
        key = one.name.replace("_", "")
        before = made.get(key)
        made[key] = replace(before, aliases=tuple(dict.fromkeys((*before.aliases, label)))) if before else one
    own = {_key(o.name) for o in made.values()}
    objects = (replace(o, aliases=tuple(a for a in o.aliases if _key(a) not in own)) for o in made.values())
    return Vocabulary(tuple(objects))


def _object_of(label: str, same: Vocabulary) -> SoundObject:
    """Return a label's object; ValueError where it can't be a name. `same` has VGGSound's labels for the 23."""
    parts = [part.strip() for part in label.removeprefix("playing ").split(",")]
    others = [label, *(part for part in parts if part and part != label)]
    twin = next((o for o in same if label in o.aliases), None)
    default = AUDIOSET_23.objects[AUDIOSET_23.index(twin.name)] if twin else None
    if twin and default and len(twin.aliases) == 1:
        return replace(default, aliases=tuple(dict.fromkeys((*others, *default.aliases))))
    if default:
        aliases = (*others, default.name)
        return SoundObject(name_of(label), default.imagenet, (), aliases, default.published, default.sound)
    return SoundObject(name_of(label), aliases=tuple(others), sound="pitched" if parts[0] != label else "unpitched")


def name_of(label: str) -> str:
    """Turn a label into an object's name.

    >>> name_of("police car (siren)")
    'police_car_siren'
    """
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "_", plain).strip("_")


def _key(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


# ------------------------------------------------------------------------------------ rows


def music_rows(data: bytes) -> Iterator[Row]:
    """Read a file of MUSIC: `{"videos": {"cello": [ID, …], "cello violin": […]}}`; rows are numbered as they come.

    A video is cut into excerpts of EXCERPT_S at MUSIC_STARTS_S. MUSIC has no splits: `val` and `test` are shares of the
    videos by a hash of their ids, so all excerpts of one are together. Raises ValueError where it is no such file.
    """
    try:
        raw = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_loss)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from None
    videos = raw.get("videos") if isinstance(raw, dict) else None
    if not isinstance(videos, dict):
        raise ValueError('has no object "videos" with lists of ids by instrument')
    times = tuple((float(s), float(s + EXCERPT_S)) for s in MUSIC_STARTS_S)
    named = ((label, v) for label, some in videos.items() for v in (some if isinstance(some, list) else [some]))
    for line, (label, video) in enumerate(named, 1):
        text = json.dumps({label: video}, ensure_ascii=False)
        if not isinstance(video, str):
            yield Row(line, text, problem=f"id is {json.dumps(video)}; it must be a text")
        else:
            yield _checked(Row(line, text, label, video.strip(), times, _split_of(video.strip())))


def _without_loss(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; lists under one name twice are put together."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        both = isinstance(made.get(key), list) and isinstance(value, list)
        made[key] = [*made[key], *value] if both else value
    return made


def _split_of(video: str) -> str:
    percent = audioset.hash_percent(video)
    return "val" if percent < audioset.VAL_PERCENT else "test" if percent >= 100 - MUSIC_TEST_PERCENT else "train"


def ave_rows(block: bytes, split: str) -> Iterator[Row]:
    """Read whole lines of AVE's tables, `Category&VideoID&Quality&StartTime&EndTime`; the header is no row.

    The excerpt is the event, and its times are those of the file of ten seconds.
    """
    for line, text in _lines(block):
        cells = [cell.strip() for cell in text.split("&")]
        if [cell.casefold() for cell in cells[:2]] == ["category", "videoid"]:
            continue
        if len(cells) != 5:
            said = f"{len(cells)} cells; a row is Category&VideoID&Quality&StartTime&EndTime"
            yield Row(line, text, problem=said)
            continue
        label, video, _, *times = cells
        start_s, end_s = map(_seconds, times)
        row = Row(line, text, label, video, ((start_s, end_s),), split)
        if not 0 <= start_s <= EXCERPT_S or not 0 <= end_s <= EXCERPT_S:
            problem = f"times are {times[0]!r} and {times[1]!r}; they must be seconds from 0 to {EXCERPT_S}"
            yield replace(row, problem=problem)
        elif end_s <= start_s:
            yield replace(row, problem=f"EndTime is {times[1]}; it must come after StartTime = {times[0]}")
        else:
            yield _checked(row)


def vggsound_rows(block: bytes) -> Iterator[Row]:
    """Read whole lines of VGGSound's table, `YouTubeID,start second,label,train|test`; excerpts have EXCERPT_S.

    Comments (`#`), and a header whose last cell speaks of the split, are no rows.
    """
    for line, text in _lines(block):
        if text.startswith("#"):
            continue
        try:
            cells = [cell.strip() for cell in next(csv.reader([text], skipinitialspace=True, strict=True))]
        except csv.Error as error:
            yield Row(line, text, problem=f"broken quoting: {error}")
            continue
        if line == 1 and "split" in cells[-1].casefold():
            continue
        if len(cells) != 4:
            yield Row(line, text, problem=f"{len(cells)} cells; a row is YouTubeID,start second,label,train|test")
            continue
        video, start, label, split = cells
        start_s = _seconds(start)
        row = Row(line, text, label, video, ((start_s, start_s + EXCERPT_S),), split.lower())
        if not 0 <= start_s < audioset.MAX_SECONDS:
            yield replace(row, problem=f"start is {start!r}; it must be a time in seconds from 0 up")
        elif row.split not in ("train", "test"):
            yield replace(row, problem=f"split is {split!r}; it must be train or test")
        else:
            yield _checked(row)


def _lines(block: bytes) -> Iterator[tuple[int, str]]:
    """Number whole lines from 1; blank ones are left out."""
    for number, line in enumerate(block.split(b"\n"), 1):
        if text := line.decode("utf-8", "replace").strip():
            yield number, text


def _checked(row: Row) -> Row:
    if not re.fullmatch("[0-9A-Za-z_-]+", row.video):
        return replace(row, problem=f"id is {row.video!r}; it must be letters, digits, _ and -")
    return row


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# ------------------------------------------------------------------------------------ segments


def to_segments(
    block: Block, rows: Iterable[Row], scheme: str, own: Vocabulary, asked: Vocabulary | None, n_lines: int
) -> Iterator[pa.Table | Report]:
    """Give a block's report and the segments of its rows, SEGMENT_SCHEMA with `line` and `text`.

    A row with a problem, or with a label that the set doesn't have, is reported as bad; excerpts without an object of
    the asked vocabulary are counted as `no_object`. A row counts as many times as it has excerpts, a bad one once.
    """
    counts: Counts = Counter({("rows", block.uri): 0})
    bad: list[BadLine] = []
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for row in rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            names = objects_of(row.label, own, asked)
        except ValueError as error:
            counts["rows", block.uri] += 1
            bad.append(BadLine(row.line, str(error), row.text))
            continue
        counts["rows", block.uri] += len(row.times)
        if not names:
            counts["dropped", "no_object"] += len(row.times)
            continue
        for start_s, end_s in row.times:
            ends = (start_s, end_s) if scheme == ave.SCHEME else (start_s,)
            segment_id = "_".join((row.video, *(f"{1000 * t:.0f}" for t in ends)))
            source = f"{scheme}:{row.video}"
            values = (segment_id, source, start_s, end_s, row.split, names, names, row.line, row.text)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    yield from with_report(block, [pa.table(columns, schema=_SCHEMA)], bad, n_lines, counts)


def plan_music(uris: Sequence[str], asked: Vocabulary | None = None) -> Plan:
    """Check MUSIC's JSON files → how to read them. Raises ValueError or OSError."""
    check_exist(uris)
    rows: list[Row] = []
    for uri in uris:
        try:
            rows += music_rows(storage.read_bytes(uri))
        except ValueError as error:
            raise ValueError(f"{uri} {error}; give MUSIC_solo_videos.json or another of MUSIC's files") from None
    few, own = vocabulary("music_11"), vocabulary("music_21")
    ours = [row.label for row in rows if not row.problem and _has(own, row.label)]
    if not ours:
        raise ValueError(f"{', '.join(uris)}: none of the videos has one of MUSIC's instruments; {_first(rows, own)}")
    if all(_has(few, label) for label in ours):
        own = few

    def read(block: Block) -> Iterator[pa.Table | Report]:
        found = list(music_rows(storage.read_bytes(block.uri)))
        yield from to_segments(block, found, youtube.SCHEME, own, asked, len(found))

    *starts, last = map(str, MUSIC_STARTS_S)
    note = (
        f"MUSIC: {len({r.video for r in rows if not r.problem}):,} videos, each with excerpts of {EXCERPT_S} s at "
        f"{', '.join(starts)} and {last} s; what lies beyond a video's end becomes a rejection of extract"
    )
    blocks = [Block(file, 0, uri, 0, 0) for file, uri in enumerate(uris)]
    return Plan(blocks, read, [note], asked or own, "merged")


def plan_ave(uris: Sequence[str], asked: Vocabulary | None = None) -> Plan:
    """Check AVE's Annotations.txt, and its files of splits → how to read them. Raises ValueError or OSError.

    A file is one of splits if its name says so, as trainSet.txt; their rows are those of Annotations.txt again, so that
    is asked only for rows in none of them, which are bad.
    """
    check_exist(uris)
    own = vocabulary("ave_28")
    splits = [_split_named(uri) for uri in uris]
    listed: set[Any] = set()
    for uri, split in zip(uris, splits, strict=True):
        rows = list(ave_rows(_text(uri), split or "train"))
        _check_rows(uri, rows, own, "AVE's files, Annotations.txt or trainSet.txt")
        listed |= {_identity(row) for row in rows} if split else set()
    sets = ", ".join(storage.name(uri) for uri, split in zip(uris, splits, strict=True) if split)

    def read(block: Block) -> Iterator[pa.Table | Report]:
        data, split = _block_text(block), splits[block.file]
        rows: Iterable[Row] = ave_rows(data, split or "train")
        if sets and not split:
            problem = f"in none of {sets}, so its split isn't known"
            left = (row for row in rows if _identity(row) not in listed)
            rows = (row if row.problem else replace(row, problem=problem) for row in left)
        yield from to_segments(block, rows, ave.SCHEME, own, asked, _n_lines(data))

    notes = (
        [] if sets else ["AVE: no trainSet.txt, valSet.txt or testSet.txt is given: every segment is in split train"]
    )
    return Plan(line_blocks(uris), read, notes, asked or own, "merged")


def plan_vggsound(uri: str, asked: Vocabulary | None = None) -> Plan:
    """Check VGGSound's CSV, and make its vocabulary → how to read it. Raises ValueError or OSError."""
    check_exist([uri])
    blocks = line_blocks([uri])
    labels = {row.label for block in blocks for row in vggsound_rows(_block_text(block)) if not row.problem}
    try:
        own = vocabulary_of(labels)
    except ValueError:  # of no label
        own = AUDIOSET_23
    _check_rows(uri, vggsound_rows(_block_text(blocks[0])), own, "VGGSound's table, vggsound.csv")

    def read(block: Block) -> Iterator[pa.Table | Report]:
        data = _block_text(block)
        yield from to_segments(block, vggsound_rows(data), youtube.SCHEME, own, asked, _n_lines(data))

    return Plan(blocks, read, [], asked or own, "merged")


PLANS: dict[str, Callable[[list[str], Vocabulary | None], Plan]] = {  # by the option that names a set's files
    "music": plan_music,
    "ave": plan_ave,
    "vggsound": lambda uris, asked: plan_vggsound(uris[0], asked),
}


def _split_named(uri: str) -> str | None:
    name = os.path.splitext(storage.name(uri))[0].casefold()
    return next((split for split in SPLITS if name.startswith(split)), None)


def _identity(row: Row) -> Any:
    """Return what a row of one of AVE's files has in common with the same row of another."""
    return row.text if row.problem else (row.video, row.label.casefold(), row.times)


def _has(own: Vocabulary, label: str) -> bool:
    try:
        return bool(objects_of(label, own))
    except ValueError:
        return False


def _check_rows(uri: str, rows: Iterable[Row], own: Vocabulary, what: str) -> None:
    """Raise ValueError where no row is usable; the first one says why."""
    some = []
    for row in rows:
        if not row.problem and _has(own, row.label):
            return
        some.append(row)
        if len(some) == 1000:
            break
    raise ValueError(f"{uri} is none of {what}: {_first(some, own)}")


def _first(rows: Sequence[Row], own: Vocabulary) -> str:
    if not rows:
        return "it has no row"
    problem = rows[0].problem
    try:
        objects_of(rows[0].label, own)
    except ValueError as error:
        problem = problem or str(error)
    return f"line {rows[0].line}: {problem}"


def _text(uri: str) -> bytes:
    return b"".join(_block_text(block) for block in line_blocks([uri]))


def _block_text(block: Block) -> bytes:
    data = read_lines(block)
    if block.index == 0 and (written := tables.encoding(data[:4])).startswith("utf-16"):
        raise ValueError(f"{block.uri} is written in {written.upper()}; save it as UTF-8")
    return tables.plain_lines(data, first=block.index == 0)


def _n_lines(data: bytes) -> int:
    return data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
