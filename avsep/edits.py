"""What somebody corrects of a separation by hand, as a value: written and read as JSON, or made with a mouse.

    {
      "moves": [{"window": 0, "basis": 3, "to": "violin"}, {"window": 0, "basis": 7, "to": "_rest"}],
      "add": ["dog"],
      "remove": ["cat"],
      "spans": [{"start_s": 2.0, "end_s": 4.5, "object": "violin", "present": false}]
    }

Windows and bases are counted from 0, as `separation.json` lists them. All but what is wanted can be left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from avsep.objects import REST

_MOST = 10_000  # moves, and spans
_SAME_S = 0.1  # durations of one sound, as two decoders tell them


@dataclass(frozen=True)
class Move:
    """One basis of one window goes to an object, or to the rest, as a whole."""

    window: int  # counted from 0
    basis: int  # counted from 0
    to: str


@dataclass(frozen=True)
class Span:
    """From `start_s` to before `end_s` an object sounds, or doesn't."""

    start_s: float
    end_s: float
    object: str
    present: bool

    def __post_init__(self) -> None:
        if not 0 <= self.start_s < self.end_s:
            raise ValueError(
                f"the edits' span of {self.object} is {self.start_s:g} s to {self.end_s:g} s; it must start at 0 or "
                "later and end after that"
            )

    def overlaps(self, start_s: float, end_s: float) -> bool:
        """Whether it has time in common with another stretch."""
        return self.start_s < end_s and start_s < self.end_s


@dataclass(frozen=True)
class Edits:
    """Corrections of one separation. Each is made on what the model decided; their order changes nothing.

    Taken away objects leave their sound to what else is there. Added ones get a least share, where the model likeliest
    hears them. Then bases move, as a whole. Last, an object gives up its sound where a span says that it is silent.
    Raises ValueError for edits that contradict each other.

    >>> edits = Edits.from_json('{"moves": [{"window": 0, "basis": 3, "to": "violin"}], "remove": ["cat"]}')
    >>> edits.objects(["cat", "dog"])
    ('dog', 'violin')
    """

    moves: tuple[Move, ...] = ()
    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    duration_s: float | None = None  # of the sound they were made for; None: whatever sound

    def __post_init__(self) -> None:
        if len(self.moves) > _MOST or len(self.spans) > _MOST:
            raise ValueError(
                f"the edits have {len(self.moves)} moves and {len(self.spans)} spans; {_MOST} are the most of each"
            )
        moved = {(m.window, m.basis): m.to for m in self.moves}
        if len(moved) < len(self.moves):
            twice = next(m for m in self.moves if self.moves.count(m) > 1 or moved[m.window, m.basis] != m.to)
            raise ValueError(f"the edits move basis {twice.basis} of window {twice.window} twice; give one move")
        wanted = {*self.add, *(m.to for m in self.moves), *(s.object for s in self.spans)}
        if both := sorted(wanted & set(self.remove)):
            raise ValueError(f"the edits take {both[0]} away and use it, too; leave it out of 'remove', or elsewhere")
        ends: dict[tuple[str, bool], float] = {}
        for s in sorted(self.spans, key=lambda s: s.start_s):
            if s.start_s < ends.get((s.object, not s.present), 0.0):
                raise ValueError(
                    f"the edits say that {s.object} sounds and is silent at {s.start_s:g} s; let the spans not overlap"
                )
            ends[s.object, s.present] = max(s.end_s, ends.get((s.object, s.present), 0.0))

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.moves or self.add or self.remove or self.spans)

    @classmethod
    def from_json(cls, text: str | bytes) -> Edits:
        """Read what `to_json` gave, or somebody wrote; ValueError says in a line what is wrong."""
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"the edits are no JSON ({error}); see `avsep separate --help` for an example") from None

    @classmethod
    def from_dict(cls, raw: Any) -> Edits:
        """Read JSON's values; ValueError says in a line what is wrong."""
        names = ("moves", "add", "remove", "spans", "duration_s")
        _check_names(raw, "the edits", names, ())
        lists = {name: raw.get(name, []) for name in names[:-1]}
        for name, found in lists.items():
            if not isinstance(found, list):
                raise ValueError(f"the edits' {name} are {found!r:.40}; give a list")
        moves, spans = [], []
        for number, entry in enumerate(lists["moves"]):
            _check_names(entry, f"the edits' moves[{number}]", ("window", "basis", "to"), ("basis", "to"))
            window = _whole(entry.get("window", 0), f"moves[{number}].window")
            basis = _whole(entry["basis"], f"moves[{number}].basis")
            moves.append(Move(window, basis, _name(entry["to"], f"moves[{number}].to")))
        for number, entry in enumerate(lists["spans"]):
            keys = ("start_s", "end_s", "object", "present")
            _check_names(entry, f"the edits' spans[{number}]", keys, keys)
            start_s, end_s = (_seconds(entry[key], f"spans[{number}].{key}") for key in keys[:2])
            if not isinstance(entry["present"], bool):
                raise ValueError(f"the edits' spans[{number}].present is {entry['present']!r:.40}; it is true or false")
            spans.append(Span(start_s, end_s, _name(entry["object"], f"spans[{number}].object"), entry["present"]))
        add, remove = (tuple(_name(n, name) for n in lists[name]) for name in ("add", "remove"))
        duration_s = raw.get("duration_s")
        if duration_s is not None:
            duration_s = _seconds(duration_s, "duration_s")
        return cls(tuple(moves), add, remove, tuple(spans), duration_s)

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it, for `from_dict`."""
        lists = {name: [*getattr(self, name)] for name in ("add", "remove")}
        entries = {name: [asdict(e) for e in getattr(self, name)] for name in ("moves", "spans")}
        return {**entries, **lists, **({} if self.duration_s is None else {"duration_s": self.duration_s})}

    def to_json(self) -> str:
        """Write it, for `from_json`."""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def named(self, find: Callable[[str], str]) -> Edits:
        """Return it with the names that `find` gives for those typed, as `Vocabulary.find`, which may raise."""
        return replace(
            self,
            moves=tuple(replace(m, to=m.to if m.to == REST else find(m.to)) for m in self.moves),
            add=tuple(dict.fromkeys(map(find, self.add))),
            remove=tuple(dict.fromkeys(map(find, self.remove))),
            spans=tuple(replace(s, object=find(s.object)) for s in self.spans),
        )

    def objects(self, there: Sequence[str]) -> tuple[str, ...]:
        """Return the objects that are there afterwards: those of before, then new ones in the order they're named."""
        new = [*self.add, *(m.to for m in self.moves if m.to != REST), *(s.object for s in self.spans if s.present)]
        return tuple(dict.fromkeys(n for n in (*there, *new) if n not in self.remove))

    def check(self, there: Sequence[str], n_bases: Sequence[int], duration_s: float) -> None:
        """Raise ValueError where they can't be of a separation into such objects, windows of so many bases each."""
        if self.duration_s is not None and abs(self.duration_s - duration_s) > _SAME_S:
            raise ValueError(
                f"the edits are of a sound of {self.duration_s:.2f} s, and this one lasts {duration_s:.2f} s; "
                "give the file that they were made for"
            )
        for m in self.moves:
            if m.window >= len(n_bases):
                raise ValueError(f"the edits move a basis of window {m.window}; {_counted(len(n_bases), 'window')}")
            if m.basis >= n_bases[m.window]:
                of = f"basis {m.basis} of window {m.window}"
                raise ValueError(f"the edits move {of}; {_counted(n_bases[m.window], 'basis', 'bases')}")
        silenced = {s.object for s in self.spans if not s.present}
        for name in (*self.remove, *sorted(silenced)):
            if name not in self.objects(there) and name not in there:
                has = f"it has {', '.join(there)}" if there else "it has no object"
                raise ValueError(f"the edits silence {name}, which isn't in this separation; {has}")
        for s in self.spans:
            if s.start_s >= duration_s:
                raise ValueError(
                    f"the edits' span of {s.object} starts at {s.start_s:g} s, and the sound ends at {duration_s:.2f} s"
                )

    def labels(self, there: Sequence[str], start_s: float = 0.0, end_s: float = math.inf) -> list[str]:
        """Say which objects sound from `start_s` to `end_s`, sorted, where `there` did before: a segment's labels.

        Those that spans silence throughout are none of them; those that only spans make sound are, where these do.
        """
        always = {*there, *self.add, *(m.to for m in self.moves if m.to != REST)}
        marked = {s.object for s in self.spans if s.present and s.overlaps(start_s, end_s)}
        silent = {n for n in always - marked if self._silences(n, start_s, end_s)}
        return sorted((always | marked) - silent - set(self.remove))

    def _silences(self, name: str, start_s: float, end_s: float) -> bool:
        reached = start_s
        for s in sorted((s for s in self.spans if s.object == name and not s.present), key=lambda s: s.start_s):
            if s.start_s <= reached:
                reached = max(reached, s.end_s)
        return reached >= end_s


def _counted(n: int, one: str, more: str = "") -> str:
    return f"there {'is' if n == 1 else 'are'} {n} {one if n == 1 else more or one + 's'}, counted from 0"


def _check_names(raw: Any, what: str, names: Sequence[str], needed: Sequence[str]) -> None:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{what} are {raw!r:.40}; give an object with {', '.join(names)}")
    if unknown := sorted(set(raw) - set(names)):
        raise ValueError(f"{what} have {unknown[0]!r:.40}; there are {', '.join(names)}")
    if missing := [name for name in needed if name not in raw]:
        raise ValueError(f"{what} lack {missing[0]!r}; give {', '.join(needed)}")


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"the edits' {what} is {value!r:.40}; it is a whole number, from 0")
    return value


def _seconds(value: Any, what: str) -> float:
    try:
        seconds = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"the edits' {what} is {value!r:.40}; it is a number of seconds")
    return seconds


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the edits' {what} is {value!r:.40}; it is an object's name")
    return value
