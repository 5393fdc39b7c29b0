import contextlib
import errno
import http.server
import itertools
import os
import pickle
import re
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from avsep import filesystems, storage
from tests.support.loopback import S3, Google, Store


@pytest.fixture(params=["local", "file", "memory", "s3", "gs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder by path, by a URI that pyarrow opens, by one that fsspec does, and in an object store."""
    if request.param in ("memory", "s3", "gs"):
        return request.getfixturevalue(f"{request.param}_folder")
    return str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("s3://bucket/key", True),
        ("memory://x", True),
        ("youtube:-_abc", True),
        ("anysite:1", True),
        ("take:1.wav", False),
        ("./take:1", False),
        ("take:1/a", False),
        ("take:*", False),
        ("C:a", False),
        ("run:12:30", False),
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


# ------------------------------------------------------------------------------------ object stores


def every(n: int, fault: str) -> Callable[[str, str], str | None]:
    """Fail the first of every n requests."""
    numbers = itertools.count()
    return lambda method, path: fault if next(numbers) % n == 0 else None


@pytest.mark.parametrize("fault", [*(pytest.param(f, marks=pytest.mark.slow) for f in ("slow_down", "reset")), "cut"])
def test_requests_that_fail_for_a_moment_are_made_again(store: Store, store_folder: str, fault: str) -> None:
    path, other = storage.join(store_folder, "a.bin"), storage.join(store_folder, "sub", "b.bin")
    store.fault = every(3, fault)
    storage.write_bytes(path, b"x" * 100_000)
    assert storage.read_bytes(path) == b"x" * 100_000
    with storage.open_input(path) as f:
        assert f.read(10) == b"x" * 10
    assert storage.list_files(store_folder) == [path]
    storage.move(path, other)
    assert not storage.exists(path) and storage.read_bytes(other) == b"x" * 100_000
    storage.delete_file(other)
    assert not storage.exists(other)
    assert store.faults[fault] >= 3


def test_a_store_that_is_slow_is_waited_for(store: Store, store_folder: str) -> None:
    store.delay_s = 0.2
    storage.write_bytes(storage.join(store_folder, "a.bin"), b"x")
    assert storage.read_bytes(storage.join(store_folder, "a.bin")) == b"x"


def test_a_folder_is_deleted_with_what_is_in_it(folder: str) -> None:
    for name in ("a.bin", "sub/b.bin", "sub/sub/c.bin"):
        storage.write_bytes(storage.join(folder, "x", name), b"x")
    storage.write_bytes(storage.join(folder, "xy"), b"x")
    storage.delete_folder(storage.join(folder, "x"))
    storage.delete_folder(storage.join(folder, "x"))  # gone already
    assert not storage.exists(storage.join(folder, "x")) and storage.exists(storage.join(folder, "xy"))


@pytest.mark.parametrize("size", [1000, 25 << 20])
def test_an_upload_that_fails_leaves_the_old_file(store, store_folder, impatient, size: int) -> None:
    """Small files are one PUT; of large ones some parts arrive, and nobody sees them."""
    path, puts = storage.join(store_folder, "a.bin"), itertools.count()
    storage.write_bytes(path, b"old")
    store.fault = lambda method, _: "slow_down" if method == "PUT" and (size < 1 << 20 or next(puts) > 0) else None
    with pytest.raises(OSError, match="reduce your request rate") as error:
        storage.write_bytes(path, b"x" * size)
    assert not [secret for secret in store.secrets if secret in str(error.value)]
    store.calm()
    assert storage.read_bytes(path) == b"old"
    with pytest.raises(TypeError):
        storage.write_bytes(path, "not bytes")  # type: ignore[arg-type]
    assert storage.read_bytes(path) == b"old" and storage.list_files(store_folder) == [path]


def test_a_small_file_is_one_put(s3: S3, s3_folder: str) -> None:
    storage.write_bytes(storage.join(s3_folder, "a.bin"), b"x" * 100_000)
    s3.requests.clear()
    storage.write_bytes(storage.join(s3_folder, "a.bin"), b"y" * 100_000)
    assert s3.requests == {"PUT": 1}


def test_a_reader_sees_one_writers_file_whole(store: Store, store_folder: str) -> None:
    """Also one that is replaced, by a longer or shorter one, between the requests that a read is made of."""
    path = storage.join(store_folder, "history.json")
    lengths = itertools.cycle([1000, 20])
    storage.write_bytes(path, b"x" * 10)

    def replace_before(method: str, _: str) -> None:
        if method == "GET" and store.requests["GET"] <= 2:
            store.put(path.partition("://")[2], b"y" * next(lengths))

    store.requests.clear()
    store.fault = replace_before
    data = storage.read_bytes(path)
    store.calm()
    assert data == storage.read_bytes(path)


def test_keys_stand_as_they_are(store: Store, store_folder: str) -> None:
    for name in ("Duo: Live 100% – Käse?.mp4", "a%20b", "-x_y+z=.txt"):
        path = storage.join(store_folder, name)
        storage.write_bytes(path, name.encode())
        assert storage.read_bytes(path).decode() == name and path in storage.list_files(store_folder)


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


def test_a_bucket_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-bucket"):
        storage.read_bytes(f"{store.scheme}://no-such-bucket/a")
    with pytest.raises(OSError, match="no-such-bucket"):
        storage.write_bytes(f"{store.scheme}://no-such-bucket/a", b"x")
    with contextlib.suppress(OSError):
        storage.make_directory(f"{store.scheme}://no-such-bucket/a")
    assert not storage.exists(f"{store.scheme}://no-such-bucket"), "a mistyped name makes no bucket"


def test_who_may_not_is_told_where_and_why(store: Store, store_folder: str) -> None:
    path = storage.join(store_folder, "a")
    store.fault = lambda method, _: "denied"
    for use in (
        storage.exists,
        storage.read_bytes,
        storage.list_files,
        lambda p: storage.write_bytes(p, b"x"),
        storage.delete_file,
    ):
        with pytest.raises(PermissionError, match=rf"^{path}: .*; check the credentials") as error:
            use(path)
        assert len(str(error.value)) < 350 and not [secret for secret in store.secrets if secret in str(error.value)]


def test_file_systems_travel_to_other_processes_without_the_secret(store: Store, store_folder: str) -> None:
    fs, inner = storage.filesystem(store_folder)
    pickled = pickle.dumps(fs)
    assert not [secret for secret in store.secrets if secret.encode() in pickled]
    storage.write_bytes(storage.join(store_folder, "a"), b"x")
    assert pickle.loads(pickled).get_file_info(f"{inner}/a").size == 1


def test_googles_store_is_asked_with_the_machines_token(gs: Google, gs_folder: str) -> None:
    storage.write_bytes(f"{gs_folder}/a", b"x")
    assert storage.read_bytes(f"{gs_folder.replace('gs:', 'gcs:')}/a") == b"x"
    assert gs.unauthorised == 0 and gs.requests["PUT"] == 1


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("STORAGE_EMULATOR_HOST", "{}"),
        ("STORAGE_EMULATOR_HOST", "http://{}/"),
        ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "http://{}"),
    ],
)
def test_an_emulator_is_asked_without_credentials(gs_server: Google, monkeypatch, name: str, address: str) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    monkeypatch.setenv(name, address.format(gs_server.behind))
    path = f"gs://{gs_server.make_bucket()}/a"
    storage.write_bytes(path, b"x")
    assert storage.read_bytes(path) == b"x"


def test_without_googles_credentials_the_remedies_are_named_at_once(monkeypatch, tmp_path: Path) -> None:
    storage.forget_connections()
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    with pytest.raises(PermissionError, match=r"GOOGLE_APPLICATION_CREDENTIALS=/nowhere/key.json: no such file"):
        storage.read_bytes("gs://bucket/a")
    (tmp_path / "key.json").write_text("{}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with pytest.raises(OSError, match=rf"^gs://bucket/a: .*{tmp_path}/key.json"):
        storage.read_bytes("gs://bucket/a")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("GOOGLE_GCLOUD_ADC_PATH_OVERRIDE", "/nowhere")
    monkeypatch.setattr(filesystems, "METADATA_S", 1.0)
    for host in ("metadata.invalid", "127.0.0.1:9"):
        monkeypatch.setenv("GCE_METADATA_ROOT", host)
        storage.forget_connections()
        started = time.monotonic()
        with pytest.raises(PermissionError, match="run `gcloud auth application-default login`"):
            storage.read_bytes("gs://bucket/a")
        assert time.monotonic() - started < 5
    storage.forget_connections()


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


# ------------------------------------------------------------------------------------------ one file by several names


def test_one_file_is_known_by_each_of_its_names(tmp_path: Path) -> None:
    folder, file = tmp_path / "a", tmp_path / "a" / "x.wav"
    folder.mkdir()
    file.write_bytes(b"x")
    (tmp_path / "b").symlink_to(folder)
    (tmp_path / "link.wav").symlink_to(file)
    os.link(file, tmp_path / "hard.wav")
    for other in ("a/../a/x.wav", "b/x.wav", "link.wav", "hard.wav"):
        assert storage.same(str(file), str(tmp_path / other)), other
    assert storage.same(f"file://{file}", str(file)) and storage.same(str(tmp_path / "b"), f"{folder}/")
    assert storage.same(str(tmp_path / "a" / "new"), str(tmp_path / "b" / "new"))  # neither is there yet
    assert storage.same("s3://bucket/a/", "s3://bucket/a") and storage.same("gcs://bucket/a", "gs://bucket/a")
    (tmp_path / "twin.wav").write_bytes(b"x")
    for one, other in ((file, tmp_path / "twin.wav"), ("s3://a/b", "/a/b"), ("s3://a/b", "s3://a/B")):
        assert not storage.same(str(one), str(other))


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_means_no_place(path: str) -> None:
    """Neither the working folder, as for the file system, nor its root, as in a URI."""
    for use in (storage.exists, storage.list_files, storage.filesystem, lambda p: storage.join(p, "x")):
        with pytest.raises(ValueError, match="a path is empty: give one"):
            use(path)
    with pytest.raises(ValueError, match="a path is empty"):
        storage.resolve(path, "/a")
    with pytest.raises(ValueError, match="a path is empty"), storage.local_file(path):
        pass
    assert storage.join("/", "x") == "/x"


def test_a_name_that_is_no_utf_8_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"udcff.*its name isn't UTF-8; rename it"):
        storage.exists(str(tmp_path / "\udcff.wav"))


# -------------------------------------------------------------------------------------------------------- the web


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers /NUMBER with that status, /cut with less than it promises, and all else with `sound`."""

    def do_GET(self) -> None:
        status = int(self.path[1:]) if self.path[1:].isdecimal() else 200
        self.send_response(status)
        self.send_header("Content-Length", "5000" if self.path == "/cut" else "5")
        self.end_headers()
        self.wfile.write(b"sound")

    def log_message(self, *_: object) -> None:
        return


def test_what_a_web_server_says_is_told(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        with storage.local_file(f"{address}/a.mp4?b=c.d") as path:
            assert path.read_bytes() == b"sound" and path.suffix == ".mp4"
        messages = {
            "/404": "doesn't exist; check the address",
            "/403": "can't be read: HTTP status 403, Forbidden",
            "/503": "can't be read: HTTP status 503, Service Unavailable",
            "/cut": "it was cut off 4,995 bytes before its end; check the address and the connection",
        }
        for name, message in messages.items():
            with pytest.raises(OSError, match=re.escape(address + name)) as caught, storage.local_file(address + name):
                pass
            assert message in str(caught.value)
        server.shutdown()
        thread.join()
    with pytest.raises(OSError, match=r"can't be reached: .*Connection refused"), storage.local_file(address):
        pass
    with (
        pytest.raises(ValueError, match=r"^youtube:abc is no file: pipelines.extract fetches such.* \./youtube:abc$"),
        storage.local_file("youtube:abc"),
    ):
        pass
