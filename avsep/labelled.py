"""Labels given by hand, as rows of a table that `pipelines.manifest --table` reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from avsep import storage

_COLUMNS = ("segment_id", "source", "start_s", "end_s", "labels")  # of a new table


def give_labels(
    table: str, source: str, labels: Iterable[str], start_s: float = 0.0, end_s: float | None = None
) -> bool:
    """Write which objects sound in an excerpt into a CSV table, which is made where there is none.

    The rows of that source and time get the labels, whatever else they say; where there is none, one is added.
    `labels` without a name say that none of the objects is there. Returns whether there was such a row.
    Raises ValueError for a table that isn't CSV with commas and a column `source`, or for rows unlike its header.

    >>> give_labels("clips.csv", "duet.mp4", edits.labels(report_objects), 0, 10)   # doctest: +SKIP
    """
    if not table.endswith(".csv"):
        raise ValueError(f"{table}: labels are written to .csv tables; give one")
    columns, rows = list(_COLUMNS), []
    if storage.exists(table):
        reader = csv.DictReader(io.StringIO(storage.read_bytes(table).decode("utf-8-sig"), newline=""), strict=True)
        columns, rows = list(reader.fieldnames or _COLUMNS), list(reader)
        if "source" not in columns:
            raise ValueError(f"{table} has no column 'source'; its cells must be separated by commas")
        if wrong := [n for n, row in enumerate(rows, 2) if None in row or None in row.values()]:
            raise ValueError(f"{table}: row {wrong[0]} has not as many cells as the header; correct it first")
    place = {"start_s": _seconds(start_s), "end_s": "" if end_s is None else _seconds(end_s)}
    columns += [c for c in _COLUMNS[1:] if c not in columns]
    found = [row for row in rows if row["source"] == source and _place(row) == _place(place)]
    if not found:
        name = f"{storage.name(source).rpartition('.')[0] or storage.name(source)}_{round(1000 * start_s)}"
        rows.append({**({"segment_id": name} if "segment_id" in columns else {}), "source": source, **place})
    for row in found or rows[-1:]:
        row["labels"] = ";".join(sorted(set(labels))) or "none"
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write_text(table, text.getvalue())
    return bool(found)


def _seconds(value: float) -> str:
    return f"{value:.15g}"


def _place(row: dict[str, str]) -> tuple[float | str, ...]:
    """Return where an excerpt begins and ends; what is no number of seconds as it is."""
    found: list[float | str] = []
    for name, missing in (("start_s", 0.0), ("end_s", "")):
        text = row.get(name, "").strip()
        try:
            found.append(float(text) if text else missing)
        except ValueError:
            found.append(text)
    return tuple(found)
