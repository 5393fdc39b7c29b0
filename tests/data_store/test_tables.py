"""One table, written as people and their programs write tables: always the same segments, or a line that says why."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avsep import manifest as segments_of
from avsep.objects import AUDIOSET_23
from avsep.records import Segment, read_segments
from pipelines import manifest

HEADER = ["segment_id", "source", "start_s", "end_s", "split", "labels"]
ROWS = [
    ["duet", "videos/Düsseldorf, live.mp4", "0", "10.5", "train", "violin;cello"],
    ["-s_1", "videos/street.webm", "12.5", "22.5", "val", "none"],
    ["solo", "youtube:-b_x", "", "", "test", ""],
]


def written(
    rows: Sequence[Sequence[str]] = (HEADER, *ROWS),
    separator: str = ",",
    end: str = "\n",
    quoting: int = csv.QUOTE_MINIMAL,
) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    return text.getvalue()


def expected(folder: Path) -> list[Segment]:
    return [
        Segment("duet", str(folder / "videos/Düsseldorf, live.mp4"), 0.0, 10.5, "train", None, ("violin", "cello")),
        Segment("-s_1", str(folder / "videos/street.webm"), 12.5, 22.5, "val", None, ()),
        Segment("solo", "youtube:-b_x", 0.0, None, "test", None, None),
    ]


def lines(text: str, change: Callable[[list[str]], list[str]]) -> bytes:
    return "\n".join(change(text.rstrip("\n").split("\n"))).encode()


PLAIN = written()
FORMS: dict[str, bytes] = {
    "plain": PLAIN.encode(),
    "no line end at the end": PLAIN.rstrip().encode(),
    "with a byte-order mark": codecs.BOM_UTF8 + PLAIN.encode(),
    "CRLF": written(end="\r\n").encode(),
    "CR": written(end="\r").encode(),
    "CR with a byte-order mark": codecs.BOM_UTF8 + written(end="\r").encode(),
    "UTF-16": PLAIN.encode("utf-16"),
    "UTF-16, big-endian, unmarked": PLAIN.encode("utf-16-be"),
    "UTF-16, tabs, CRLF, as Excel's Unicode text": written(separator="\t", end="\r\n").encode("utf-16"),
    "semicolons": written(separator=";").encode(),
    "semicolons and decimal commas": written(separator=";").replace("10.5", "10,5").replace("2.5", "2,5").encode(),
    "semicolons, declared": ("sep=;\r\n" + written(separator=";", end="\r\n")).encode(),
    "tabs": written(separator="\t").encode(),
    "bars": written(separator="|").encode(),
    "everything quoted": written(quoting=csv.QUOTE_ALL).encode(),
    "blank lines": PLAIN.replace("\n", "\n\n \n").encode(),
    "rows of nothing": lines(PLAIN, lambda x: [x[0], ",,,,,", *x[1:], ", , ,,,", ""]),
    "trailing commas": lines(PLAIN, lambda x: [f"{line},," for line in x]),
    "trailing commas in the header alone": lines(PLAIN, lambda x: [f"{x[0]},", *(f"{line}" for line in x[1:])]),
    "comments": lines(PLAIN, lambda x: ["# mine", *x[:2], "  # dropped,videos/x.mp4,,,,", *x[2:]]),
    "blanks around cells": lines(PLAIN.replace('"', ""), lambda x: [line.replace(",", " , ") for line in x]),
    "names of columns": PLAIN.replace("segment_id,source,start_s", "Segment ID,SOURCE,Start-s").encode(),
    "names of splits": PLAIN.replace(",train,", ",Training,").replace(",val,", ",validation,").encode(),
    "names of objects": PLAIN.replace("violin;cello", "Violin | cellos").encode(),
    "commas between objects": PLAIN.replace("violin;cello", '"violin, Violoncello"').encode(),
    "a list as Python writes it": PLAIN.replace("violin;cello", "\"['violin', 'cello']\"").encode(),
    "times by the clock": PLAIN.replace("10.5", "0:10.5").replace("22.5", "00:00:22.5").encode(),
    "other columns": written(
        [[*r, x] for r, x in zip([HEADER, *ROWS], ["notes", "a", "b, c", ""], strict=True)]
    ).encode(),
    "line breaks within quotes": written(
        [
            [*r, x]
            for r, x in zip([HEADER, *ROWS], ["notes", "two\nlines", 'a "word"\r\n\r\n# no comment', ""], strict=True)
        ]
    ).encode(),
}
FORMS["blanks around cells"] = FORMS["blanks around cells"].replace(
    "videos/Düsseldorf ,  live.mp4".encode(), '"videos/Düsseldorf, live.mp4"'.encode()
)


@pytest.mark.parametrize("form", FORMS)
def test_a_table_means_the_same_however_it_is_written(tmp_path: Path, form: str) -> None:
    (tmp_path / "t.csv").write_bytes(FORMS[form])
    assert read_segments(tmp_path / "t.csv") == expected(tmp_path)


def test_the_manifest_reads_what_the_other_programs_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All forms through Beam at once, each with ids of its own, would be one table: here the hardest is enough."""
    table = tmp_path / "t.csv"
    table.write_bytes(FORMS["line breaks within quotes"].replace(b"\r\n", b"\r").replace(b",notes", b",notes,,"))
    assert manifest.main(["--table", str(table), "--out", str(tmp_path / "out")]) == 0
    assert sorted(read_segments(tmp_path / "out"), key=lambda s: s.segment_id) == sorted(
        expected(tmp_path), key=lambda s: s.segment_id
    )
    assert "t.csv: left aside, since they mean nothing here: columns notes" in capsys.readouterr().out


def test_what_a_tables_form_means_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "t.csv").write_text("# a\nsource;Notes;camera\nb/a.mp4;x;y\n#c;x;y\nyoutube:z_1;;\n")
    assert [s.segment_id for s in read_segments(tmp_path / "t.csv", said.append)] == ["a", "z_1"]
    assert said == [
        "t.csv: its cells are separated by semicolons",
        "t.csv: left aside, since they mean nothing here: columns Notes, camera",
        "t.csv has no column segment_id: the names of the files are the ids",
        "t.csv: 1 lines that begin with # were taken as comments",
    ]
    (tmp_path / "t.csv").write_text(PLAIN)
    said.clear()
    read_segments(tmp_path / "t.csv", said.append)
    assert said == []


def test_a_table_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(PLAIN.encode("latin-1"))
    with pytest.raises(ValueError, match=r"t.csv, row 2: not UTF-8; save the table as UTF-8"):
        read_segments(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(PLAIN.encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"t.csv is no UTF-16 .*save it as UTF-8"):
        read_segments(tmp_path / "t.csv")


def test_a_parquet_table_as_other_programs_write_it(tmp_path: Path) -> None:
    """Null is null, an empty list is none, text cells are read as in a CSV."""
    columns = {
        "Source": ["a.mp4", "b.mp4", "c.mp4", "d.mp4"],
        "Labels": [["Violin"], [], None, ["none"]],
        "objects": ["drums|Sax", "", None, "none"],
        "notes": [1, 2, 3, 4],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=2)
    found = read_segments(tmp_path / "t.parquet")
    assert [s.segment_id for s in found] == ["a", "b", "c", "d"]
    assert [s.labels for s in found] == [("violin",), (), None, ()]
    assert [s.objects for s in found] == [("drum", "saxophone"), None, None, ()]
    assert manifest.main(["--table", str(tmp_path / "t.parquet"), "--out", str(tmp_path / "out")]) == 0
    assert read_segments(tmp_path / "out") == found


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_of_one_name_need_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    table = tmp_path / f"t.{kind}"
    sources = ["x/a.mp4", "b.mp4", "y/a.wav"]
    if kind == "csv":
        table.write_text("\n".join(["source", *sources]))
    else:
        pq.write_table(pa.table({"source": sources}), table)
    assert manifest.main(["--table", str(table), "--out", str(tmp_path / "out")]) == 2
    numbers = "2 and 4" if kind == "csv" else "1 and 3"
    error = capsys.readouterr().err
    assert f"rows {numbers} have files named 'a'" in error and "add a column segment_id" in error


def test_local_files_are_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    table = tmp_path / "t.csv"
    for rows, said in (
        ("a.mp4", f"media: 1 local files, all there, such as {tmp_path / 'a.mp4'}"),
        ("a.mp4\nb/c.mp4\nyoutube:x", f"media: 1 of 2 local files don't exist, such as {tmp_path / 'b/c.mp4'}; rel"),
    ):
        table.write_text(f"source\n{rows}\n")
        assert manifest.main(["--table", str(table), "--out", str(tmp_path / "out")]) == 0
        assert said in capsys.readouterr().out


AUDIOSET = '{}, 0.000, 10.000, "/m/01yrx,/m/0bt9lr"'
COMMENT = "# Segments csv created Sun Mar  5 10:54:31 2017"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("comment", [True, False])
def test_audiosets_files_are_read_whatever_their_line_ends(
    tmp_path: Path, end: str, mark: bytes, comment: bool
) -> None:
    rows = [COMMENT] * comment + [AUDIOSET.format(i) for i in ("aaaaaaaaaaa", "-bbbbbbbbbb")]
    path = tmp_path / "x.csv"
    path.write_bytes(mark + (end.join([*rows, "broken"]) + end).encode())
    blocks = segments_of.line_blocks([str(path)], 40)
    parsed = [segments_of.read_audioset(block, {"/m/01yrx": 1}, AUDIOSET_23) for block in blocks]
    segments, bad = [], []
    for part in (p for generator in parsed for p in generator):
        if isinstance(part, pa.Table):
            segments += part["segment_id"].to_pylist()
        else:
            bad += [line.text for _, _, line in part.bad]
    assert sorted(segments) == ["-bbbbbbbbbb_0", "aaaaaaaaaaa_0"] and bad == ["broken"]


def test_audioset_in_utf_16_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_bytes(AUDIOSET.format("aaaaaaaaaaa").encode("utf-16"))
    arguments = ["--audioset", str(tmp_path / "x.csv"), "--own-node-only", "--out", str(tmp_path / "out")]
    assert manifest.main(arguments) == 2
    assert "x.csv is written in UTF-16; save it as UTF-8" in capsys.readouterr().err


def test_dead_letters_of_a_row_of_several_lines_name_its_first(tmp_path: Path) -> None:
    text = 'segment_id,source,labels,notes\na,a.mp4,dog,"x\ny"\nb,b.mp4,tuba,"x\ny\nz"\nc,c.mp4,dog,"x"\n'
    (tmp_path / "t.csv").write_text(text)
    assert manifest.main(["--table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]) == 1
    (letter,) = map(json.loads, (tmp_path / "out" / "dead_letters.jsonl").read_text().splitlines())
    assert (letter["line"], letter["text"]) == (4, 'b,b.mp4,tuba,"x\ny\nz"')
    assert letter["reason"].startswith("labels: unknown object 'tuba'")
