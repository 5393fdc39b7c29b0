"""Labels given by hand, in a table that the manifest reads."""

from pathlib import Path

import pytest

from avsep.edits import Edits, Move
from avsep.labelled import give_labels
from avsep.records import read_segments


def test_corrections_become_a_segments_labels(tmp_path: Path) -> None:
    table = tmp_path / "clips.csv"
    labels = Edits((Move(0, 3, "violin"),), remove=("cat",)).labels(["cat", "dog"])
    assert not give_labels(str(table), "duet.mp4", labels, 0, 10)
    assert not give_labels(str(table), "duet.mp4", [], 10, 20)
    assert give_labels(str(table), "duet.mp4", ["dog", "dog"], 10.0, 20.0)
    rows = "duet_0,duet.mp4,0,10,dog;violin\nduet_10000,duet.mp4,10,20,dog\n"
    assert table.read_text() == f"segment_id,source,start_s,end_s,labels\n{rows}"
    (first, second), path = read_segments(table), str(tmp_path / "duet.mp4")
    assert (first.source, first.labels, second.labels) == (path, ("dog", "violin"), ("dog",))
    assert not give_labels(str(table), "long.mp4", ["dog"], 1234.567, 1244.567)
    assert give_labels(str(table), "long.mp4", ["cat"], 1234.567, 1244.567)  # the same row
    assert read_segments(table)[2].start_s == 1234.567
    give_labels(str(table), "crowd.mp4", [])
    assert read_segments(table)[3].labels == ()


def test_what_else_a_table_says_stays(tmp_path: Path) -> None:
    table = tmp_path / "clips.csv"
    table.write_text('segment_id,source,remark\na,a.mp4,"loud, near"\nb,b.mp4,\n')
    assert give_labels(str(table), "a.mp4", ["dog"])
    lines = table.read_text().splitlines()
    assert lines == ["segment_id,source,remark,start_s,end_s,labels", 'a,a.mp4,"loud, near",,,dog', "b,b.mp4,,,,"]


def test_tables_that_cannot_be_changed_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clips\.tsv: labels are written to \.csv tables"):
        give_labels(str(tmp_path / "clips.tsv"), "a.mp4", [])
    for text, words in {
        "source;labels\na;b\n": "no column 'source'",
        "source,labels\na\n": "row 2 has not as many",
    }.items():
        (tmp_path / "clips.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            give_labels(str(tmp_path / "clips.csv"), "a.mp4", [])
        assert (tmp_path / "clips.csv").read_text() == text
