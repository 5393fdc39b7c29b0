"""One way to open local paths and URIs; writes are atomic."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from avsep.filesystems import (
    AnyPath,
    check_uri,
    filesystem,
    given,
    is_opaque,
    is_uri,
    opened,
)
from avsep.filesystems import forget_connections as forget_connections  # a part of this file's face
from avsep.filesystems import has_known_scheme as has_known_scheme

if TYPE_CHECKING:  # they take a second, which nobody needs who reads local files
    import pyarrow as pa
    import pyarrow.fs as pafs


ABANDONED_S = 3600.0  # a file that was begun this long ago has no writer any more
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, a file
TEMPORARY_REMEDY = "make room there, or let TMPDIR name a folder that has some"
_WEB_SILENCE_S = 30.0  # of a web server
_TEMPORARY = re.compile(r"(?P<before>.*)\.(?P<pid>\d+)\.[0-9a-f]+\.tmp")


def redact(text: str) -> str:
    """Hide what URLs say about users and passwords.

    >>> redact("--proxies http://me:secret@proxy:80 s3://bucket/a@b")
    '--proxies http://…@proxy:80 s3://bucket/a@b'
    """
    return re.sub(r"(://)[^\s/@]*(:[^\s@]*)?@", r"\1…@", text)


def resolve(path: str, relative_to: str) -> str:
    """Make a local path absolute, from `relative_to` when it is relative; leave URIs alone.

    Raises ValueError for an empty path.
    """
    if is_uri(given(path)):
        check_uri(path)
        return path
    if is_uri(relative_to):
        return join(relative_to, path) if not os.path.isabs(path) else path
    return os.path.normpath(os.path.join(os.path.abspath(relative_to), os.path.expanduser(path)))


def join(base: AnyPath, *parts: str) -> str:
    """Join with slashes, which every URI and every supported system takes. Raises ValueError for an empty base."""
    return "/".join([given(base).rstrip("/"), *parts])


def same(one: str, other: str) -> bool:
    """Tell whether two paths lead to one file or folder: by links, other spellings, or case where that is ignored.

    Neither has to be there.
    """
    (scheme, inner), (other_scheme, other_inner) = _place(one), _place(other)
    if scheme or other_scheme:
        return (scheme, inner) == (other_scheme, other_inner)
    try:
        return os.path.samefile(inner, other_inner)
    except OSError:  # one of them isn't there
        return os.path.realpath(inner) == os.path.realpath(other_inner)


def _place(path: str) -> tuple[str, str]:
    """Divide a path into its scheme, "" for local ones, and what follows, without opening anything."""
    if not is_uri(given(path)):
        return "", path
    scheme, _, inner = path.partition("://")
    if scheme == "file":
        return "", "/" + inner.lstrip("/")
    return {"gcs": "gs"}.get(scheme, scheme), inner.strip("/")


def parent(path: str) -> str:
    """Return what comes before the last slash; the working directory for a bare name."""
    return (path.rsplit("/", 1)[0] or "/") if "/" in path else "."


def name(path: str) -> str:
    """Return what comes after the last slash."""
    return path.rsplit("/", 1)[-1]


def info(path: AnyPath) -> pafs.FileInfo:
    """Return type, size and age of a file or directory."""
    with opened(path) as (fs, inner):
        return fs.get_file_info(inner)


def infos(path: AnyPath, *, recursive: bool = False) -> list[pafs.FileInfo]:
    """Return what `info` does of all that is in a directory; [] when there is none."""
    import pyarrow.fs as pafs

    with opened(path) as (fs, inner):
        found: list[pafs.FileInfo] = fs.get_file_info(
            pafs.FileSelector(inner, recursive=recursive, allow_not_found=True)
        )
        return found


def exists(path: AnyPath) -> bool:
    """Tell whether a file or a directory is there."""
    import pyarrow.fs as pafs

    return info(path).type != pafs.FileType.NotFound


def is_directory(path: AnyPath) -> bool:
    """Tell whether it is a directory (on object stores: a prefix with files under it)."""
    import pyarrow.fs as pafs

    return info(path).type == pafs.FileType.Directory


def unwritable(folder: str) -> str:
    """Say why nothing can be written to a folder, as far as its name tells; "" for nothing.

    >>> unwritable("s3:/bucket/out")
    's3:/bucket/out has one slash; write s3://bucket/out, or ./s3:/bucket/out for such a folder'
    """
    if re.match("https?:/", folder):
        return f"{folder} is a web address, which can't be written to; give a folder, or a URI such as s3://bucket/name"
    if re.match(r"[a-z][a-z0-9]+:/(?!/)", folder) and not os.path.exists(folder.partition("/")[0]):
        uri = folder.replace(":/", ":///" if folder.startswith("file:") else "://", 1)
        return f"{folder} has one slash; write {uri}, or ./{folder} for such a folder"
    if is_uri(folder):
        return ""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if os.path.isdir(place):
        return ""
    where = folder if place == os.path.abspath(folder) else f"{folder} lies in {place}, which"
    return f"{where} is {'a file' if os.path.exists(place) else 'a broken link'}; give a folder"


def make_directory(path: AnyPath) -> None:
    """Create a directory and its parents; an object store needs none.

    Raises OSError, with the remedy, where a file is in the way or nothing may be written.
    """
    import pyarrow.fs as pafs

    fs, inner = filesystem(path)
    if isinstance(fs, pafs.LocalFileSystem):
        try:
            os.makedirs(inner, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(f"{path}: a file is in the way; give a folder") from None
        except OSError as error:
            raise OSError(f"{path} can't be made ({error.strerror}); give a folder that can be written to") from None
        if not os.access(inner, os.W_OK):
            raise PermissionError(f"{path} is read-only; give a folder that can be written to")
        return
    with opened(path):
        if fs.type_name != "gcs":  # there pyarrow makes the bucket, too
            fs.create_dir(inner, recursive=True)


def list_files(path: str) -> list[str]:
    """List the files directly in a directory, sorted, as paths of the same kind; [] when there is none."""
    import pyarrow.fs as pafs

    if not is_uri(given(path)):  # where names need not be UTF-8, as pyarrow's must
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            return sorted(join(path, entry.name) for entry in entries if entry.is_file())
        return []
    return sorted(join(path, i.base_name) for i in infos(path) if i.type == pafs.FileType.File)


@contextlib.contextmanager
def open_input(path: str) -> Iterator[pa.NativeFile]:
    """Open a file for random reads."""
    import pyarrow as pa

    with opened(path) as (fs, inner):
        if fs.type_name == "gcs":  # whose files hold Python's lock while they wait, and hide why a read failed
            file = pa.BufferReader(read_bytes(path))
        else:
            file = fs.open_input_file(inner)
    with file as f:
        yield f


def read_bytes(path: AnyPath) -> bytes:
    """Read a whole file, as one writer left it."""
    with opened(path) as (fs, inner):
        if fs.type_name == "gcs":
            with fs.open_input_stream(inner) as f:  # one request; what is cut off goes on with the same version
                return bytes(f.read())
        while True:
            with fs.open_input_file(inner) as f:
                data: bytes = f.read()
                if fs.type_name != "s3":
                    return data
                version = f.metadata().get(b"ETag")
            # length and content are two requests, between which the file may be replaced
            with fs.open_input_file(inner) as f:
                if f.metadata().get(b"ETag") == version and len(data) == f.size():
                    return data


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Give a path beside a local file's to write to; what is there in the end takes the file's place, whole."""
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: str, data: bytes | memoryview | pa.Buffer, *, exclusive: bool = False) -> bool:
    """Write a whole file atomically: readers see all of it or nothing.

    Locally a temporary file is flushed to disk and renamed; on an object store it is one PUT, or
    an upload in parts, which nobody sees until it is complete. OSError names the path where its disk is full.
    With `exclusive`, an existing file wins: nothing is written and False comes back. For object stores that isn't
    exact: of those that write there at the same time the last wins. `conditional` is exact.
    """
    import pyarrow as pa
    import pyarrow.fs as pafs

    fs, inner = filesystem(path)
    if not isinstance(fs, pafs.LocalFileSystem):
        if exclusive and exists(path):
            return False
        buffer = pa.py_buffer(data)  # fails here: whatever fails in the block is stored as far as it came
        with opened(path), fs.open_output_stream(inner) as stream:
            stream.write(buffer)
        return True
    os.makedirs(os.path.dirname(inner), exist_ok=True)
    temporary = f"{inner}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        with _naming(path, "make room there, or write elsewhere"), open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if not exclusive:
            os.replace(temporary, inner)
            return True
        try:
            os.link(temporary, inner)
            return True
        except FileExistsError:
            return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def _naming(path: AnyPath, remedy: str) -> Iterator[None]:
    """Give the error of a full disk, which knows no path, the path and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise full_disk(error, path, remedy) from None


def full_disk(error: OSError, path: AnyPath, remedy: str) -> OSError:
    """Return what tells that there is no room at `path`; an error without a number, as numpy's are, means ENOSPC."""
    number = error.errno or errno.ENOSPC
    return OSError(number, f"{os.strerror(number)}; {remedy}", os.fspath(path))


def sweep(path: str, *, recursive: bool = False, older_s: float = ABANDONED_S) -> list[str]:
    """Delete temporary files and folders that killed writers left in a directory; return their names.

    A writer is gone when it was a process of this machine that has ended, or when its file is
    older than `older_s`.
    """
    import pyarrow.fs as pafs

    fs, _ = filesystem(path)
    swept = []
    for found in infos(path, recursive=recursive):
        match = _TEMPORARY.fullmatch(found.base_name)
        if match:
            here = match["before"].endswith(f".{socket.gethostname()}")
            ended = here and not os.path.exists(f"/proc/{match['pid']}")
            if ended or is_older(found, older_s):
                with contextlib.suppress(FileNotFoundError):
                    if found.type == pafs.FileType.Directory:
                        fs.delete_dir(found.path)
                    else:
                        fs.delete_file(found.path)
                    swept.append(found.base_name)
    return swept


def is_older(info: pafs.FileInfo, seconds: float) -> bool:
    """Tell whether a file was last written more than `seconds` ago; False where the store doesn't say."""
    return info.mtime_ns is not None and time.time() - info.mtime_ns / 1e9 > seconds


def write_text(path: str, text: str) -> None:
    """Write a whole text file atomically, UTF-8."""
    write_bytes(path, text.encode())


def delete_file(path: str) -> None:
    """Delete a file; nothing happens when it is gone already."""
    with contextlib.suppress(FileNotFoundError), opened(path) as (fs, inner):
        fs.delete_file(inner)


def delete_folder(path: str) -> None:
    """Delete a folder and all that is in it; nothing happens when there is none."""
    with contextlib.suppress(FileNotFoundError), opened(path) as (fs, inner):
        if fs.type_name != "gcs":
            fs.delete_dir(inner)
            return
        for found in infos(path, recursive=True):  # pyarrow stumbles over folders that have no object of their own
            delete_file(f"gs://{found.path}")


def move(source: str, target: str) -> None:
    """Put a file in another's place, on the same file system."""
    with opened(source) as (fs, inner):
        _, place = filesystem(target)
        if fs.type_name != "gcs":
            fs.move(inner, place)
        else:  # pyarrow's own fails where a delete's answer is lost: the request made again finds nothing
            fs.copy_file(inner, place)
            delete_file(source)


@contextlib.contextmanager
def local_file(path: str) -> Iterator[Path]:
    """Give a path that programs such as ffmpeg can open; a URI is copied to a temporary file first.

    OSError says why a URI can't be read.
    """
    import pyarrow.fs as pafs

    if not is_uri(given(path)):
        with _readable_name(Path(os.path.abspath(path))) as local:
            yield local
        return
    if is_opaque(path):
        raise ValueError(f"{path} is no file: pipelines.extract fetches such, of sites it knows; a file: ./{path}")
    fs, inner = filesystem(path)
    if isinstance(fs, pafs.LocalFileSystem):
        yield Path(inner)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, f"copy{Path(re.split('[?#]', inner)[0]).suffix}")
        with _naming(copy, TEMPORARY_REMEDY), _stream(path) as stream, copy.open("wb") as target:
            shutil.copyfileobj(stream, target, 1 << 20)
        yield copy


@contextlib.contextmanager
def _readable_name(path: Path) -> Iterator[Path]:
    """Give a file whose name isn't UTF-8 another one, by a link; libraries fail at the first."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, f"file{path.suffix if path.suffix.isascii() else ''}")
            link.symlink_to(path)
            yield link
        return
    yield path


@contextlib.contextmanager
def _stream(uri: str) -> Iterator[BinaryIO]:
    """Open a URI for reading once; OSError says whether it isn't there, or what else its server has against it."""
    web = uri.startswith(("http://", "https://"))  # of which fsspec says 'not found', whatever goes wrong
    try:
        with _web_stream(uri) if web else _store_stream(uri) as stream:
            yield stream
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{uri} doesn't exist; check the {'address' if web else 'path'}") from error
    except urllib.error.HTTPError as error:
        raise OSError(f"{uri} can't be read: HTTP status {error.code}, {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(f"{uri} can't be reached: {error.reason}; check the address and the connection") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        why = str(error) or type(error).__name__
        raise OSError(f"{uri} can't be read: {why}; check the address and the connection") from None


@contextlib.contextmanager
def _store_stream(uri: str) -> Iterator[BinaryIO]:
    with opened(uri) as (fs, inner), fs.open_input_stream(inner) as stream:
        yield stream


@contextlib.contextmanager
def _web_stream(url: str) -> Iterator[BinaryIO]:
    try:
        answer = urllib.request.urlopen(url, timeout=_WEB_SILENCE_S)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(url) from None
        raise
    with answer:
        yield answer
        if answer.length:  # left to read
            raise http.client.HTTPException(f"it was cut off {answer.length:,} bytes before its end")
