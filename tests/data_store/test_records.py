import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avsep.records import (
    ClipError,
    ClipRecord,
    Reason,
    Rejection,
    Segment,
    clip_schema,
    clips_from_table,
    clips_to_table,
    read_segments,
    rejections_to_table,
    segment_from_row,
    segments_to_table,
    validate,
)

F, M = 7, 3


def clip(segment_id: str = "a", n_frames: int = 5, seed: int = 0, **changes: object) -> ClipRecord:
    rng = np.random.default_rng(seed)
    bases = rng.random((F, M)).astype(np.float16)
    bases /= bases.max(0)
    energy = rng.random(M).astype(np.float32)
    record = ClipRecord(
        segment_id=segment_id,
        source="/videos/a.mp4",
        start_s=1.5,
        end_s=11.5,
        split="train",
        objects=("dog",),
        labels=("dog", "violin"),
        bases=bases,
        activations=rng.random((M, n_frames)).astype(np.float16),
        activation_scale=2.5,
        basis_energy=energy / energy.sum(),
        image_logits=rng.standard_normal((2, 1000)).astype(np.float16),
        kl_divergence=12.25,
        duration_s=10.0,
        rms_db=-20.5,
        media_sha256="ab" * 32,
        label_source="given",
    )
    return dataclasses.replace(record, **changes)


def same(a: ClipRecord, b: ClipRecord) -> bool:
    for field in dataclasses.fields(ClipRecord):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            if x.dtype != y.dtype or not np.array_equal(x, y):
                return False
        elif type(x) is not type(y) or x != y:
            return False
    return True


CLIPS = [
    clip("a"),
    clip("b", n_frames=9, seed=1, objects=None, labels=None, image_logits=None, end_s=None),
    clip("-_c", n_frames=2, seed=2, objects=(), labels=()),
]


def test_clips_come_back_from_arrow_as_they_were(tmp_path: Path) -> None:
    """None and the empty list differ, activations are ragged, bases keep shape and type."""
    table = clips_to_table(CLIPS, F, M)
    pq.write_table(table, tmp_path / "c.parquet")
    for back in (table, pq.read_table(tmp_path / "c.parquet"), pa.concat_tables([table[:1], table[1:]])):
        assert all(same(x, y) for x, y in zip(CLIPS, clips_from_table(back), strict=True))
    assert same(clips_from_table(table.slice(1, 1))[0], CLIPS[1])
    assert same(clips_from_table(table.take([2, 0]))[0], CLIPS[2])
    assert table.schema.equals(clip_schema(F, M))
    assert clips_to_table([], F, M).num_rows == 0


def test_the_schema_is_the_contract() -> None:
    schema = clip_schema(2401, 25)
    bases = schema.field("bases").type
    assert isinstance(bases, pa.FixedShapeTensorType)
    assert bases.shape == [2401, 25] and bases.value_type == pa.float16()
    kinds = {n: str(schema.field(n).type) for n in schema.names if n != "bases"}
    assert kinds == {
        "segment_id": "string",
        "source": "string",
        "start_s": "double",
        "end_s": "double",
        "split": "string",
        "objects": "list<item: string>",
        "labels": "list<item: string>",
        "activations": "list<item: halffloat>",
        "activation_scale": "float",
        "basis_energy": "fixed_size_list<item: float>[25]",
        "image_logits": "list<item: halffloat>",
        "kl_divergence": "double",
        "duration_s": "double",
        "rms_db": "float",
        "media_sha256": "string",
        "label_source": "string",
    }
    nullable = {f.name for f in schema if f.nullable}
    assert nullable == {"end_s", "objects", "labels", "image_logits"}


@pytest.mark.parametrize("record", [*CLIPS, Segment("x", "youtube:-_0"), Rejection("x", "decode", "timed_out")])
def test_whole_records_are_valid(record: Segment | ClipRecord | Rejection) -> None:
    validate(record)


BROKEN: list[tuple[Segment | ClipRecord | Rejection, str]] = [
    (Segment("", "a.mp4"), "segment_id must not be empty"),
    (Segment("a/b", "a.mp4"), "'a/b'.*must not hold a slash"),
    (Segment("..", "a.mp4"), "names files"),
    (Segment("a", ""), "source must not be empty"),
    (Segment("a", "a.mp4", split="dev"), "split 'dev' is none of train, val, test"),
    (Segment("a", "a.mp4", start_s=-1), "start_s is -1; it must be a time in seconds from 0 up"),
    (Segment("a", "a.mp4", start_s=float("nan")), "start_s is nan"),
    (Segment("a", "a.mp4", 5.0, 5.0), "end_s is 5.0; it must come after start_s = 5.0"),
    (Segment("a", "a.mp4", end_s=float("inf")), "end_s is inf"),
    (Segment("a", "a.mp4", labels=("tuba",)), r"labels holds \['tuba'\]; the objects are cat"),
    (Segment("a", "a.mp4", objects=("dog", "cow")), r"objects holds \['cow'\]"),
    (Rejection("a", "decode", "bad luck"), "reason 'bad luck' is none of missing, empty"),
    (Rejection("a", "decode", "timed_out", attempts=0), "attempts is 0; it counts from 1"),
    (clip(bases=np.full((F, M), 0.5, np.float16)), "each basis must have maximum one, or be all zero"),
    (clip(bases=np.full((F, M), np.nan, np.float16)), "bases must be finite"),
    (clip(bases=np.array([[-1, 1, 1], [1, 1, 1]], np.float16)), "bases must be finite and ≥ 0"),
    (clip(activations=np.ones((M + 1, 4), np.float16)), "one row of activations a basis"),
    (clip(activations=np.full((M, 4), np.inf, np.float16)), "activations must be finite"),
    (clip(basis_energy=np.ones(M, np.float32)), "basis_energy must sum to one"),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_a_broken_record_is_named_with_value_and_rule(record: Segment | ClipRecord | Rejection, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        validate(record)
    assert str(caught.value).startswith(f"{type(record).__name__} {record.segment_id!r}: ")


def test_a_clip_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ClipError(Reason.TIMEOUT, "40 s", transient=True)))
    assert (error.reason, error.detail, error.transient) == (Reason.TIMEOUT, "40 s", True)
    assert str(error) == "timed_out: 40 s"


def test_segments_and_rejections_as_tables() -> None:
    segments = [Segment("a", "/a.mp4"), Segment("b", "youtube:-x", 1, 2.5, "test", (), ("dog",))]
    rows = segments_to_table(segments).to_pylist()
    assert [segment_from_row(r, relative_to="/") for r in rows] == segments
    assert rows[0]["objects"] is None and rows[1]["objects"] == []
    rejected = Rejection("a", "decode", Reason.NO_AUDIO, True, 2, "sound?")
    assert Rejection(**rejections_to_table([rejected]).to_pylist()[0]) == rejected


def test_a_csv_table_is_read_as_the_contract_says(tmp_path: Path) -> None:
    """A missing column and an empty cell mean None, `none` an empty list; sources are relative to the table."""
    table = tmp_path / "t.csv"
    table.write_text(
        "segment_id,source,start_s,end_s,labels\n"
        "a_1000,clips/a.mp4,1,11.5,dog; violin;dog\n"
        "-b,youtube:-b_x,,,\n"
        'c,/abs/c.mp4,0,"2",banjo\n'
        "d,s3://bucket/d.mp4,0,2,banjo\n"
        "e,e.mp4,0,2, None \n",
        encoding="utf-8-sig",
    )
    assert read_segments(str(table)) == [
        Segment("a_1000", str(tmp_path / "clips/a.mp4"), 1.0, 11.5, "train", None, ("dog", "violin")),
        Segment("-b", "youtube:-b_x", 0.0, None, "train", None, None),
        Segment("c", "/abs/c.mp4", 0.0, 2.0, "train", None, ("banjo",)),
        Segment("d", "s3://bucket/d.mp4", 0.0, 2.0, "train", None, ("banjo",)),
        Segment("e", str(tmp_path / "e.mp4"), 0.0, 2.0, "train", None, ()),
    ]


def test_a_parquet_table_and_a_manifests_folder_read_alike(tmp_path: Path) -> None:
    segments = [Segment("a", "/a.mp4", 0.5, None, "val", None, ("dog",)), Segment("b", "/b.mp4", labels=())]
    for i, segment in enumerate(segments):
        pq.write_table(segments_to_table([segment]), tmp_path / f"segments-{i}.parquet")
    (tmp_path / "statistics.json").write_text("{}")
    assert read_segments(str(tmp_path)) == segments == read_segments(tmp_path)
    assert read_segments(str(tmp_path / "segments-1.parquet")) == segments[1:]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("segment_id,source\na,a.mp4\na,b.mp4", "'a' occurs twice; ids must be unique"),
        ("segment_id,source\na,a.mp4\nb,", "t.csv, row 3: source is missing or empty"),
        ("segment_id,file\na,a.mp4", "t.csv has no column 'source'; it is required .it has segment_id, file; the"),
        ("", "t.csv is empty; its first line must name the columns: segment_id, source"),
        ("\n# a comment\n", "t.csv is empty"),
        (
            "source\na.mp4\nb.mp4\nc/a.mkv",
            "row 4: its file's name, 'a', is also that of row 2.*add a column segment_id",
        ),
        ('segment_id,source,start_s\na,a.mp4,"1,500"', "row 2: start_s is '1,500', which may be thousands or a"),
        ("segment_id,source,labels\na,a.mp4,dog;none", "row 2: labels holds none beside dog; write either"),
        ("segment_id,source,labels\na,a.mp4,;", "row 2: labels is ';'; name objects, or write none"),
        ("segment_id,source,labels\na,a.mp4,guitar", "row 2: labels: object 'guitar' is ambiguous: acoustic_guitar or"),
        (
            "segment_id,source,objects\na,a.mp4,violen",
            r"row 2: objects: unknown object 'violen'; did you mean violin\?$",
        ),
        ("segment_id,source,split\na,a.mp4,holdout", "row 2: .*split 'holdout' is none of train, val, test"),
        (
            "segment_id,source,start_s\na,a.mp4,soon",
            "row 2: start_s is 'soon'; it must be a number of seconds",
        ),
        ("segment_id,source,end_s\na,a.mp4,-3", "row 2: .*end_s is -3.0; it must come after"),
        ("segment_id,source,labels\na,a.mp4,tuba", "row 2: labels: unknown object 'tuba'; the objects are"),
        ("segment_id,source,label\na,a.mp4,dog", r"has a column 'label'; did you mean 'labels'\? Rename"),
        ("segment_id,source,source\na,a.mp4,b.mp4", "has the column 'source' twice"),
        ("segment_id,source\na,a.mp4,dog", "row 2: 3 cells; the header has 2 columns"),
        ("segment_id,source,labels\na,a.mp4", "row 2: 2 cells; the header has 3 columns"),
        ('segment_id,source\na,"a.mp4', "row 2: broken quoting: unexpected end of data"),
        ("segment_id,source\na,\udcff.mp4", "t.csv, row 2: not UTF-8; save the table as UTF-8"),
        ("segment_id,sourc\udcff\na,a.mp4", "t.csv: line 1 is not UTF-8; save the table as UTF-8"),
    ],
)
def test_a_broken_table_names_row_value_and_rule(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(rows.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_segments(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"start_s": [[1.0]]}, r"row 1: start_s is \[1.0\]; it must be a number of seconds"),
        ({"labels": [5]}, "row 1: labels is 5; it must be a list of object names"),
        ({"labels": [["dog", None]]}, r"row 1: labels is \['dog', None\]; it must be a list of object names"),
        ({"labels": [["tuba"]]}, "row 1: labels: unknown object 'tuba'; the objects are"),
        ({"Source": [1]}, "has the column 'source' twice"),
    ],
)
def test_a_parquet_table_of_another_schema_is_named(tmp_path: Path, cells: dict[str, list], message: str) -> None:
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"segment_id": [0], "source": ["a.mp4"], **cells}), table)
    with pytest.raises(ValueError, match=message):
        read_segments(str(table))


def test_a_source_of_an_unknown_scheme_is_refused(tmp_path: Path) -> None:
    sources = ["s3://b/a.mp4", "simplecache::memory://b/b.mp4", "https://x.org/c.mp4", "foo://b/d.mp4"]
    (tmp_path / "t.csv").write_text("".join(["source\n", *(f"{s}\n" for s in sources)]))
    with pytest.raises(ValueError, match=r"row 5: source is 'foo://b/d.mp4', and nothing opens foo://; sources are"):
        read_segments(tmp_path / "t.csv")


def test_a_source_of_an_unknown_site_is_refused_unless_a_file_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("segment_id,source\na,tape:1\nb,./tape:2\nc,Tape:3\n")
    with pytest.raises(ValueError, match=r"t.csv, row 2: source is 'tape:1', and 'tape' is no known .*: .* youtube:ID"):
        read_segments(tmp_path / "t.csv")
    (tmp_path / "tape:1").touch()
    sources = [s.source for s in read_segments(tmp_path / "t.csv")]
    assert sources == [str(tmp_path / name) for name in ("tape:1", "tape:2", "Tape:3")]
    pq.write_table(segments_to_table(read_segments(tmp_path / "t.csv")), tmp_path / "t.parquet")
    (tmp_path / "tape:1").unlink()  # by its path it is a missing file, no site
    assert [s.source for s in read_segments(tmp_path / "t.parquet")] == sources


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"t.parquet is no Parquet file"):
        read_segments(str(tmp_path / "t.parquet"))
    (tmp_path / "t.txt").write_text("segment_id,source\n")
    with pytest.raises(ValueError, match=r"t.txt: a table's name must end with .csv or .parquet"):
        read_segments(str(tmp_path / "t.txt"))


def test_no_table_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.csv doesn't exist; a table"):
        read_segments(str(tmp_path / "nothing.csv"))
    with pytest.raises(FileNotFoundError, match=r"holds no segments.*run pipelines.manifest first"):
        read_segments(str(tmp_path))
