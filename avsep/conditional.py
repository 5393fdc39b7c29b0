"""Files that are written only where nobody else has written meanwhile: condition and write are one step.

S3 has that by `If-None-Match` and `If-Match`, Google's store by `ifGenerationMatch`, which pyarrow asks neither for.
Local files have it when they are created. Elsewhere, and in stores that ignore the condition, the last writer wins.
"""

from __future__ import annotations

import json
import random
import secrets
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import pyarrow.fs as pafs

from avsep import filesystems, storage

_PASSING = (408, 429, 500, 502, 503, 504)  # of Google's statuses: the same request may succeed later
_T = TypeVar("_T")


class Place:
    """Where one file is, or is to be. Its versions are the store's own; "" stands for any."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self) -> tuple[bytes, str]:
        """Return what is in it, and its version. Raises FileNotFoundError, and OSError."""
        return storage.read_bytes(self.path), ""

    def write(self, data: bytes, version: str | None) -> str | None:
        """Write where the file still has that version, None: where there is no file.

        Returns the new version; None where it is another one. So it is, too, where the first answer to this very
        write was lost and it was asked again: read the file. Raises OSError.
        """
        return "" if storage.write_bytes(self.path, data, exclusive=version is None) else None

    def delete(self, version: str) -> None:
        """Delete it where it still has that version, as far as its store can tell."""
        storage.delete_file(self.path)

    def is_exact(self, data: bytes, created: bool) -> bool:
        """Tell whether the write of `data` that was just made was one step with its condition.

        `created` says that the condition was that there be no file. A store that isn't known yet is asked for what it
        has to refuse.
        """
        return created and isinstance(storage.filesystem(self.path)[0], pafs.LocalFileSystem)


def place(path: str) -> Place:
    """Return the place of a path or URI. Raises what `storage.filesystem` raises."""
    if path.startswith("s3://"):
        return _S3(path)
    return _Google(path) if path.startswith(("gs://", "gcs://")) else Place(path)


class _Conditional(Place):
    honours: bool | None = None  # conditions; None: not known yet

    def is_exact(self, data: bytes, created: bool) -> bool:
        if self.honours is None:
            self.honours = self.write(data, None) is None
        return self.honours


class _S3(_Conditional):
    """A file in S3, or of a server that speaks its language; a version is an ETag."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        bucket, _, key = storage.filesystem(path)[1].partition("/")
        self._client, self._file = filesystems.s3_client(bucket), {"Bucket": bucket, "Key": key}

    def read(self) -> tuple[bytes, str]:
        from botocore.exceptions import IncompleteReadError, ResponseStreamingError

        def get() -> tuple[bytes, str]:
            answer = self._client.get_object(**self._file)
            return answer["Body"].read(), answer["ETag"]

        with self._explaining():
            return _patiently(get, ResponseStreamingError, IncompleteReadError)  # of the body; it retries the rest

    def write(self, data: bytes, version: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self._explaining():
            try:
                answer = _patiently(lambda: self._put(data, condition), _Conflict)
            except (_Refused, _Conflict):
                return None
            except _Unknown:
                self.honours = False
                return super().write(data, version)
        return str(answer["ETag"])

    def _put(self, data: bytes, condition: dict[str, str]) -> Any:
        from botocore.exceptions import ClientError

        try:
            return self._client.put_object(**self._file, Body=data, **condition)
        except ClientError as error:
            status = _status(error)
            if status == 412 or (status == 404 and "IfMatch" in condition):  # else there is no bucket
                raise _Refused from None
            if status == 409:
                raise _Conflict from None
            if status == 501:
                raise _Unknown from None
            raise

    def delete(self, version: str) -> None:
        from botocore.exceptions import ClientError

        with self._explaining():
            try:
                self._client.delete_object(**self._file, IfMatch=version)
            except ClientError as error:
                if _status(error) in (400, 405, 501):  # a server that knows no such condition
                    super().delete(version)
                elif _status(error) not in (404, 412):
                    raise

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            answer = error.response.get("Error", {})
            said = f"{answer.get('Code', '')} {answer.get('Message', '')}".strip()
            raise _explained(self.path, _status(error), said) from None
        except BotoCoreError as error:
            raise _explained(self.path, 0, str(error)) from None


class _Refused(Exception):
    """The condition doesn't hold."""


class _Conflict(Exception):
    """Another write was under way."""


class _Unknown(Exception):
    """The server doesn't know of conditions."""


def _status(error: Any) -> int:
    """Return the HTTP status of S3's answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


class _Google(_Conditional):
    """A file in Google's store; a version is a generation."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        bucket, _, key = storage.filesystem(path)[1].partition("/")
        self._session, self._endpoint = filesystems.google_session()
        self._key, self._objects = key, f"/storage/v1/b/{bucket}/o"
        self._object = f"{self._objects}/{urllib.parse.quote(key, safe='')}"

    def read(self) -> tuple[bytes, str]:
        answer = self._ask("GET", self._object, {"alt": "media"})
        return answer.content, answer.headers["x-goog-generation"]

    def write(self, data: bytes, version: str | None) -> str | None:
        boundary = secrets.token_hex(16)
        parts = (("application/json", json.dumps({"name": self._key}).encode()), ("application/octet-stream", data))
        body = b"".join(f"--{boundary}\r\nContent-Type: {kind}\r\n\r\n".encode() + p + b"\r\n" for kind, p in parts)
        answer = self._ask(
            "POST",
            f"/upload{self._objects}",
            {"uploadType": "multipart", "ifGenerationMatch": version or "0"},
            data=body + f"--{boundary}--\r\n".encode(),
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
        )
        return None if answer.status_code == 412 else str(answer.json()["generation"])

    def delete(self, version: str) -> None:
        with suppress(FileNotFoundError):
            self._ask("DELETE", self._object, {"ifGenerationMatch": version})

    def _ask(self, method: str, path: str, parameters: dict[str, str], **more: Any) -> Any:
        """Return the answer to a request, an unmet condition's too; OSError says what else is wrong."""
        import requests
        from google.auth.exceptions import GoogleAuthError, TransportError

        url = self._endpoint + path
        timeout = (filesystems.CONNECT_S, filesystems.SILENCE_S)

        def ask() -> Any:
            answer = self._session.request(method, url, params=parameters, timeout=timeout, **more)
            if answer.status_code in _PASSING:
                raise requests.ConnectionError(f"HTTP status {answer.status_code}, {_said_by(answer)}")
            return answer

        try:
            answer = _patiently(ask, requests.RequestException, TransportError)
        except GoogleAuthError as error:
            status = 0 if isinstance(error, TransportError) else 401
            raise _explained(self.path, status, str(error.args[0])) from None
        except requests.RequestException as error:
            raise _explained(self.path, 0, str(error)) from None
        if answer.ok or answer.status_code == 412:
            return answer
        raise _explained(self.path, answer.status_code, _said_by(answer))


def _said_by(answer: Any) -> str:
    """Return what an answer of Google's says is wrong."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(answer.reason)


def _patiently(ask: Callable[[], _T], *passing: type[Exception]) -> _T:
    """Ask again, as often as the storage layer does, where an exception may pass."""
    for attempt in range(1, filesystems.S3_ATTEMPTS):
        try:
            return ask()
        except passing:
            time.sleep(min(2**attempt / 4, 8) * (0.5 + random.random() / 2))
    return ask()


def _explained(path: str, status: int, said: str) -> OSError:
    """Return the error that says what is wrong, in which file, and what to do."""
    said = said.strip(" .")
    if status in (401, 403):
        return PermissionError(f"{path}: {said}; check the credentials, and what they may do in the bucket")
    if status == 404:
        return FileNotFoundError(f"{path}: {said}; check the path")
    return OSError(f"{path}: {said}; check the settings and the connection")
