"""The manifest: AudioSet's format, users' tables, dead letters, and that no row is ever lost."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from avsep import audioset
from avsep import manifest as segments_of
from avsep.objects import AUDIOSET_23, OBJECTS
from avsep.records import Segment, read_segments
from pipelines import manifest

HEADER = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)
CAT, DOG, GROWL, PIANO, SPEECH = "/m/01yrx", "/m/0bt9lr", "/m/0ghcn6", "/m/05r5c", "/m/09x0r"
REPOSITORY = Path(__file__).parents[2]


def ontology() -> list[dict[str, Any]]:
    """Return AudioSet's shape in small: growling has four parents, cats' sounds lie two levels down."""
    children: dict[str, list[str]] = {mid: [] for o in OBJECTS for mid in o.audioset} | {
        "/m/0jbk": [CAT, DOG, "/m/01280g"],  # animal
        CAT: ["/t/dd00001", GROWL],
        "/t/dd00001": ["/m/07qrkrw"],  # cat communication: meow
        DOG: ["/m/05tny_", GROWL],
        "/m/01280g": ["/m/0cdnk", GROWL],  # wild animals
        "/m/0cdnk": [GROWL],  # roaring cats
        GROWL: [],
        "/m/07qrkrw": [],
        "/m/05tny_": [],
        SPEECH: [],
    }
    return [{"id": mid, "name": mid, "child_ids": below} for mid, below in children.items()]


def row(ytid: str, start_s: float, end_s: float, *mids: str) -> str:
    return f'{ytid}, {start_s:.3f}, {end_s:.3f}, "{",".join(mids)}"\n'


# --- rows


def test_rows_as_audioset_writes_them() -> None:
    text = HEADER + row("--4gqARaEJE", 0, 10, "/m/068hy", CAT) + row("a_b-C_d_e-0", 30.5, 37.221, SPEECH)
    rows, bad, n_lines = audioset.parse_rows(text.encode())
    assert (bad, n_lines) == ([], 5)
    assert rows.to_pylist() == [
        {"line": 4, "ytid": "--4gqARaEJE", "start_s": 0, "end_s": 10, "tags": ["/m/068hy", CAT]},
        {"line": 5, "ytid": "a_b-C_d_e-0", "start_s": 30.5, "end_s": 37.221, "tags": [SPEECH]},
    ]


MALFORMED = {
    "short,1": "2 cells",
    'AAAAAAAAAAA, 0.000, 10.000, "/m/01yrx': "broken quoting",
    "AAAAAAAAAAA, 0.000, 10.000, /m/01yrx,/m/0bt9lr": "5 cells",
    'AAAAAAAAAAA, zero, 10.000, "/m/01yrx"': "start is 'zero'",
    'AAAAAAAAAAA, nan, 10.000, "/m/01yrx"': "start is 'nan'",
    'AAAAAAAAAAA, -1.000, 10.000, "/m/01yrx"': "start is '-1.000'",
    'AAAAAAAAAAA, 0.000, 1e99, "/m/01yrx"': "end is '1e99'",
    'AAAAAAAAAAA, 10.000, 10.000, "/m/01yrx"': "must come after start",
    'AAAAAAAAAAA, 0.000, 10.000, ""': "tag ''",
    'AAAAAAAAAAA, 0.000, 10.000, "Cat"': "tag 'Cat'",
    'AAAA/../AAA, 0.000, 10.000, "/m/01yrx"': "YTID",
    ', 0.000, 10.000, "/m/01yrx"': "YTID",
    'ÄAAAAAAAAAA, 0.000, 10.000, "/m/01yrx"': "YTID",
    "\x00\x01\x02": "cells",
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_malformed_rows_are_told_apart_from_their_neighbours(end: str) -> None:
    good = row("BBBBBBBBBBB", 0, 10, CAT).rstrip() + end
    block = "".join(good + line + end for line in MALFORMED).encode()
    rows, bad, n_lines = audioset.parse_rows(block)
    assert n_lines == 2 * len(MALFORMED)
    assert rows["line"].to_pylist() == list(range(1, n_lines, 2))
    assert [b.line for b in bad] == list(range(2, n_lines + 1, 2))
    for found, (text, reason) in zip(bad, MALFORMED.items(), strict=True):
        assert reason in found.reason
        assert found.text == text


def test_bytes_that_are_no_utf8_make_one_bad_row() -> None:
    rows, bad, _ = audioset.parse_rows(b'\xff\xfe, 0, 1, "/m/01yrx"\n' + row("BBBBBBBBBBB", 0, 10, CAT).encode())
    assert (len(rows), [b.line for b in bad]) == (1, [1])


def test_other_spellings_give_the_same_row() -> None:
    for line in (
        'AAAAAAAAAAA,1,11,"/m/01yrx,/m/0bt9lr"',
        'AAAAAAAAAAA ,  1.0,\t11.000 , "/m/01yrx, /m/0bt9lr"',
        '"AAAAAAAAAAA", +1, 1.1e1, "/m/01yrx,/m/0bt9lr"  ',
    ):
        rows, bad, _ = audioset.parse_rows(line.encode())
        assert not bad
        expected = {"line": 1, "ytid": "AAAAAAAAAAA", "start_s": 1, "end_s": 11, "tags": [CAT, DOG]}
        assert rows.to_pylist() == [expected]


@pytest.mark.parametrize("block", [b"", b"\n", b"# only a comment"])
def test_no_rows(block: bytes) -> None:
    rows, bad, n_lines = audioset.parse_rows(block)
    assert (len(rows), bad, n_lines) == (0, [], int(bool(block)))
    assert len(audioset.select_segments(rows, {CAT: 1}, None, AUDIOSET_23)) == 0


# --- ontology, splits, repeats


def test_descendants_in_a_graph_with_several_parents_and_a_cycle() -> None:
    children = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": ["e", "a"]}
    assert audioset.descendants(children, "a") == set("abcde")
    assert audioset.descendants(children, "d") == set("abcde")
    assert audioset.descendants(children, "e") == {"e"}


def test_a_node_of_several_parents_means_each_object_above_it() -> None:
    masks = audioset.object_masks(ontology(), vocabulary=AUDIOSET_23)
    assert masks[GROWL] == masks[CAT] | masks[DOG]
    assert masks["/m/07qrkrw"] == masks[CAT]  # two levels down
    assert not {"/m/0jbk", SPEECH, "/m/01280g"} & set(masks)
    assert len(audioset.object_masks(ontology(), own_node_only=True, vocabulary=AUDIOSET_23)) == len(OBJECTS)


@pytest.mark.parametrize("other", [{}, [], [1], [{"id": CAT}], "text", None, [{"id": "x", "child_ids": []}]])
def test_what_is_no_ontology(other: object) -> None:
    with pytest.raises(ValueError, match="nodes"):
        audioset.object_masks(other, vocabulary=AUDIOSET_23)


def test_split_depends_on_the_id_alone_and_gives_four_percent() -> None:
    ids = [f"{n:011d}_0" for n in range(20_000)]
    n_val = sum(audioset.hash_split(s) == "val" for s in ids)
    assert abs(n_val / len(ids) - 0.04) < 0.005  # 3.6 standard errors
    assert [s for s in ids[:60] if audioset.hash_split(s) == "val"] == ["00000000013_0", "00000000014_0"]


def test_a_clip_of_the_evaluation_set_is_kept_there() -> None:
    columns = {
        "segment_id": ["b_0", "a_0", "b_0", "b_0", "c_0", "c_0"],
        "split": ["train", "train", "test", "train", "val", "val"],
        "file": [0, 0, 1, 2, 2, 2],
        "block": [0, 0, 0, 0, 1, 0],
        "line": [5, 9, 7, 1, 1, 2],
    }
    unique, repeats, lost_to_test = audioset.deduplicate(pa.table(columns))
    kept = [(r["segment_id"], r["split"], r["line"]) for r in unique.to_pylist()]
    assert kept == [("a_0", "train", 9), ("b_0", "test", 7), ("c_0", "val", 2)]
    assert list(zip(repeats["segment_id"].to_pylist(), lost_to_test.tolist(), strict=True)) == [
        ("b_0", True),
        ("b_0", True),
        ("c_0", False),
    ]


# --- blocks and shards


def test_ranges_of_ids_hold_everything_once_in_order() -> None:
    ids = [f"clip_{n:05d}" for n in range(20_000)]
    random.Random(0).shuffle(ids)
    table = pa.table({"segment_id": ids})
    bounds = segments_of.shard_bounds(segments_of.sample_ids(table), 4000)
    parts = dict(segments_of.into_ranges(table, bounds))
    assert len(parts) == len(bounds) + 1 == 5
    assert [s for i in sorted(parts) for s in sorted(parts[i]["segment_id"].to_pylist())] == sorted(ids)
    assert max(map(len, parts.values())) < 6000
    assert segments_of.shard_bounds((0, []), 4000) == []


# --- AudioSet's files, through Beam


def audioset_files(folder: Path) -> tuple[list[Path], Path]:
    generator = random.Random(3)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    lines = []
    for n in range(3000):
        ytid = "".join(generator.choices(letters, k=11))
        start_s = generator.randrange(400)
        duration_s = 10 if n % 60 else 6.31  # 1.7 % are shorter
        tags = generator.sample([SPEECH, "/m/068hy", "/m/04rlf"], 2)
        tags += [generator.choice([CAT, DOG, GROWL, PIANO, "/m/07qrkrw"])] if n % 10 == 0 else []
        lines.append(row(ytid, start_s, start_s + duration_s, *tags))
    lines[100] = "not a row\n"  # line 104 with the header
    lines[2000] = 'AAAAAAAAAAA, 3.000, 1.000, "/m/01yrx"\n'  # line 2004
    lines += [lines[10], row("-_shared_-X", 30, 40, PIANO), f'0123456789_, 0.0005, 10, "{CAT},{DOG}"\n']
    unbalanced, balanced, evaluation = (
        folder / f"{name}_segments.csv" for name in ("unbalanced_train", "balanced_train", "eval")
    )
    unbalanced.write_text(HEADER + "".join(lines))
    balanced.write_text(HEADER + lines[20] + row("----------A", 0, 10, DOG) + "\n" + lines[1] + "x,y\n")
    evaluation.write_text(HEADER + row("-_shared_-X", 30, 40, PIANO) + row("ABCDEFGHIJK", 20, 30, GROWL).rstrip())
    (folder / "ontology.json").write_text(json.dumps(ontology()))
    return [unbalanced, balanced, evaluation], folder / "ontology.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    return audioset_files(tmp_path_factory.mktemp("audioset"))


@pytest.fixture(scope="module")
def made(files: tuple[list[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("manifest")
    csvs, nodes = files
    assert manifest.main(["--audioset", *map(str, csvs), "--ontology", str(nodes), "--out", str(out)]) == 0
    return out


def dead_letters(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "dead_letters.jsonl").read_text().splitlines()]


def statistics(out: Path) -> dict[str, Any]:
    return json.loads((out / "statistics.json").read_text())


def expected_segments(csvs: Sequence[Path]) -> dict[str, Segment]:
    """Work the same out row by row."""
    means = {CAT: ["cat"], DOG: ["dog"], GROWL: ["cat", "dog"], PIANO: ["piano"], "/m/07qrkrw": ["cat"]}
    segments: dict[str, Segment] = {}
    for path in csvs:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        for cells in csv.reader(lines, skipinitialspace=True):
            names = {name for mid in (cells[3].split(",") if len(cells) == 4 else []) for name in means.get(mid, [])}
            if names and float(cells[2]) > float(cells[1]):
                name = f"{cells[0]}_{round(float(cells[1]) * 1000)}"
                split = "test" if "eval" in path.name else audioset.hash_split(name)
                objects = tuple(o.name for o in OBJECTS if o.name in names)
                if name not in segments or split == "test":
                    source = f"youtube:{cells[0]}"
                    segments[name] = Segment(name, source, float(cells[1]), float(cells[2]), split, objects)
    return segments


def test_segments_are_those_found_row_by_row(files: tuple[list[Path], Path], made: Path) -> None:
    expected = expected_segments(files[0])
    segments = read_segments(str(made))
    assert segments == sorted(expected.values(), key=lambda s: s.segment_id)
    assert len(segments) > 290
    by_id = {s.segment_id: s for s in segments}
    assert by_id["-_shared_-X_30000"].split == "test"
    assert by_id["ABCDEFGHIJK_20000"].objects == ("cat", "dog")
    assert by_id["----------A_0"].source == "youtube:----------A"
    assert by_id["0123456789__0"].objects == ("cat", "dog")  # 0.5 ms rounds to 0, half to even
    assert {s.split for s in segments} == {"train", "val", "test"}


def test_dead_letters_name_the_line(files: tuple[list[Path], Path], made: Path) -> None:
    unbalanced, balanced, _ = files[0]
    assert [(d["file"], d["line"]) for d in dead_letters(made)] == [
        (str(unbalanced), 104),
        (str(unbalanced), 2004),
        (str(balanced), 8),
    ]
    for letter in dead_letters(made):
        assert Path(letter["file"]).read_text().splitlines()[letter["line"] - 1] == letter["text"]
        assert letter["reason"]


def test_statistics_add_up(files: tuple[list[Path], Path], made: Path) -> None:
    found, segments = statistics(made), read_segments(str(made))
    assert found["rows"] == 3003 + 4 + 2 == sum(found["files"].values())
    assert found["rows"] == found["kept"] + sum(found["dropped"].values()) + found["dead_letters"]
    assert (found["kept"], found["dead_letters"]) == (len(segments), 3)
    assert (found["dropped"]["duplicate"], found["dropped"]["also_in_eval"]) == (2, 1)
    for split in ("train", "val", "test"):
        here = [s for s in segments if s.split == split]
        assert found["splits"][split] == found["without_labels"][split] == len(here)
        assert found["objects"]["dog"][split] == sum("dog" in (s.objects or ()) for s in here)
        shorter = sum((s.end_s or 0) - s.start_s < 10 for s in here)
        assert found["shorter_than_10_s"][split] == shorter
    both = sum({"cat", "dog"} <= set(s.objects or ()) for s in segments)
    assert found["cooccurrence"] == {"cat": {"dog": both}}
    assert sum(found["shorter_than_10_s"].values()) > 20


def test_own_node_only_needs_no_ontology(files: tuple[list[Path], Path], made: Path, tmp_path: Path) -> None:
    arguments = ["--audioset", *map(str, files[0]), "--own-node-only", "--out", str(tmp_path)]
    assert manifest.main(arguments) == 0
    own = read_segments(str(tmp_path))
    assert "ABCDEFGHIJK_20000" not in {s.segment_id for s in own}
    assert 0 < len(own) < len(read_segments(str(made)))


@pytest.fixture(scope="module")
def in_pieces(files: tuple[list[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files in hundreds of small blocks, shuffled, and several shards."""
    folder = tmp_path_factory.mktemp("pieces")
    masks = audioset.object_masks(ontology(), vocabulary=AUDIOSET_23)
    blocks = segments_of.line_blocks([str(path) for path in files[0]], 1500)
    random.Random(5).shuffle(blocks)
    staging = folder / "staging"
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        manifest.build(
            pipeline,
            blocks,
            lambda block: segments_of.read_audioset(block, masks, AUDIOSET_23),
            [str(path) for path in files[0]],
            str(staging),
            repeats="dropped",
            vocabulary=AUDIOSET_23,
            shard_rows=100,
        )
    segments_of.commit(str(staging), str(folder), AUDIOSET_23)
    return folder


def test_blocks_and_shards_change_nothing(made: Path, in_pieces: Path) -> None:
    shards = sorted(in_pieces.glob("*.parquet"))
    assert len(shards) > 1
    assert [s.name for s in shards] == [f"segments-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
    tables = pa.concat_tables([pq.read_table(s) for s in shards])
    assert tables.equals(pq.read_table(made / "segments.parquet"))
    for name in ("statistics.json", "dead_letters.jsonl"):
        assert (in_pieces / name).read_bytes() == (made / name).read_bytes()


def test_a_second_run_writes_the_same_files_and_leaves_nothing_of_another(
    files: tuple[list[Path], Path], made: Path, in_pieces: Path
) -> None:
    (in_pieces / "notes.txt").write_text("the user's")
    csvs, nodes = files
    arguments = ["--out", str(in_pieces), "--ontology", str(nodes), "--audioset", *map(str, csvs)]
    assert manifest.main(arguments) == 0
    (in_pieces / "notes.txt").unlink()
    assert {p.name for p in in_pieces.iterdir()} - {"staging"} == {p.name for p in made.iterdir()}
    for path in made.iterdir():
        assert (in_pieces / path.name).read_bytes() == path.read_bytes()


# --- a user's table, through Beam


def write_table(path: Path, *rows: Sequence[str]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with path.open("w", newline="") as f:
        csv.writer(f).writerows(rows)
    return path


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(
        tmp_path / "mine" / "clips.csv",
        ["segment_id", "source", "start_s", "end_s", "split", "labels"],
        ["b", "media/b.mp4", "1.5", "", "val", "violin;dog"],
        ["-a_1", "/abs/a.wav", "", "9", "", ""],
        ["c", "s3://bucket/c.mp4", "0", "4", "test", "piano"],
        ["d", "media/d.mp4", "", "", "", "none"],
    )
    assert manifest.main(["--table", str(table), "--out", str(tmp_path / "out")]) == 0
    assert read_segments(str(tmp_path / "out")) == [
        Segment("-a_1", "/abs/a.wav", 0.0, 9.0, "train", None, None),
        Segment("b", str(tmp_path / "mine/media/b.mp4"), 1.5, None, "val", None, ("violin", "dog")),
        Segment("c", "s3://bucket/c.mp4", 0.0, 4.0, "test", None, ("piano",)),
        Segment("d", str(tmp_path / "mine/media/d.mp4"), 0.0, None, "train", None, ()),
    ]
    found = statistics(tmp_path / "out")
    assert found["without_labels"] == {"train": 1, "val": 0, "test": 0}  # an empty cell: the pictures decide
    assert found["labelled_none"] == {"train": 1, "val": 0, "test": 0}
    assert found["labels"]["dog"] == {"train": 0, "val": 1, "test": 0}
    assert dead_letters(tmp_path / "out") == []
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "splits: train 2, val 1, test 1" in captured.out
    said = " ".join(captured.out.split())
    assert "labels: 2 rows give them (dog 1, piano 1, violin 1); 1 say none; 1 left to the pictures" in said
    assert "objects known to be audible: not given" in said
    assert "media: 3 of 3 local files don't exist, such as /abs/a.wav; relative sources are relative to the" in said
    own = tmp_path / "out" / "segments.parquet"
    assert manifest.main(["--table", str(own), "--out", str(tmp_path / "out")]) == 2
    assert "would overwrite" in capsys.readouterr().err


BAD_ROWS = [
    (["", "x.mp4", "0", "", "", ""], "segment_id is missing"),
    (["d", "", "0", "", "", ""], "source is missing"),
    (["d/e", "x.mp4", "0", "", "", ""], "slash"),
    (["d", "tape:1", "0", "", "", ""], "'tape' is no known site: sources are youtube:ID, ave:ID, web addresses"),
    (["d", "x.mp4", "soon", "", "", ""], "start_s is 'soon'"),
    (["d", "x.mp4", "5", "4", "", ""], "must come after start_s"),
    (["d", "x.mp4", "-5", "4", "", ""], "start_s is -5.0"),
    (["d", "x.mp4", "0", "4", "holdout", ""], "split 'holdout'"),
    (["d", "x.mp4", "0", "4", "", "dog;dragon"], "dragon"),
    (["d", "x.mp4", "0"], "3 cells; the header has 6"),
    (["good", "elsewhere.mp4", "0", "4", "", ""], "more than once"),
]


def test_bad_rows_of_a_table_are_told_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(
        tmp_path / "clips.csv",
        ["segment_id", "source", "start_s", "end_s", "split", "objects"],
        ["good", "x.mp4", "0", "4", "", "dog"],
        *(cells for cells, _ in BAD_ROWS),
    )
    with table.open("ab") as f:
        f.write(b'\nq,"y.mp4,0,4,,\n\xff,z.mp4,0,4,,\nlast,y.mp4,0,4,,cat')  # open quote; no UTF-8; fine
    assert manifest.main(["--table", str(table), "--out", str(tmp_path / "out")]) == 1
    assert [s.segment_id for s in read_segments(str(tmp_path / "out"))] == ["good", "last"]
    letters = dead_letters(tmp_path / "out")
    reasons = [reason for _, reason in BAD_ROWS] + ["broken quoting", "not UTF-8"]
    assert [d["line"] for d in letters] == [*range(3, 3 + len(BAD_ROWS)), 15, 16]  # line 14 is blank
    for letter, reason in zip(letters, reasons, strict=True):
        assert reason in letter["reason"]
        assert letter["file"] == str(table)
    assert letters[4]["text"] == "d,x.mp4,soon,,,"
    found = statistics(tmp_path / "out")
    assert (found["rows"], found["kept"], found["dead_letters"]) == (15, 2, 13)
    said = capsys.readouterr().out
    assert f"13 rows can't be used; see {tmp_path / 'out' / 'dead_letters.jsonl'} for lines and reasons" in said
    assert "; the first, line 3: segment_id is missing" in said


def test_parquet_table_in_row_groups(tmp_path: Path) -> None:
    columns = {
        "segment_id": [f"clip_{n}" for n in range(7)] + ["clip_3", "x"],
        "source": ["a.wav"] * 8 + [None],
        "start_s": pa.array([0.0, None, 2, 3, 4, 5, 6, 7, 8]),
        "labels": [["dog"], None, [], ["cat", "cat"], [], [], ["unicorn"], [], []],
    }
    table = tmp_path / "clips.parquet"
    pq.write_table(pa.table(columns), table, row_group_size=4)
    assert manifest.main(["--table", str(table), "--out", str(tmp_path / "out")]) == 1
    segments = read_segments(str(tmp_path / "out"))
    assert [s.segment_id for s in segments] == [f"clip_{n}" for n in range(6)]
    assert [s.labels for s in segments[:4]] == [("dog",), None, (), ("cat",)]
    assert segments[0].source == str(tmp_path / "a.wav")
    assert [(d["line"], json.loads(d["text"])["segment_id"]) for d in dead_letters(tmp_path / "out")] == [
        (7, "clip_6"),
        (8, "clip_3"),
        (9, "x"),
    ]


def test_a_table_without_a_usable_row_is_refused_and_replaces_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason is told at once."""
    header = ["segment_id", "source", "labels"]
    good = write_table(tmp_path / "good.csv", header, ["a", "x.mp4", "dog"])
    assert manifest.main(["--table", str(good), "--out", str(tmp_path / "out")]) == 0
    for rows, reason in (
        ([], "there is none"),
        ([["a", "x.mp4", "unicorn"]], "line 2: labels: unknown object 'unicorn'"),
    ):
        table = write_table(tmp_path / "clips.csv", header, *rows)
        capsys.readouterr()
        assert manifest.main(["--table", str(table), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"{table}: no row can be used; " in error and reason in error and error.count("\n") == 1
        assert [s.labels for s in read_segments(str(tmp_path / "out"))] == [("dog",)]


# --- the command line


def test_unusable_arguments_and_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: object, says: str) -> None:
        assert manifest.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    no_source = write_table(tmp_path / "a.csv", ["segment_id", "file"], ["a", "b"])
    unknown = write_table(tmp_path / "b.csv", ["segment_id", "source", "lables"], ["a", "b", "c"])
    twice = write_table(tmp_path / "c.csv", ["segment_id", "source", "source"], ["a", "b", "c"])
    good = write_table(tmp_path / "d.csv", ["segment_id", "source", "split"], ["a", "b", "val"])
    text = tmp_path / "table.txt"
    text.write_text("x")
    false = tmp_path / "false.parquet"
    false.write_text("no parquet")
    nodes = tmp_path / "ontology.json"
    nodes.write_text(json.dumps(ontology()))
    segments = tmp_path / "eval_segments.csv"
    segments.write_text(HEADER + row("ABCDEFGHIJK", 0, 10, CAT))

    fails("--table", tmp_path / "none.csv", says="doesn't exist")
    fails("--table", no_source, says="no column 'source'")
    fails("--table", unknown, says="did you mean 'labels'?")
    fails("--table", twice, says="twice")
    fails("--table", text, says=".csv or .parquet")
    fails("--table", false, says="no Parquet file")
    fails("--table", tmp_path, says="directory")
    fails("--table", good, "--own-node-only", says="go with --audioset")
    fails("--table", good, "--runnner", "FlinkRunner", says="--runnner")
    fails("--table", good, "--runner", "NoSuchRunner", says="NoSuchRunner")
    fails("--table", good, "--direct_num_workers", "two", says="'two'")
    fails("--audioset", segments, says="--ontology")
    fails("--audioset", segments, "--ontology", text, says="no JSON")
    fails("--audioset", segments, "--ontology", tmp_path / "none.json", says="doesn't exist")
    fails("--audioset", tmp_path / "none.csv", "--ontology", nodes, says="doesn't exist")
    fails("--audioset", good, "--ontology", nodes, says="--table")
    assert manifest.main(["--table", str(good), "--out", str(text)]) == 2


def test_as_a_program(tmp_path: Path) -> None:
    table = write_table(tmp_path / "d.csv", ["segment_id", "source"], ["a", "b"])
    command = [sys.executable, "-m", "pipelines.manifest", "--table", str(table), "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 rows = 1 segments" in done.stdout
    assert read_segments(str(tmp_path / "out"))[0].source == str(tmp_path / "b")


@pytest.mark.slow
def test_two_million_rows_in_under_a_minute_and_bounded_memory(tmp_path: Path) -> None:
    n_rows = 2_000_000
    generator = np.random.default_rng(0)
    letters = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)
    ids = letters[generator.integers(64, size=(n_rows, 11))].tobytes().decode()
    starts = generator.integers(0, 500, n_rows).tolist()
    ours = (generator.random(n_rows) < 0.1).tolist()
    tags = [f"/m/0{n:05d},{SPEECH},/m/04rlf" for n in range(1000)]
    path = tmp_path / "unbalanced_train_segments.csv"
    with path.open("w") as f:
        f.write(HEADER)
        for n, (start_s, is_ours) in enumerate(zip(starts, ours, strict=True)):
            mids = f"{SPEECH},{GROWL}" if is_ours else tags[n % 1000]
            f.write(f'{ids[11 * n : 11 * n + 11]}, {start_s}.000, {start_s + 10}.000, "{mids}"\n')
    (tmp_path / "ontology.json").write_text(json.dumps(ontology()))

    def run(*command: str) -> tuple[float, int]:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, *command], cwd=tmp_path, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        return time.monotonic() - began, usage.ru_maxrss // 1024

    _, imports_mb = run("-c", "import pipelines.manifest")
    seconds, peak_mb = run(
        *("-m", "pipelines.manifest", "--audioset", str(path), "--ontology", "ontology.json", "--out", "out")
    )
    print(f"{n_rows:,} rows in {seconds:.1f} s, {peak_mb} MB of which imports take {imports_mb} MB")
    assert statistics(tmp_path / "out")["kept"] == sum(ours)
    assert seconds < 60
    assert peak_mb - imports_mb < 600
