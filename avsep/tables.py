"""Tables as people write them: CSV in its common forms, and Parquet, read row by row.

Of a CSV the encoding (UTF-8, or UTF-16), the line ends and the separator (comma, semicolon, tab or bar) are told
from how it begins. Blank lines and lines that begin with `#` are no rows. Whatever else is no row is a row with a
problem: none is lost.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import io
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from avsep import storage

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_LONGEST_ROW = 50  # lines; a quote that isn't closed in as many was never meant to be
_BATCH_ROWS = 10_000


@dataclass(frozen=True)
class Layout:
    """How a table is written, and which columns it has."""

    uri: str
    columns: tuple[str | None, ...]  # what each cell is; None: nothing that is read
    notes: tuple[str, ...] = ()  # to be told
    separator: str = ""  # of a CSV's cells
    encoding: str = ""
    n_above: int = 0  # lines, with the header


@dataclass(frozen=True)
class Row:
    """A row, by column; or a line that is none: a comment, or one with a problem."""

    line: int  # its first line in the file, from 1; the row's number in a Parquet table
    text: str  # as it stands there
    cells: dict[str, Any]
    problem: str = ""
    comment: bool = False


def table_kind(uri: str) -> str:
    """Tell by its name whether a table is `csv` or `parquet`; ValueError when it is neither."""
    if uri.lower().endswith((".csv", ".tsv")):
        return "csv"
    if uri.lower().endswith((".parquet", ".pq")):
        return "parquet"
    raise ValueError(f"{uri}: a table's name must end with .csv or .parquet")


def plain_lines(block: bytes, *, first: bool) -> bytes:
    """Return whole lines of a UTF-8 file with line feeds at their ends; the `first` ones without a byte-order mark."""
    if first:
        block = block.removeprefix(codecs.BOM_UTF8)
    return block.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in block else block


def encoding(head: bytes) -> str:
    """Tell a text file's encoding by its first bytes: UTF-16 has a mark there, or zeros between ASCII."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head[:2]:
        return "utf-16-be" if head[:1] == b"\0" else "utf-16-le"
    return "utf-8-sig"


def read_layout(uri: str, known: Sequence[str], required: Sequence[str]) -> Layout:
    """Read how a table is written, and match its columns with the `known` ones.

    Case, blanks and punctuation in their names don't matter. Others are left aside, and a note says so.
    Raises ValueError where a required column is missing, one is there twice, or one is nearly a known one;
    FileNotFoundError where there is no such file.
    """
    if table_kind(uri) == "csv":
        return _csv_layout(uri, known, required)
    with _parquet(uri) as parquet:
        names = parquet.schema_arrow.names
    return Layout(uri, *_match(uri, names, known, required))


def _csv_layout(uri: str, known: Sequence[str], required: Sequence[str]) -> Layout:
    with storage.open_input(uri) as f:
        written = encoding(f.read(4))
    number, line, declared = _header(uri, written)
    if not line:
        raise ValueError(f"{uri} is empty; its first line must name the columns: {', '.join(known)}")
    if _undecoded(line):
        raise ValueError(f"{uri}: line {number} is not UTF-8; save the table as UTF-8")
    headers: dict[str, list[str]] = {}
    for separator in [declared] if declared else _SEPARATORS:
        try:
            headers[separator] = _cells(line, separator)
        except csv.Error as error:  # quotes that end before another separator
            problem = error
    if not headers:
        raise ValueError(f"{uri}: line {number} is no CSV header: {problem}")
    ours = {_key(c) for c in known}
    separator = max(headers, key=lambda s: sum(_key(name) in ours for name in headers[s]))
    names = headers[separator]
    while names and not names[-1]:
        names.pop()
    columns, notes = _match(uri, names, known, required)
    if separator != ",":
        notes = (f"{storage.name(uri)}: its cells are separated by {_SEPARATORS.get(separator, separator)}", *notes)
    return Layout(uri, columns, notes, separator, written, number)


def _header(uri: str, encoding: str) -> tuple[int, str, str | None]:
    """Return the number of the line that names the columns, the line, and the separator that Excel declares."""
    declared = None
    for number, line in enumerate(_lines(uri, encoding), 1):
        if found := re.fullmatch(r"\s*sep=(.)\s*", line):
            declared = found[1]
        elif line.strip() and not _is_comment(line):
            return number, line, declared
    return 0, "", None


def _match(
    uri: str, names: Sequence[str], known: Sequence[str], required: Sequence[str]
) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    by_key = {_key(column): column for column in known}
    columns = [by_key.get(_key(name)) for name in names]
    for index, column in enumerate(columns):
        if column is not None and column in columns[:index]:
            raise ValueError(f"{uri} has the column {column!r} twice; remove one")
    lacking = {_key(c): c for c in known if c not in columns}
    aside = [name for name, column in zip(names, columns, strict=True) if column is None and name]
    for name in aside:
        if near := difflib.get_close_matches(_key(name), lacking, n=1, cutoff=0.75):
            raise ValueError(f"{uri} has a column {name!r}; did you mean {lacking[near[0]]!r}? Rename or remove it")
    for column in required:
        if column not in columns:
            raise ValueError(
                f"{uri} has no column {column!r}; it is required (it has {', '.join(names)}; "
                f"the columns that are read are {', '.join(known)})"
            )
    note = f"{storage.name(uri)}: left aside, since they mean nothing here: columns {', '.join(aside)}"
    return tuple(columns), (note,) if aside else ()


def _key(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


# ---------------------------------------------------------------------------------------- rows


def read_rows(layout: Layout, groups: Sequence[int] | None = None, *, texts: bool = True) -> Iterator[Row]:
    """Read a table's rows; of a Parquet table, those of some row groups, numbered from 1.

    Without `texts`, rows of Parquet tables aren't written out as text, which takes its time. Raises
    ValueError where the file as a whole can't be read.
    """
    if not layout.separator:
        return _parquet_rows(layout, groups, texts)
    return _csv_rows(layout)


def _csv_rows(layout: Layout) -> Iterator[Row]:
    numbered = enumerate(_lines(layout.uri, layout.encoding), 1)
    ahead: deque[tuple[int, str]] = deque()
    while line := ahead.popleft() if ahead else next(numbered, None):
        number, text = line
        if number <= layout.n_above or not text.strip():
            continue
        if _is_comment(text):
            yield Row(number, text, {}, comment=True)
            continue
        try:
            cells = _cells(text, layout.separator)
        except csv.Error as error:
            text, cells, problem = _go_on(text, layout, ahead, numbered, f"broken quoting: {error}")
            if problem:
                yield Row(number, text, {}, problem)
                continue
        if any(cells):
            yield _row(number, text, cells, layout)


def _go_on(
    text: str, layout: Layout, ahead: deque[tuple[int, str]], numbered: Iterator[tuple[int, str]], problem: str
) -> tuple[str, list[str], str]:
    """Take lines to one that ends within quotes, until they make a row; where they never do, it is bad by itself.

    Returns text, cells and what is wrong; `ahead` holds what was read and isn't part of it.
    """
    whole = text
    for n_taken in range(1, _LONGEST_ROW):
        if n_taken > len(ahead):
            if (following := next(numbered, None)) is None:
                break
            ahead.append(following)
        whole += "\n" + ahead[n_taken - 1][1]
        if '"' not in ahead[n_taken - 1][1]:
            continue
        try:
            cells = _cells(whole, layout.separator)
        except csv.Error as error:
            if "unexpected end of data" not in str(error):
                break
            continue
        if len(cells) == len(layout.columns):
            for _ in range(n_taken):
                ahead.popleft()
            return whole, cells, ""
        break
    return text, [], problem


def _row(number: int, text: str, cells: list[str], layout: Layout) -> Row:
    n = len(layout.columns)
    if _undecoded(text):
        shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return Row(number, shown, {}, "not UTF-8; save the table as UTF-8")
    if len(cells) < n or any(cells[n:]):
        hint = f"; put a cell that holds {layout.separator!r} in quotes" if len(cells) > n else ""
        return Row(number, text, {}, f"{len(cells)} cells; the header has {n} columns{hint}")
    return Row(number, text, {c: x for c, x in zip(layout.columns, cells, strict=False) if c is not None})


def _cells(text: str, separator: str) -> list[str]:
    """Divide a row; blanks around cells, and around their quotes, mean nothing. Raises csv.Error for broken quotes."""
    blanks = rf'"[ \t]+(?={re.escape(separator)}|$)'
    options: dict[str, Any] = {"delimiter": separator, "skipinitialspace": True, "strict": True}
    try:
        cells = next(csv.reader([text], **options), [])
    except csv.Error:
        cells = next(csv.reader([re.sub(blanks, '"', text)], **options), [])
    return [cell.strip() for cell in cells]


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _undecoded(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text) if not text.isascii() else False


def _lines(uri: str, encoding: str) -> Iterator[str]:
    """Read a text file's lines, whatever ends them, without their ends; bytes that are no text as surrogates."""
    with storage.open_input(uri) as f:
        text = io.TextIOWrapper(f, encoding, errors="surrogateescape", newline=None)
        try:
            for line in text:
                yield line.rstrip("\n")
        except UnicodeError as error:
            raise ValueError(f"{uri} is no {encoding.upper()} ({error}); save it as UTF-8") from None
        finally:
            text.detach()


@contextlib.contextmanager
def _parquet(uri: str) -> Iterator[pq.ParquetFile]:
    try:
        with storage.open_input(uri) as f:
            yield pq.ParquetFile(f)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{uri} is no Parquet file, or a damaged one ({str(error).splitlines()[0]})") from None


def _parquet_rows(layout: Layout, groups: Iterable[int] | None, texts: bool) -> Iterator[Row]:
    number = 0
    with _parquet(layout.uri) as parquet:
        chosen = list(range(parquet.num_row_groups) if groups is None else groups)
        for batch in parquet.iter_batches(_BATCH_ROWS, chosen) if chosen else ():
            names = batch.schema.names
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                named = dict(zip(names, values, strict=True)) if texts else {}
                text = json.dumps(named, default=str, ensure_ascii=False) if texts else ""
                cells = {c: x for c, x in zip(layout.columns, values, strict=True) if c is not None}
                yield Row(number, text, cells)
