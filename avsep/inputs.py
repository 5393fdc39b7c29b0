"""Which files people mean, what each is called, and which of them can't be used, as far as that is seen at once."""

from __future__ import annotations

import fnmatch
import glob
import os
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from avsep import media, storage
from avsep.files import SUFFIXES
from avsep.outputs import Output, Shape
from avsep.records import ClipError, Reason

_NAMED = 5  # files that are left out
_UNNAMED = str.maketrans({"\0": "", "\\": "_", "\r": "_", "\n": "_"})  # in names of files, for those of folders
_REMEDIES = {
    Reason.MISSING: "check the path",
    Reason.NO_AUDIO: "give a file with sound",
    Reason.NO_VIDEO: "give a file with pictures, or leave out --video",
    Reason.UNREADABLE: "give a video or sound that ffmpeg reads",
}


def find_files(named: Sequence[str], suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[str], list[str]]:
    """Find the files that paths, folders and patterns name, each once.

    Of a folder they are those whose names end so: as a rule, of videos or sounds. What else is in it comes second.
    Raises FileNotFoundError where nothing is found.
    """
    found: dict[str, str] = {}
    left_out: list[str] = []
    for text in named:
        for path in _matches(text):
            files = [path]
            if _is_folder(path):
                inside = [f for f in storage.list_files(path) if not storage.name(f).startswith(".")]
                files = [f for f in inside if f.lower().endswith(suffixes)]
                left_out += [f for f in inside if f not in files]
                if not files:
                    raise FileNotFoundError(
                        f"{path} is a folder without videos{' or sounds' * (suffixes == SUFFIXES)}; name files"
                    )
            for file in files:
                found.setdefault(file if storage.is_uri(file) else os.path.abspath(file), file)
    return list(found.values()), left_out


def describe_left_out(files: Sequence[str], suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """Say which files of folders weren't taken."""
    what = "neither video nor sound" if suffixes == SUFFIXES else "no video"
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return f"left out, as {what} by their names: {', '.join(files[:_NAMED])}{more}"


def _matches(text: str) -> list[str]:
    """Return the paths that match a pattern; a path itself."""
    if not set(text) & set("*?[") or text.startswith(("http://", "https://")) or os.path.exists(text):
        return [text]
    if storage.is_uri(text):
        folder, pattern = storage.parent(text), storage.name(text)
        paths = [f for f in storage.list_files(folder) if fnmatch.fnmatchcase(storage.name(f), pattern)]
    else:
        paths = sorted(glob.glob(text))
    if not paths:
        raise FileNotFoundError(f"{text} matches no file; check the path or pattern")
    return paths


def _is_folder(path: str) -> bool:
    if path.startswith(("http://", "https://")) or storage.is_opaque(path):
        return False
    return storage.is_directory(path) if storage.is_uri(path) else os.path.isdir(path)


def distinct(files: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Name files by their stems; where these collide by their names, by their folders, too, and at last by numbers.

    No two names, and none and one that is `taken`, differ by case alone.

    >>> distinct(["a/duet.mp4", "b/duet.mp4", "b/Duet.wav", "solo.wav"])
    ['a-duet.mp4', 'b-duet.mp4', 'Duet.wav', 'solo']
    """
    names = [""] * len(files)
    others = {name.casefold() for name in taken}
    pending = list(range(len(files)))
    for level in range(3):
        for i in pending:
            names[i] = _name(files[i], level)
        counts = Counter([*(name.casefold() for name in names), *others])
        pending = [i for i in pending if counts[names[i].casefold()] > 1]
    left = set(pending)
    used = others | {names[i].casefold() for i in range(len(files)) if i not in left}
    for i in pending:
        name, number = names[i], 1
        while names[i].casefold() in used:
            number += 1
            names[i] = f"{name}-{number}"
        used.add(names[i].casefold())
    return names


def _name(file: str, level: int) -> str:
    """Return a file's stem, its name, or its folder's and its name."""
    if file.startswith(("http://", "https://")):
        address = urllib.parse.urlsplit(file)
        file = f"{address.netloc}{urllib.parse.unquote(address.path)}"
    parts = os.fsencode(file).decode("utf-8", "replace").translate(_UNNAMED).rstrip("/").split("/")
    name = parts[-1] if parts[-1] not in ("", ".", "..") else "sound"
    if level == 2 and len(parts) > 1 and parts[-2] not in ("", ".", ".."):
        return f"{parts[-2]}-{name}"
    stem = name.rpartition(".")[0].rstrip(". ")
    return stem if level == 0 and stem else name


def usable(files: Sequence[str], check: Callable[[Path], None], tell: Callable[[str, Exception], None]) -> list[str]:
    """Return the files that `check` takes by their headers, before anything is loaded; `tell` of the others.

    Files elsewhere are taken as they are: it would take them to come.
    """
    good = []
    for file in files:
        try:
            if not storage.is_uri(file):
                with storage.local_file(file) as path:  # under a name that ffmpeg can be given
                    check(path)
        except (ClipError, OSError, ValueError) as error:
            tell(file, error)
        else:
            good.append(file)
    return good


def check_sound(path: Path, track: int, output: Output) -> None:
    """Raise ClipError for a file without such a track or wanted pictures, ValueError where a format can't hold it."""
    rate, listening = media.as_it_is(path, track=track)
    if not output.mono:
        output.check(Shape(rate, listening.n_channels))
    if output.video:
        media.video_container(path)


def check_pictures(path: Path) -> None:
    """Raise ClipError for a file that can't be read, or has no pictures."""
    if not media.probe(path).has_video:
        raise ClipError(Reason.NO_VIDEO, "no pictures")


def remedy(error: ClipError) -> str:
    """Say what to do about a file that can't be used."""
    if error.reason is Reason.NO_AUDIO and "audio track" in str(error):
        return "give another --track"
    return _REMEDIES.get(error.reason, "give another file, or copy it again")
