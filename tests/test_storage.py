import errno
import itertools
import os
import pickle
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from loopback import ACCESS_KEY, S3, SECRET_KEY, SESSION_TOKEN

from avsep import storage


@pytest.fixture(params=["local", "file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder by path, by a URI that pyarrow opens, by one that fsspec does, and in an object store."""
    if request.param in ("memory", "s3"):
        return request.getfixturevalue(f"{request.param}_folder")
    return str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


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


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/sub"):
        with pytest.raises(NotADirectoryError, match=rf"{path}: a file is in the way; give a folder"):
            storage.make_directory(str(tmp_path / path))
    with pytest.raises(OSError, match=r"^/proc/x can't be made \(.*\); give a folder that can be written to"):
        storage.make_directory("/proc/x")


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


# ----------------------------------------------------------------------------------------- S3


def every(n: int, fault: str) -> Callable[[str, str], str | None]:
    """Fail the first of every n requests."""
    numbers = itertools.count()
    return lambda method, path: fault if next(numbers) % n == 0 else None


@pytest.mark.parametrize("fault", [pytest.param("slow_down", marks=pytest.mark.slow), "reset", "cut"])
def test_requests_that_fail_for_a_moment_are_made_again(s3: S3, s3_folder: str, fault: str) -> None:
    path = storage.join(s3_folder, "a.bin")
    s3.fault = every(2, fault)
    storage.write_bytes(path, b"x" * 100_000)
    assert storage.read_bytes(path) == b"x" * 100_000
    assert storage.list_files(s3_folder) == [path]
    storage.delete_file(path)
    assert not storage.exists(path)
    assert s3.faults[fault] >= 3


def test_a_store_that_is_slow_is_waited_for(s3: S3, s3_folder: str) -> None:
    s3.delay_s = 0.2
    storage.write_bytes(storage.join(s3_folder, "a.bin"), b"x")
    assert storage.read_bytes(storage.join(s3_folder, "a.bin")) == b"x"


@pytest.mark.parametrize("size", [1000, 25 << 20])
def test_an_upload_that_fails_leaves_the_old_file(s3, s3_folder, monkeypatch, size: int) -> None:
    """Small files are one PUT; of large ones some parts arrive, and nobody sees them."""
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 2)
    storage._s3.cache_clear()
    path, puts = storage.join(s3_folder, "a.bin"), itertools.count()
    storage.write_bytes(path, b"old")
    s3.fault = lambda method, _: "slow_down" if method == "PUT" and (size < 1 << 20 or next(puts) > 0) else None
    with pytest.raises(OSError, match="reduce your request rate") as error:
        storage.write_bytes(path, b"x" * size)
    assert SECRET_KEY not in str(error.value) and ACCESS_KEY not in str(error.value)
    s3.calm()
    assert storage.read_bytes(path) == b"old"
    with pytest.raises(TypeError):
        storage.write_bytes(path, "not bytes")  # type: ignore[arg-type]
    assert storage.read_bytes(path) == b"old" and storage.list_files(s3_folder) == [path]
    storage._s3.cache_clear()


def test_a_small_file_is_one_put(s3: S3, s3_folder: str) -> None:
    storage.write_bytes(storage.join(s3_folder, "a.bin"), b"x" * 100_000)
    s3.requests.clear()
    storage.write_bytes(storage.join(s3_folder, "a.bin"), b"y" * 100_000)
    assert s3.requests == {"PUT": 1}


def test_a_reader_sees_one_writer_s_file_whole(s3: S3, s3_folder: str) -> None:
    """Also one that is replaced, by a longer or shorter one, between the requests that a read is made of."""
    path = storage.join(s3_folder, "history.json")
    lengths = itertools.cycle([1000, 20])
    storage.write_bytes(path, b"x" * 10)

    def replace_before(method: str, _: str) -> None:
        if method == "GET" and s3.requests["GET"] <= 2:
            s3.put(path.removeprefix("s3://"), b"y" * next(lengths))

    s3.requests.clear()
    s3.fault = replace_before
    data = storage.read_bytes(path)
    s3.calm()
    assert data == storage.read_bytes(path)


def test_keys_stand_as_they_are(s3: S3, s3_folder: str) -> None:
    for name in ("Duo: Live 100% – Käse?.mp4", "a%20b", "-x_y+z=.txt"):
        path = storage.join(s3_folder, name)
        storage.write_bytes(path, name.encode())
        assert storage.read_bytes(path).decode() == name and path in storage.list_files(s3_folder)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://KEY:s3cr3t@bucket/a", "credentials in a URI would be logged"),
        ("s3://KEY:s3/cr3t@bucket/a", "credentials in a URI would be logged"),
        ("http://me:s3cr3t@host/a.mp4", "credentials in a URI would be logged"),
        ("http://me:s3cr3t@[::1]:80/a.mp4", "credentials in a URI would be logged"),
        ("hdfs://[::1]:s3cr3t/a", "credentials in a URI would be logged"),
        ("s3://bucket/a?access_key=KEY&secret_key=s3cr3t", "into the environment"),
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str, shown: str) -> None:
    for use in (storage.read_bytes, lambda u: storage.resolve(u, ".")):
        with pytest.raises(ValueError, match=shown) as error:
            use(uri)
        assert "cr3t" not in str(error.value) and "KEY" not in str(error.value).replace("ACCESS_KEY", "")


def test_a_bucket_that_is_not_there_is_named(s3: S3) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-bucket"):
        storage.read_bytes("s3://no-such-bucket/a")
    with pytest.raises(OSError, match="no-such-bucket"):
        storage.write_bytes("s3://no-such-bucket/a", b"x")


def test_file_systems_travel_to_other_processes_without_the_secret(s3: S3, s3_folder: str) -> None:
    fs, inner = storage.filesystem(s3_folder)
    pickled = pickle.dumps(fs)
    assert SECRET_KEY.encode() not in pickled and SESSION_TOKEN.encode() not in pickled
    storage.write_bytes(storage.join(s3_folder, "a"), b"x")
    assert pickle.loads(pickled).get_file_info(f"{inner}/a").size == 1


def test_a_port_is_no_credential() -> None:
    for uri in (
        "hdfs://namenode:8020/a",
        "hdfs://[2001:db8::1]:8020/a",
        "http://[::1]/a.mp4",
        "http://[::1]:9000/a.mp4",
    ):
        assert storage.resolve(uri, ".") == uri


def test_a_full_disk_is_named_with_its_path_and_the_remedy(tmp_path: Path, memory_folder: str) -> None:
    storage.write_bytes(f"{memory_folder}/clip.mp4", bytes(5000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # what a full disk is to a program, but for the number
    try:
        with pytest.raises(
            OSError, match=r"\[Errno 27\] File too large; make room there, or write .*/data'$"
        ) as caught:
            storage.write_bytes(f"{tmp_path}/data", bytes(5000))
        with (
            pytest.raises(OSError, match=r"File too large; make room there, or let TMPDIR name .*\.mp4'$"),
            storage.local_file(f"{memory_folder}/clip.mp4"),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and caught.value.filename == f"{tmp_path}/data"
    assert not list(tmp_path.iterdir())
