"""Whole folders to an object store, and back."""

from pathlib import Path

from avsep import storage


def upload(folder: Path, uri: str) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        storage.write_bytes(storage.join(uri, str(path.relative_to(folder))), path.read_bytes())


def everything(uri: str) -> dict[str, bytes]:
    """What a folder of the store holds, file by file."""
    scheme = uri.partition("://")[0]
    files = [f"{scheme}://{i.path}" for i in storage.infos(uri, recursive=True) if i.is_file]
    return {f.removeprefix(f"{uri}/"): storage.read_bytes(f) for f in files}
