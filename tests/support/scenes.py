"""A small world of rendered clips: drums, flutes and violins."""

import csv
import io
from pathlib import Path

from avsep import records, synthetic

CONFIG = synthetic.SceneConfig(
    objects=("drum", "flute", "violin"), seconds=6, hidden_share=0, silent_share=0.2, offscreen_share=0.2
)


def render(folder: Path, config: synthetic.SceneConfig) -> Path:
    """Render training, validation and test clips to a folder; the latter have two objects."""
    rows = []
    for split, count, n_objects in (("train", 9, None), ("val", 2, None), ("test", 3, 2)):
        for number in range(count):
            scene = synthetic.render_scene(number, split, 5, config, n_objects)
            segment = synthetic.write_scene(scene, folder)
            rows.append(
                {
                    "segment_id": segment.segment_id,
                    "source": segment.source,
                    "start_s": 0,
                    "end_s": config.seconds,
                    "split": split,
                    "objects": records.names_cell(segment.objects),
                    "labels": records.names_cell(scene.plan.visible),
                }
            )
    with (folder / "segments.csv").open("w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder


def table_of(rendered: Path) -> str:
    """Five excerpts of each training clip, so that there are several shards, and the others as they are."""
    rows = list(csv.DictReader((rendered / "segments.csv").open()))
    many = []
    for row in rows:
        starts = (0, 1, 2, 3, 3.5) if row["split"] == "train" else (None,)
        for number, start in enumerate(starts):
            times = {} if start is None else {"segment_id": f"{row['segment_id']}_{number}", "start_s": start}
            many.append(row | times | ({} if start is None else {"end_s": start + 2.5}))
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(many)
    return text.getvalue()
