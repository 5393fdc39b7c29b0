"""The file systems of paths and URIs: which are URIs, how each store is reached, and what its errors mean."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they take a second, which nobody needs who reads local files
    import pyarrow.fs as pafs

AnyPath = str | os.PathLike[str]  # a local path; URIs are str

S3_ATTEMPTS = 8  # at a request that is refused, cut off or unanswered: half a minute and more
CONNECT_S, SILENCE_S = 10.0, 30.0
GS_PATIENCE_S = 180.0  # with a request that is refused or cut off; an unanswered one is given up after 120
METADATA_S = 10.0  # a new pod's metadata server takes some seconds
_GOOGLE = re.compile(r"google::cloud::Status\(\w+: (?:[^,]*, with a last message of )?(?P<cause>.*?) error_info=", re.S)
_OPTION = re.compile(r"[?&](access_key|secret_key|session_token|endpoint_override|region|scheme)=")
_SCHEMES = {"file", "s3", "gs", "gcs", "http", "https", "hdfs", "viewfs", "abfs", "abfss"}  # beside fsspec's
_OPAQUE = re.compile(r"[a-z][a-z0-9]+:[^\s:./\\*?\[]+")


def is_uri(path: AnyPath) -> bool:
    """Tell URIs, `s3://bucket/key` and opaque ones, from local paths, whose names may hold colons too."""
    path = os.fspath(path)
    scheme, separator, _ = path.partition("://")
    return is_opaque(path) or (bool(separator) and "/" not in scheme and len(scheme) > 1)


def is_opaque(path: AnyPath) -> bool:
    """Tell `scheme:id`, which no file system opens, from paths: it has neither slash, suffix, blank nor pattern.

    A local file or folder of such a name is written with its folder.

    >>> [is_opaque(p) for p in ("tape:a1", "take:1.wav", "./tape:a1", "Duo: Live")]
    [True, False, False, False]
    """
    return _OPAQUE.fullmatch(os.fspath(path)) is not None


def has_known_scheme(uri: str) -> bool:
    """Tell whether some file system opens URIs of this scheme, or pages are fetched of it; nothing is asked.

    >>> has_known_scheme("s3://bucket/duet.mp4"), has_known_scheme("tape://a/1")
    (True, False)
    """
    scheme = uri.partition("://")[0].partition("::")[0]
    if scheme in _SCHEMES:
        return True
    import fsspec  # takes half a second

    return scheme in fsspec.registry or scheme in fsspec.available_protocols()


def filesystem(path: AnyPath) -> tuple[pafs.FileSystem, str]:
    """Open the file system of a local path or URI: pyarrow's own, else fsspec's.

    S3 is set up by the environment variables that other tools read. `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
    `AWS_SESSION_TOKEN` and `AWS_PROFILE` say who asks. `AWS_REGION` or `AWS_DEFAULT_REGION`, and
    `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, say where. Google's store takes its Application Default Credentials,
    or `STORAGE_EMULATOR_HOST` for an emulator, without credentials. What follows the bucket is the key as it stands.
    Raises ValueError for a scheme that nobody knows, and for credentials in a URI; PermissionError without Google's
    credentials.
    """
    import pyarrow.fs as pafs

    path = given(path)
    if not is_uri(path):
        return pafs.LocalFileSystem(), _utf8(os.path.abspath(path))
    import fsspec
    import pyarrow as pa

    check_uri(path)
    if is_opaque(path):
        raise ValueError(f"{path} is no path; write ./{path} for a file or folder of this name")
    if path.startswith("s3://"):
        inner = path.removeprefix("s3://").rstrip("/")
        return _s3(*_s3_settings(inner.split("/")[0])), inner
    if path.startswith(("gs://", "gcs://")):
        return _gs(_gs_emulator()), path.partition("://")[2].rstrip("/")
    with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pafs.FileSystem.from_uri(path)
    try:
        remote, inner = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise ValueError(f"can't open {path}: {error}; install the scheme's fsspec package") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(remote)), inner


def given(path: AnyPath) -> str:
    """Return a path as text; ValueError for an empty one, which would mean the working folder or `/`."""
    if not (text := os.fspath(path)).strip():
        raise ValueError("a path is empty: give one (`.` is the working folder), or check the variable it came from")
    return text


def _utf8(path: str) -> str:
    """Return a path; ValueError for one that isn't UTF-8, which pyarrow can't open."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path!a}: its name isn't UTF-8; rename it") from None
    return path


def check_uri(uri: str) -> None:
    """Refuse credentials, which would go into logs, records and messages; the message doesn't repeat them."""
    scheme, _, rest = uri.partition("://")
    host = rest.partition("/")[0]  # a secret key may hold slashes
    host = re.sub(r"^\[[0-9A-Fa-f:.]+\]", "", host)  # an IPv6 address
    if "@" in host or re.search(r":(?!\d+$)", host):  # a port is all digits
        raise ValueError(f"{scheme}://…: credentials in a URI would be logged; give them by environment or profile")
    if scheme == "s3" and _OPTION.search(rest):
        raise ValueError(
            f"s3://{rest.partition('?')[0]}?…: options of S3 go into the environment: "
            "AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, …"
        )


def _s3_settings(bucket: str) -> tuple[str | None, str | None]:
    """Return endpoint and region; without either, the region is that of the bucket."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    if not endpoint and not region:
        with contextlib.suppress(OSError):  # no such bucket, no network: the first request says it better
            region = _region_of(bucket)
    return endpoint, region


@functools.lru_cache
def _region_of(bucket: str) -> str:
    import pyarrow.fs as pafs

    return str(pafs.resolve_s3_region(bucket))


@functools.lru_cache
def _s3(endpoint: str | None, region: str | None) -> pafs.FileSystem:
    import pyarrow.fs as pafs

    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        allow_delayed_open=True,  # a small file is one PUT
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
    )


def s3_client(bucket: str) -> Any:
    """Return botocore's client for a bucket, set up as pyarrow's is, for what that can't ask for."""
    return _s3_client(*_s3_settings(bucket))


@functools.lru_cache
def _s3_client(endpoint: str | None, region: str | None) -> Any:
    import botocore
    import botocore.config
    import botocore.session

    session = botocore.session.Session()
    config = botocore.config.Config(
        signature_version=None if session.get_credentials() else botocore.UNSIGNED,
        connect_timeout=CONNECT_S,
        read_timeout=SILENCE_S,
        retries={"mode": "standard", "total_max_attempts": S3_ATTEMPTS},
        s3={"addressing_style": "path" if endpoint else "auto"},
        request_checksum_calculation="when_required",  # other servers than Amazon's don't know the rest
        response_checksum_validation="when_required",
        proxies={},  # none, as pyarrow
    )
    region = region or session.get_config_variable("region") or "us-east-1"
    return session.create_client("s3", region_name=region, endpoint_url=endpoint, config=config)


def _gs_emulator() -> str | None:
    return os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT") or os.environ.get("STORAGE_EMULATOR_HOST") or None


@functools.lru_cache
def _gs(emulator: str | None) -> pafs.FileSystem:
    import pyarrow.fs as pafs

    patience = datetime.timedelta(seconds=GS_PATIENCE_S)
    if emulator:  # which pyarrow would ask with credentials
        scheme, _, host = emulator.rstrip("/").rpartition("://")
        return pafs.GcsFileSystem(
            anonymous=True, scheme=scheme or "http", endpoint_override=host, retry_time_limit=patience
        )
    _check_google_credentials()
    return pafs.GcsFileSystem(retry_time_limit=patience)


def google_session() -> tuple[Any, str]:
    """Return a session of requests to Google's store, and its address, for what pyarrow can't ask for."""
    return _google_session(_gs_emulator(), os.environ.get("CLOUD_STORAGE_TESTBENCH_ENDPOINT"))


@functools.lru_cache
def _google_session(emulator: str | None, testbench: str | None) -> tuple[Any, str]:
    import google.auth
    import requests
    from google.auth import compute_engine
    from google.auth.transport.requests import AuthorizedSession

    if emulator:
        return requests.Session(), emulator.rstrip("/") if "://" in emulator else f"http://{emulator.rstrip('/')}"
    scopes = ["https://www.googleapis.com/auth/devstorage.read_write"]
    if file := _check_google_credentials():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its name, for files from strangers
            credentials, _ = google.auth.load_credentials_from_file(file, scopes=scopes)
    else:
        credentials = compute_engine.Credentials(scopes=scopes)
    return AuthorizedSession(credentials), testbench or "https://storage.googleapis.com"


def forget_connections() -> None:
    """Connect anew from now on: to what the environment names by then, as patiently as it says."""
    for cached in (_s3, _s3_client, _gs, _google_session):
        cached.cache_clear()
    _region_of.cache_clear()


def _check_google_credentials() -> str | None:
    """Return the file of the credentials; None: the machine gives them.

    Raises PermissionError where there are none: pyarrow would look for them with every request, for minutes.
    """
    if file := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        if not os.path.isfile(file):
            raise PermissionError(f"GOOGLE_APPLICATION_CREDENTIALS={file}: no such file; name one, or unset it")
        return file
    login = os.environ.get("GOOGLE_GCLOUD_ADC_PATH_OVERRIDE", "~/.config/gcloud/application_default_credentials.json")
    if os.path.isfile(login := os.path.expanduser(login)):
        return login
    host, _, port = os.environ.get("GCE_METADATA_ROOT", "metadata.google.internal").partition(":")
    deadline = time.monotonic() + METADATA_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port or 80)), timeout=2.0).close()
            return None
        except socket.gaierror:  # no machine of Google's
            break
        except OSError:
            time.sleep(0.5)
    raise PermissionError(
        "gs:// needs Google's credentials, and there are none: run `gcloud auth application-default login`, name a key "
        "file in GOOGLE_APPLICATION_CREDENTIALS, or give the machine or pod a service account"
    )


@contextlib.contextmanager
def opened(path: AnyPath) -> Iterator[tuple[pafs.FileSystem, str]]:
    """Give the file system of a path; an object store's errors then name path, cause and remedy."""
    import pyarrow as pa

    fs, inner = filesystem(path)
    try:
        yield fs, inner
    except (OSError, pa.ArrowException) as error:
        if (explained := _explained(path, error)) is None:
            raise
        raise explained from None


def _explained(path: AnyPath, error: Exception) -> OSError | None:
    """Say what an object store's error means; None where it says so itself."""
    text = str(error)
    google = _GOOGLE.search(text)
    cause = (google["cause"] if google else text).strip(" .")
    if (google and isinstance(error, PermissionError)) or "AWS Error ACCESS_DENIED" in text:
        return PermissionError(f"{path}: {cause}; check the credentials, and what they may do in the bucket")
    if google is None:
        return None
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    return kind(f"{path}: {cause}; check the {'path' if kind is FileNotFoundError else 'settings and the connection'}")
