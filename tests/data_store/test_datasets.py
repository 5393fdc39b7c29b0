"""MUSIC, AVE and VGGSound: their tables as published and as people pass them on, and each one's vocabulary."""

from __future__ import annotations

import csv
import json
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsep import datasets
from avsep.objects import AUDIOSET_23, Vocabulary
from avsep.records import Segment, read_segments, read_vocabulary
from pipelines import manifest

LETTERS = np.array(list(string.ascii_letters + string.digits + "_-"))
DEFAULT = str(Path(datasets.__file__).parents[1] / "audioset_23.csv")


def ids(n: int, seed: int = 0) -> list[str]:
    """Different ids as YouTube's, the first with a dash in front."""
    rng = np.random.default_rng(seed)
    return [f"-{''.join(rng.choice(LETTERS, 7))}{i:03}"[:11] for i in range(n)]


def made(out: Path) -> tuple[list[Segment], dict[str, Any], list[dict[str, Any]]]:
    """What a run wrote: segments, statistics, dead letters. The rows add up."""
    said = json.loads((out / "statistics.json").read_text())
    assert said["rows"] == said["kept"] + sum(said["dropped"].values()) + said["dead_letters"]
    letters = [json.loads(line) for line in (out / "dead_letters.jsonl").read_text().splitlines()]
    segments = read_segments(str(out))
    assert len(segments) == said["kept"] and len(letters) == said["dead_letters"]
    return segments, said, letters


def write(path: Path, lines: Iterable[str], end: str = "\n", mark: bytes = b"") -> str:
    path.write_bytes(mark + "".join(line + end for line in lines).encode())
    return str(path)


# --------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize(("name", "n"), [("music_11", 11), ("music_21", 21), ("ave_28", 28)])
def test_the_objects_that_the_default_has_too_are_the_same(name: str, n: int) -> None:
    own = datasets.vocabulary(name)
    assert len(own) == n
    both = [(o, AUDIOSET_23.objects[AUDIOSET_23.index(o.name)]) for o in own if o.name in AUDIOSET_23.names]
    assert len(both) >= 5
    for o, default in both:
        assert (o.imagenet, o.published, o.audioset, o.sound) == (
            default.imagenet, default.published, default.audioset, default.sound,
        )  # fmt: skip
        assert set(default.aliases) <= set(o.aliases)


def test_what_the_others_look_like_is_what_imagenet_calls_them() -> None:
    import torchvision

    called = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    others = {
        o.name: {called[i] for i in o.imagenet}
        for name in ("music_21", "ave_28")
        for o in datasets.vocabulary(name)
        if o.name not in AUDIOSET_23.names and o.imagenet
    }
    assert others == {
        "bassoon": {"bassoon"},
        "trumpet": {"cornet"},  # ImageNet's class is cornet, horn, trumpet, trump
        "xylophone": {"marimba"},
        "bus": {"minibus", "school bus", "trolleybus"},
        "chainsaw": {"chain saw"},
        "church_bell": {"bell cote"},
        "clock": {"analog clock", "digital clock", "wall clock"},
        "horse": {"sorrel"},
        "rodents": {"hamster", "guinea pig"},
        "toilet_flush": {"toilet seat"},
        "truck": {"fire engine", "garbage truck", "moving van", "tow truck", "trailer truck"},
    }


@pytest.mark.parametrize(
    ("own", "label", "in_own", "in_default"),
    [
        ("music_11", "acoustic_guitar", ("acoustic_guitar",), ("acoustic_guitar",)),
        ("music_11", "xylophone acoustic_guitar", ("xylophone", "acoustic_guitar"), ("marimba", "acoustic_guitar")),
        ("music_21", "erhu", ("erhu",), ()),
        ("ave_28", "Bark", ("dog",), ("dog",)),
        ("ave_28", "Race car, auto racing", ("car",), ("car",)),
        ("ave_28", "Frying (food)", ("frying",), ()),
        ("ave_28", "Fixed-wing aircraft, airplane", ("plane",), ("plane",)),
    ],
)
def test_labels_become_objects(own: str, label: str, in_own: tuple[str, ...], in_default: tuple[str, ...]) -> None:
    v = datasets.vocabulary(own)
    assert datasets.objects_of(label, v) == in_own
    assert datasets.objects_of(label, v, AUDIOSET_23) == in_default


def test_vggsound_s_labels_become_objects_of_their_own_and_of_the_default() -> None:
    labels = [label for o in datasets.vocabulary("vggsound_23") for label in o.aliases]
    labels += ["playing oboe", "people eating crisps", "police car (siren)", "vehicle horn, car horn, honking", "none"]
    v = datasets.vocabulary_of(labels)
    assert len(v) == len(labels) - 1  # the last one can't be an object's name
    own = {label: datasets.objects_of(label, v) for label in labels[:-1]}
    assert len(set(own.values())) == len(v) and all(len(names) == 1 for names in own.values())
    assert own["playing marimba, xylophone"] == ("marimba",) and own["dog barking"] == ("dog_barking",)
    assert own["police car (siren)"] == ("police_car_siren",)
    mapped = {label: datasets.objects_of(label, v, AUDIOSET_23) for label in own}
    assert {mapped[f"dog {what}"] for what in ("barking", "bow-wow", "howling")} == {("dog",)}
    assert mapped["playing violin, fiddle"] == ("violin",) and mapped["airplane"] == ("plane",)
    assert {names for names in mapped.values() if names} == {(name,) for name in AUDIOSET_23.names}
    assert mapped["playing oboe"] == mapped["people eating crisps"] == ()
    oboe = Vocabulary.of(["oboe", "car_horn"])
    assert datasets.objects_of("playing oboe", v, oboe) == ("oboe",)
    assert datasets.objects_of("vehicle horn, car horn, honking", v, oboe) == ("car_horn",)
    with pytest.raises(ValueError, match="ambiguous: dog_barking or dog_baying"):
        v.find("dog")


# ---------------------------------------------------------------------------------------- MUSIC

SOLO = [
    "accordion",
    "acoustic_guitar",
    "cello",
    "clarinet",
    "erhu",
    "flute",
    "saxophone",
    "trumpet",
    "tuba",
    "violin",
    "xylophone",
]


def music(path: Path, videos: dict[str, Sequence[Any]], indent: int | None = 4) -> str:
    path.write_text(json.dumps({"version": 1.0, "videos": videos}, indent=indent))
    return str(path)


def test_music_at_its_full_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Solos and duets, 50 videos of each; a video's excerpts are all in one split."""
    pairs = ("cello acoustic_guitar", "flute violin", "trumpet tuba")
    some = ids(50 * (len(SOLO) + len(pairs)))
    videos = {label: some[50 * i : 50 * i + 50] for i, label in enumerate((*SOLO, *pairs))}
    solo = music(tmp_path / "MUSIC_solo_videos.json", {k: v for k, v in videos.items() if k not in pairs})
    duet = music(tmp_path / "MUSIC_duet_videos.json", {k: v for k, v in videos.items() if k in pairs}, None)
    assert manifest.main(["--music", solo, duet, "--out", str(tmp_path / "out")]) == 0
    segments, said, letters = made(tmp_path / "out")
    assert read_vocabulary(str(tmp_path / "out")) == datasets.vocabulary("music_11") and not letters
    assert said["rows"] == said["kept"] == 6 * len(some) == 4200
    assert {s.start_s for s in segments} == set(datasets.MUSIC_STARTS_S)
    assert {(s.end_s or 0) - s.start_s for s in segments} == {10}
    of = {video: label for label, group in videos.items() for video in group}
    for s in segments:
        scheme, video = s.source.split(":")
        assert scheme == "youtube" and s.segment_id == f"{video}_{1000 * s.start_s:.0f}"
        assert s.objects is not None and s.objects == s.labels and set(s.objects) == set(of[video].split())
    splits = {s.source: s.split for s in segments}
    assert all(splits[s.source] == s.split for s in segments)
    shares = Counter(splits.values())
    assert 0.02 < shares["val"] / 700 < 0.06 and 0.07 < shares["test"] / 700 < 0.13
    assert "700 videos, each with excerpts of 10 s at 10, 30, 50, 70, 90 and 110 s" in capsys.readouterr().out


def test_music_21_and_rows_that_are_odd(tmp_path: Path) -> None:
    """An id that is there twice, in two lists of one name or under two labels, is one video with all it is said of."""
    a, b, c, d = ids(4)
    text = f'{{"videos": {{"banjo": ["{a}", "{a}"], "banjo": ["{b}"], "piano": ["{b}", 7, "", "../{c}"], '
    text += f'"kazoo": ["{c}"], "tuba": null, "erhu": [], "Electric Bass": "{d}"}}}}'
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert manifest.main(["--music", str(tmp_path / "m.json"), "--out", str(tmp_path / "out")]) == 0
    segments, said, letters = made(tmp_path / "out")
    assert read_vocabulary(str(tmp_path / "out")) == datasets.vocabulary("music_21")
    objects = {s.source.split(":")[1]: s.objects for s in segments}
    assert objects == {a: ("banjo",), b: ("banjo", "piano"), d: ("electric_bass",)} and len(segments) == 18
    assert said["dropped"] == {"also_in_eval": 0, "duplicate": 6, "merged": 6, **said["dropped"]}
    reasons = [(letter["line"], letter["reason"]) for letter in letters]
    assert [line for line, _ in reasons] == [5, 6, 7, 8, 9]
    assert "id is 7; it must be a text" in reasons[0][1] and "id is ''" in reasons[1][1]
    assert "id is '../" in reasons[2][1] and "unknown object 'kazoo'" in reasons[3][1] and "null" in reasons[4][1]


# ------------------------------------------------------------------------------------------ AVE

EVENTS = [
    "Church bell",
    "Male speech, man speaking",
    "Bark",
    "Fixed-wing aircraft, airplane",
    "Race car, auto racing",
    "Female speech, woman speaking",
    "Helicopter",
    "Violin, fiddle",
    "Flute",
    "Ukulele",
    "Frying (food)",
    "Truck",
    "Shofar",
    "Motorcycle",
    "Acoustic guitar",
    "Train horn",
    "Clock",
    "Banjo",
    "Goat",
    "Baby cry, infant cry",
    "Bus",
    "Chainsaw",
    "Cat",
    "Horse",
    "Toilet flush",
    "Rodents, rats, mice",
    "Accordion",
    "Mandolin",
]
HEADER = "Category&VideoID&Quality&StartTime&EndTime"


def test_ave_at_its_full_size(tmp_path: Path) -> None:
    rows = [f"{EVENTS[i % 28]}&{v}&good&{i % 5}&{i % 5 + 2 + i % 4}" for i, v in enumerate(ids(4143))]
    files = [write(tmp_path / "Annotations.txt", [HEADER, *rows], "\r\n")]
    for name, some in (("train", rows[:3339]), ("val", rows[3339:3741]), ("test", rows[3741:])):
        files.append(write(tmp_path / f"{name}Set.txt", some))
    assert manifest.main(["--ave", *files, "--out", str(tmp_path / "out")]) == 0
    segments, said, letters = made(tmp_path / "out")
    assert said["rows"] == said["kept"] == 4143 and not letters
    assert said["splits"] == {"train": 3339, "val": 402, "test": 402}
    assert read_vocabulary(str(tmp_path / "out")) == datasets.vocabulary("ave_28")
    assert len({s.objects for s in segments}) == 28 and all(s.objects == s.labels for s in segments)
    by_id = {s.segment_id: s for s in segments}
    for row in rows[::97]:
        label, video, _, start, end = row.split("&")
        s = by_id[f"{video}_{start}000_{end}000".replace("_0000", "_0")]
        assert (s.source, s.start_s, s.end_s) == (f"ave:{video}", float(start), float(end))
        assert s.objects == datasets.objects_of(label, datasets.vocabulary("ave_28"))


def test_ave_without_its_splits_and_with_rows_that_are_odd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = ids(2)
    odd = {
        f"Bark&{a}&good&3&3": "EndTime is 3; it must come after StartTime = 3",
        f"Bark&{a}&good&3&11": "times are '3' and '11'; they must be seconds from 0 to 10",
        f"Bark&{a}&good&-1&3": "times are '-1' and '3'",
        f"Bark&{a}&good&x&nan": "times are 'x' and 'nan'",
        f"Bark&{a}&good&3": "4 cells; a row is Category&VideoID&Quality&StartTime&EndTime",
        f"Barking&{a}&good&3&4": "unknown object 'Barking'; the objects are accordion",
        "Bark&a/b&good&3&4": "id is 'a/b'; it must be letters, digits, _ and -",
    }
    good = [f"Bark&{a}&good&0&4", f"Truck&{a}&good&0&4", f" Bark & {a} & good & 5.5 & 10", f"Cat&{b}&good&0&10"]
    lines = [HEADER, "", *good, "  ", *odd, good[3]]
    table = write(tmp_path / "Annotations.txt", lines, "\r\n", b"\xef\xbb\xbf")
    assert manifest.main(["--ave", table, "--out", str(tmp_path / "out")]) == 0
    assert "every segment is in split train" in capsys.readouterr().out
    segments, said, letters = made(tmp_path / "out")
    assert {(s.segment_id, s.objects) for s in segments} == {
        (f"{a}_0_4000", ("dog", "truck")), (f"{a}_5500_10000", ("dog",)), (f"{b}_0_10000", ("cat",)),
    }  # fmt: skip
    assert said["dropped"]["merged"] == said["dropped"]["duplicate"] == 1
    assert [letter["line"] for letter in letters] == list(range(8, 15))
    for letter, (text, reason) in zip(letters, odd.items(), strict=True):
        assert letter["text"] == text and reason in letter["reason"]


def test_a_row_of_ave_in_no_set_is_bad_and_one_in_two_sets_is_for_test(tmp_path: Path) -> None:
    a, b, c = ids(3)
    rows = [f"Cat&{v}&good&0&10" for v in (a, b, c)]
    files = [write(tmp_path / "Annotations.txt", [HEADER, *rows])]
    files += [write(tmp_path / "trainSet.txt", rows[:2]), write(tmp_path / "testSet.txt", [rows[1]])]
    assert manifest.main(["--ave", *files, "--out", str(tmp_path / "out")]) == 0
    segments, said, (letter,) = made(tmp_path / "out")
    assert {s.source: s.split for s in segments} == {f"ave:{a}": "train", f"ave:{b}": "test"}
    assert said["rows"] == 4 and said["dropped"]["also_in_eval"] == 1
    assert letter["line"] == 4 and "in none of trainSet.txt, testSet.txt, so its split isn't known" in letter["reason"]


# ------------------------------------------------------------------------------------- VGGSound


def vggsound(path: Path, rows: Iterable[Sequence[Any]]) -> str:
    with path.open("w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)
    return str(path)


def vggsound_like(n_rows: int) -> list[tuple[str, int, str, str]]:
    """Rows of 309 labels, of which a 13th is test."""
    published = [label for o in datasets.vocabulary("vggsound_23") for label in o.aliases]
    labels = [*published, *(f"people doing thing {i}, and more" for i in range(309 - len(published)))]
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 300, n_rows).tolist()
    names = ["".join(row) for row in rng.choice(LETTERS, (n_rows, 11))]
    return [
        (name, start, labels[i % 309], "test" if i % 13 == 0 else "train")
        for i, (name, start) in enumerate(zip(names, starts, strict=True))
    ]


@pytest.mark.parametrize("n_rows", [3090, pytest.param(199_176, marks=pytest.mark.slow)])
def test_vggsound_s_counts(n_rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = vggsound_like(n_rows)
    table = vggsound(tmp_path / "vggsound.csv", rows)
    assert manifest.main(["--vggsound", table, "--out", str(tmp_path / "out")]) == 0
    _, said, letters = made(tmp_path / "out")
    n_test = sum(row[3] == "test" for row in rows)
    assert said["rows"] == said["kept"] == n_rows and not letters
    assert said["splits"] == {"train": n_rows - n_test, "val": 0, "test": n_test}
    assert len(read_vocabulary(str(tmp_path / "out"))) == len(said["objects"]) == 309
    assert [sum(o.values()) for o in said["objects"].values()] == [len(rows[i::309]) for i in said_order(rows, said)]
    assert "299 others" in capsys.readouterr().out
    if n_rows < 10_000:
        options = ["--objects", DEFAULT, "--out", str(tmp_path / "default")]
        assert manifest.main(["--vggsound", table, *options]) == 0
        segments, said, _ = made(tmp_path / "default")
        published = {label for o in datasets.vocabulary("vggsound_23") for label in o.aliases}
        assert len(segments) == sum(row[2] in published for row in rows)
        assert {name for s in segments for name in s.objects or ()} == set(AUDIOSET_23.names)


def said_order(rows: Sequence[tuple[str, int, str, str]], said: dict[str, Any]) -> list[int]:
    """Which of the 309 labels each object of the statistics is."""
    own = datasets.vocabulary_of(row[2] for row in rows[:309])
    labels = {datasets.objects_of(rows[i][2], own)[0]: i for i in range(309)}
    return [labels[name] for name in said["objects"]]


def test_vggsound_s_rows_that_are_odd(tmp_path: Path) -> None:
    a, b, c = ids(3)
    odd = {
        f"{b},x,dog barking,train": "start is 'x'",
        f"{b},-1,dog barking,train": "start is '-1'",
        f"{b},nan,dog barking,train": "start is 'nan'",
        f"{b},1,dog barking,val": "split is 'val'; it must be train or test",
        f"{b},1,dog barking": "3 cells; a row is YouTubeID,start second,label,train|test",
        f"{b},1,playing violin, fiddle,train": "5 cells",
        f'{b},1,"dog barking,train': "broken quoting",
        f"{b},1,mixture,train": "unknown object 'mixture'",
        f"{b},1,,train": "label",
        "youtu.be/x,1,dog barking,train": "id is 'youtu.be/x'",
        "abc,1,dog barking,train": "id is 'abc'; it must be 11 letters",
    }
    good = [f'{a}, 30 ,"playing violin, fiddle",test', f"{a},30,dog barking,train", f"{c},7,dog barking,train"]
    top = "# YouTube ID, start seconds, label, train/test split."
    table = write(tmp_path / "vggsound.csv", [top, *good, "", *odd, good[2]], "\r\n", b"\xef\xbb\xbf")
    assert manifest.main(["--vggsound", table, "--out", str(tmp_path / "out")]) == 0
    segments, said, letters = made(tmp_path / "out")
    assert segments == [
        Segment(f"{v}_{s}000", f"youtube:{v}", float(s), s + 10.0, split, names, names)
        for v, s, split, names in sorted(
            [(a, 30, "test", ("dog_barking", "violin")), (c, 7, "train", ("dog_barking",))]
        )
    ]
    assert said["dropped"]["merged"] == said["dropped"]["duplicate"] == 1
    assert [letter["line"] for letter in letters] == list(range(6, 17))
    for letter, (text, reason) in zip(letters, odd.items(), strict=True):
        assert letter["text"] == text and reason in letter["reason"], letter
    header = write(tmp_path / "header.csv", ["YouTube ID,start seconds,label,train/test split", good[2]])
    assert manifest.main(["--vggsound", header, "--out", str(tmp_path / "header")]) == 0
    assert made(tmp_path / "header")[1]["rows"] == 1


# ---------------------------------------------------------------------------- what can't be read


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("--music", b'{"videos": [1]}', 'has no object "videos" with lists of ids by instrument'),
        ("--music", b"Cat&a&good&0&10", "is no JSON"),
        ("--music", b'{"videos": {"kazoo": ["a"]}}', "none of the videos has one of MUSIC's instruments"),
        ("--music", b'{"videos": {}}', "none of the videos has one of MUSIC's instruments; it has no row"),
        (
            "--ave",
            b"a,1,dog barking,train\n",
            "is none of AVE's files, Annotations.txt or trainSet.txt: line 1: 1 cells",
        ),
        ("--ave", b"", "is none of AVE's files, Annotations.txt or trainSet.txt: it has no row"),
        ("--ave", HEADER.encode("utf-16"), "is written in UTF-16; save it as UTF-8"),
        ("--vggsound", b"Cat&a&good&0&10\n", "is none of VGGSound's table, vggsound.csv: line 1: 1 cells"),
        ("--vggsound", b"", "is none of VGGSound's table, vggsound.csv: it has no row"),
        ("--vggsound", b'aaaaaaaaaaa, 0.000, 10.000, "/m/01yrx"\n', "line 1: split is '/m/01yrx'"),
        ("--vggsound", "a,1,dog barking,train".encode("utf-16"), "is written in UTF-16; save it as UTF-8"),
    ],
)
def test_another_file_is_refused_in_one_line(
    option: str, text: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t").write_bytes(text)
    assert manifest.main([option, str(tmp_path / "t"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"manifest: {tmp_path / 't'}") and said in line
    assert manifest.main([option, str(tmp_path / "missing"), "--out", str(tmp_path / "out")]) == 2
    assert "doesn't exist; check the path" in capsys.readouterr().err
    assert manifest.main([option, str(tmp_path / "t"), "--own-node-only", "--out", str(tmp_path / "out")]) == 2
    assert "--ontology and --own-node-only go with --audioset alone" in capsys.readouterr().err
