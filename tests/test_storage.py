import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from avsep import storage


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder by path, by a URI that pyarrow opens, and by one that fsspec does."""
    if request.param != "memory":
        yield str(tmp_path) if request.param == "local" else f"file://{tmp_path}"
        return
    yield request.getfixturevalue("memory_folder")


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("s3://bucket/key", True),
        ("memory://x", True),
        ("youtube:-_abc", True),
        ("/a/b.mp4", False),
        ("a.mp4", False),
        ("C:/a.mp4", False),
        ("Duo: Live 12:30.mp4", False),
        ("/a/s3://b", False),
    ],
)
def test_uris_and_paths_are_told_apart(path: str, uri: bool) -> None:
    assert storage.is_uri(path) is uri


@pytest.mark.parametrize(
    ("path", "relative_to", "expected"),
    [
        ("a.mp4", "/data", "/data/a.mp4"),
        ("../a.mp4", "/data/sub", "/data/a.mp4"),
        ("/x/a.mp4", "/data", "/x/a.mp4"),
        ("youtube:ID", "/data", "youtube:ID"),
        ("a.mp4", "s3://bucket/data", "s3://bucket/data/a.mp4"),
        ("gs://b/a.mp4", "s3://bucket/data", "gs://b/a.mp4"),
        ("Duo: Live.mp4", "/data", "/data/Duo: Live.mp4"),
        ("~/a.mp4", "/data", os.path.expanduser("~/a.mp4")),
    ],
)
def test_resolve(path: str, relative_to: str, expected: str) -> None:
    assert storage.resolve(path, relative_to) == expected


def test_parts_of_paths() -> None:
    assert storage.join("s3://b/c/", "d", "e.txt") == "s3://b/c/d/e.txt"
    assert (storage.parent("/a/b.csv"), storage.parent("b.csv"), storage.parent("/b.csv")) == ("/a", ".", "/")
    assert (storage.name("s3://b/c.txt"), storage.name("c.txt")) == ("c.txt", "c.txt")


def test_files_are_written_listed_read_and_deleted(folder: str) -> None:
    a, b = storage.join(folder, "x", "a.bin"), storage.join(folder, "x", "b.txt")
    assert not storage.exists(a) and storage.list_files(storage.join(folder, "x")) == []
    assert storage.write_bytes(a, b"\0\1\2") is True
    storage.write_text(b, "Käse")
    storage.make_directory(storage.join(folder, "x", "sub"))
    assert storage.list_files(storage.join(folder, "x")) == [a, b]  # files alone, sorted, no temporary ones
    assert storage.exists(a) and storage.is_directory(storage.join(folder, "x")) and not storage.is_directory(a)
    assert storage.read_bytes(a) == b"\0\1\2" and storage.read_bytes(b).decode() == "Käse"
    with storage.open_input(a) as f:
        f.seek(1)
        assert f.read() == b"\1\2"
    with storage.local_file(b) as local:
        assert local.read_text() == "Käse" and local.suffix == ".txt"
    storage.write_bytes(a, b"new")
    assert storage.read_bytes(a) == b"new"
    storage.delete_file(a)
    storage.delete_file(a)  # gone already
    assert storage.list_files(storage.join(folder, "x")) == [b]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(a)


def test_an_exclusive_write_never_replaces(folder: str) -> None:
    path = storage.join(folder, "commit.json")
    assert storage.write_bytes(path, b"first", exclusive=True)
    assert not storage.write_bytes(path, b"second", exclusive=True)
    assert storage.read_bytes(path) == b"first"


def test_of_many_exclusive_writers_one_wins(tmp_path: Path) -> None:
    path, won = str(tmp_path / "commit.json"), []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        if storage.write_bytes(path, b"%d" % number * 10_000, exclusive=True):
            won.append(number)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1 and storage.read_bytes(path) == b"%d" % won[0] * 10_000
    assert os.listdir(tmp_path) == ["commit.json"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    storage.write_bytes(path, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(path, "not bytes")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["a.bin"] and storage.read_bytes(path) == b"old"


def test_an_unknown_scheme_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"can't open nosuch://x/y: .*install the scheme's fsspec package"):
        storage.read_bytes("nosuch://x/y")
