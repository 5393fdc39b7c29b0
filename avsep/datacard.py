"""The data card: what is in a dataset."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from numpy.typing import NDArray

from avsep import suspects
from avsep.audioset import by_object, by_split, under
from avsep.audit import DURATION_BINS_S, LEVEL_BINS_DB, Findings
from avsep.duplicates import NEAR
from avsep.objects import AUDIOSET_23, Vocabulary
from avsep.records import SCHEMA_VERSION, SPLITS

_PAIRS_SHOWN = 100  # of duplicates; card.json has all


def make_card(found: Findings, configuration: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arrange a whole audit's findings for the card."""
    counts = found.counts
    vocabulary = Vocabulary.from_list(configuration["vocabulary"]) if configuration else AUDIOSET_23

    def histogram(name: str, edges: NDArray) -> dict[str, Any]:
        return {
            "edges": [float(e) if math.isfinite(e) else None for e in edges],
            "counts": [counts[name, str(i)] for i in range(len(edges) - 1)],
        }

    agreement: dict[str, Any] = {}
    for source in ("pictures", "given"):
        if counts["compared", source]:
            agreement[source] = {"clips": counts["compared", source], "objects": {}}
            for name in vocabulary.names:
                both, label, tag = (counts["agreement", source, name, o] for o in ("both", "label", "tag"))
                if both + label + tag:
                    agreement[source]["objects"][name] = {
                        "both": both,
                        "label_only": label,
                        "tag_only": tag,
                        "precision": both / (both + label) if both + label else None,
                        "recall": both / (both + tag) if both + tag else None,
                    }
    return {
        "schema_version": SCHEMA_VERSION,
        "configuration": configuration,
        "clips": by_split(counts, "clips"),
        "hours": {split: round(n / 3600, 2) for split, n in by_split(counts, "seconds").items()},
        "rejections": dict(sorted(under(counts, "rejected").items(), key=lambda kv: -kv[1])),
        "rejections_by_stage": under(counts, "rejected_at"),
        "label_source": under(counts, "label_source"),
        "unlabelled": by_split(counts, "unlabelled"),
        "labelled_none": by_split(counts, "nothing"),
        **by_object(counts, vocabulary),
        "agreement": agreement,
        "duration_s": histogram("duration", DURATION_BINS_S),
        "rms_db": histogram("level", LEVEL_BINS_DB),
        "suspects": {
            kind: {
                "clips": by_split(Counter((s.kind, s.split) for s in found.suspects), kind),
                "unknown": by_split(counts, "unknown", kind),
            }
            for kind in suspects.KINDS
        },
        "duplicates": [asdict(p) for p in sorted(found.pairs)],
        "damage": [asdict(f) for f in sorted(found.damage)],
    }


def markdown(card: Mapping[str, Any], title: str) -> str:
    """Write the card for people; plots are named as `pipelines.audit` saves them."""
    n_clips, n_rejected = sum(card["clips"].values()), sum(card["rejections"].values())
    hours = sum(card["hours"].values())
    lines = [f"# {title}", "", f"{n_clips:,} clips, {hours:,.2f} hours, and {n_rejected:,} rejected segments.", ""]
    lines += ["## Integrity", ""]
    if card["damage"]:
        lines += [f"**{len(card['damage'])} findings.**", ""]
        lines += _table(("file", "kind", "what"), ((f"`{f['path']}`", f["kind"], f["detail"]) for f in card["damage"]))
    else:
        lines += ["Every commit record, hash, schema and record is as it should be.", ""]
    lines += ["## Splits", ""]
    lines += _table(
        ("split", "clips", "hours", "without a label", "of these, the table says none"),
        ((s, card["clips"][s], card["hours"][s], card["unlabelled"][s], card["labelled_none"][s]) for s in SPLITS),
    )
    lines += [*_objects(card), *_agreement(card["agreement"]), *_duplicates(card["duplicates"])]
    lines += _suspects(card["suspects"])
    lines += ["## Rejections", "", *([] if card["rejections"] else ["None.", ""])]
    total = max(1, n_clips + n_rejected)
    rejected = ((r, n, f"{n / total:.1%}") for r, n in card["rejections"].items())
    lines += _table(("reason", "segments", "share"), rejected)
    lines += ["## Level and duration", "", "![Level and duration](distributions.png)", ""]
    if card["configuration"]:
        written = json.dumps(card["configuration"], indent=1, sort_keys=True)
        lines += ["## Configuration", "", "```json", written, "```", ""]
    return "\n".join(lines)


def _objects(card: Mapping[str, Any]) -> list[str]:
    rows = (
        (name, *(card["labels"][name][s] for s in SPLITS), *(card["objects"][name][s] for s in SPLITS))
        for name in card["objects"]
        if any(card["labels"][name].values()) or any(card["objects"][name].values())
    )
    return [
        "## Objects",
        "",
        "Clips by weak label (what training takes), and by tag (`objects`).",
        "",
        *_table(("object", *(f"label, {s}" for s in SPLITS), *(f"tag, {s}" for s in SPLITS)), rows),
        "![Labels that occur together](cooccurrence.png)",
        "",
    ]


def _agreement(agreement: Mapping[str, Any]) -> list[str]:
    lines = []
    for source, found in agreement.items():
        what = {"pictures": "the pictures' labels", "given": "the given labels"}[source]
        lines += [f"## Agreement of {what} with the tags", "", f"Over {found['clips']:,} clips that have both.", ""]
        lines += _table(
            ("object", "both", "label only", "tag only", "precision", "recall"),
            (
                (n, o["both"], o["label_only"], o["tag_only"], o["precision"], o["recall"])
                for n, o in found["objects"].items()
            ),
        )
    return lines


def _duplicates(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds = Counter(p["kind"] for p in pairs)
    said = {
        "exact": "the same excerpt of the same file",
        "near": f"the same sound (similarity from {NEAR:g})",
        "source": "other excerpts of one source",
    }
    lines = ["## Duplicates across splits", "", *(f"- {text}: {kinds[kind]:,}" for kind, text in said.items()), ""]
    lines += _table(
        ("kind", "clip", "split", "clip", "split", "similarity"),
        (
            (p["kind"], p["one"], p["one_split"], p["other"], p["other_split"], p["similarity"])
            for p in pairs[:_PAIRS_SHOWN]
        ),
    )
    if len(pairs) > _PAIRS_SHOWN:
        lines += [f"… and {len(pairs) - _PAIRS_SHOWN:,} more in card.json.", ""]
    return lines


def _suspects(found: Mapping[str, Any]) -> list[str]:
    rows = (
        (
            f"{suspects.KINDS[kind]} (`{suspects.list_file(kind)}`)",
            *(one["clips"][s] for s in SPLITS),
            sum(one["unknown"].values()),
        )
        for kind, one in found.items()
    )
    return [
        "## Suspect clips",
        "",
        "Each list says which clips, and why; `pipelines.train --without` leaves them out. Of the unknown ones the",
        "shards can't tell.",
        "",
        *_table(("suspicion", *SPLITS, "unknown"), rows),
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return a table's lines, of Markdown; none where it has no rows."""
    written = ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]
    if not written:
        return []
    return ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1), *written, ""]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
