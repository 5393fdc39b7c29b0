"""Write deploy/PIPELINES.md: what each program reads and writes, from the programs themselves.

Arguments come from the programs' parsers, records from their Arrow schemas. The files of WRITES are compared with
what real runs leave behind by tests/pipelines/test_pipelines.py, this page with the code by tests/test_docs.py.

    python deploy/pages.py        # after a change of an argument, a record or a file
"""

import argparse
import importlib
import inspect
import re
from pathlib import Path

import pyarrow as pa

from avsep import many, records
from avsep.factors import ExtractionConfig

PAGE = Path(__file__).resolve().parent / "PIPELINES.md"

# Program → pattern of the files under its --out (collect: its --model) → what is in them. A `?` before it: not always.
MODEL = {  # under model/
    "model/config.json": "everything needed to run: STFT, bases, objects, thresholds, labeller, versions",
    "model/miml.safetensors": "the network",
    "?model/familiarity.safetensors": "bases of training clips, with which new sounds are compared",
    "?model/labeller.safetensors": "the picture network, when the clips' own was fine-tuned",
}
WRITES: dict[str, dict[str, str]] = {
    "manifest": {
        "segments*.parquet": "segments",
        "statistics.json": "counts of rows, objects and splits",
        "?dead_letters.jsonl": "rows of the table that are no segments, and why",
    },
    "extract": {
        "commits/*.json": "what counts: ids, what was asked for, SHA-256, digest of the settings, seconds by stage",
        "clips/*.parquet": "clip records",
        "?rejections/*.parquet": "rejections",
        "status.json": "where the run stands; `fetch-status.json` with `--until fetch`",
        "?labeller.safetensors": "the picture network given with `--weights`, if it is no published one",
    },
    "audit": {
        "card.md": "the data card: counts, agreement, duplicates, suspect clips, levels, damage",
        "card.json": "the same for programs",
        "still.csv": "clips whose pictures don't change: `segment_id`, `split`, `shard` (their file) and `why`",
        "stops.csv": "clips whose sound stops",
        "again.csv": "clips that are the same recording as another one",
        "disagree.csv": "clips in which nothing that is seen is heard",
        "*.png": "its plots",
    },
    "train": {
        **MODEL,
        "checkpoint.pt": "state after the latest epoch, for `--resume`; `checkpoint-2.pt` is the second pass's",
        "?checkpoint-2.pt": "",
        "?adapting-*.json": "with `--start`, for `--resume`: what each half of the clips says of what the other taught",
        "history.json": "figures, a row an epoch",
        "?practice*.pt": "practice mixtures",
        "loss.png": "loss curves",
        "relation_maps/*.png": "of some validation clips",
        "?ray/*": "Ray Train's own records of the run",
        "?previous/*": "what `--replace` replaced",
    },
    "finetune": {
        "?labeller.safetensors": "the picture network, if it became better; also put into `--model`",
        "history.json": "figures, a row an epoch",
        "?start.safetensors": "what it started from",
        "?checkpoint.pt": "state after the latest epoch",
        "?pictures-*/*.parquet": "the middles of the clips' pictures, as large as the network takes them",
        "?previous/*": "what `--replace` replaced; in `--model` the network that it had",
    },
    "collect": {
        "?dictionary.safetensors": "the basis dictionary, added to the model",
        "?previous/*": "the one that `--replace` replaced",
    },
    "evaluate": {
        "results.json": "figures by separator: means, by number of sources, by object; every clip's",
        "clips.csv": "a row per clip, separator and object: SDR, SIR, SAR, SI-SDR, SI-SAR and their gains; `leak_db`",
        "?pairs.csv": "the pairs that were measured, for `--pairs`",
        "report.html": "the same to read, see and hear",
        "?previous/*": "what was there before",
    },
    "separate": {
        "*/separation.json": "one folder per file: its objects, where each came from, which sounds were written",
        "*/*.wav": "its sounds; `.flac` or `.mp3` with `--format`",
        "?*/*.mp4": "its pictures with each object's sound, with `--video`",
        "results.parquet": "one row per file and object",
        "rejections.parquet": "one row per file that can't be separated, and why",
        "status.json": "where the run stands",
        "_shards/commits/*.json": "what counts, as for `extract`; the tables are made from it",
        "?_shards/results/*.parquet": "results of a shard",
        "?_shards/rejections/*.parquet": "rejections of a shard",
        "_shards/files.parquet": "every file that was asked for, and its folder's name",
    },
    "export": {
        "?data/*.tar": "`--format webdataset`: a shard's clips of one split: `KEY.flac`, `KEY.json`, `KEY.0.jpg` …",
        "?data/*.parquet": "`--format parquet`: the same, one row per clip, `audio` and `images` among its columns",
        "README.md": "the dataset card, which `datasets` reads; it is there once the export is whole",
        "croissant.json": "the same for other programs: Croissant 1.0, JSON-LD",
        "rejections.parquet": "one row per clip that can't be exported, and why",
        "status.json": "where the run stands",
        "_shards/commits/*.json": "what counts, as for `extract`",
        "?_shards/exported/*.parquet": "a shard's clips: split, file, its size and SHA-256, number of pictures",
        "?_shards/rejections/*.parquet": "rejections of a shard",
    },
    "serve": {},
    "demo": {},
}
ELSEWHERE = {
    "extract": "Downloads go to `--media`: one file a segment, and `egress.json`, what each identity has spent.",
    "train": "`tensorboard --logdir DIR` shows what is in `--tensorboard DIR`; `pip install -e '.[tensorboard]'` "
    "brings it.\nFrom Python, `train.main(arguments, log=function)` calls any function with each row of "
    "`history.json`, a dict.",
    "serve": "Results go to the folder that `AVSEP_SERVE_RESULTS` names, else to a temporary one, for an hour.",
    "demo": "Every other program's output goes to folders of `--out`, and `report.html` shows the whole.",
}


CLIPS_FOR_OTHERS = """A network of your own learns from clip records through torch:

```python
import torch

from avsep.learning import ClipDataset

clips = ClipDataset("out/clips", "train")
batches = torch.utils.data.DataLoader(clips, batch_size=64, shuffle=True, num_workers=2)
```

Each item is a dict of tensors: `help(ClipDataset)` gives names and shapes. Folders in an object store are read the same
way. Sets that exceed memory take `sampler=GroupSampler(clips)` in place of `shuffle`."""


def arguments(parser: argparse.ArgumentParser) -> str:
    """Draw a parser's arguments as a table."""
    rows = ["| argument | what it is |", "| --- | --- |"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = max(action.option_strings, key=len, default=action.dest)
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
        if action.nargs == 0 or not action.option_strings:
            value = ""
        many = " …" if action.nargs in ("+", "*") else ""
        formatter = parser._get_formatter()
        text = formatter._expand_help(action) if action.help else ""
        if action.default not in (None, False, []) and not re.search(r"\(default|unless", text):
            text += f" (default {action.default})"
        marks = f"`{name}{' ' if value else ''}{value}{many}`".replace("|", "\\|")
        rows.append(f"| {marks}{' (required)' if action.required else ''} | {text} |")
    return "\n".join(rows)


def schema(title: str, record: type, fields: pa.Schema) -> str:
    """Draw an Arrow schema as a table, with what the record's source says of its fields."""
    said = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(record), re.MULTILINE))
    about = (inspect.getdoc(record) or "").partition("\n\n>>> ")[0]  # without its example
    rows = [f"**{title}.** {about}", "", "| column | type | what it is |", "| --- | --- | --- |"]
    for field in fields:
        kind = re.sub(r"list<\w+: (.*)>", r"list of \1", str(field.type))
        if isinstance(field.type, pa.FixedShapeTensorType):
            kind = f"{field.type.value_type} tensor, {' × '.join(map(str, field.type.shape))}"
        null = ", may be null" if field.nullable else ""
        rows.append(f"| `{field.name}` | {kind}{null} | {said.get(field.name, '')} |")
    return "\n".join(rows)


def program(name: str) -> str:
    """Describe one program."""
    module = importlib.import_module(f"pipelines.{name}")
    assert module.__doc__
    parts = [f"## pipelines.{name}", module.__doc__.strip(), arguments(module.parser())]
    files = [
        f"| `{pattern.removeprefix('?')}` | {what}{' (not always)' if pattern.startswith('?') else ''} |"
        for pattern, what in WRITES[name].items()
        if what
    ]
    if files:
        under = "--model" if name == "collect" else "--out"
        parts.append("\n".join([f"| file under `{under}` | what is in it |", "| --- | --- |", *files]))
    if name in ELSEWHERE:
        parts.append(ELSEWHERE[name])
    return "\n\n".join(parts)


def page() -> str:
    """Return the whole page."""
    head = """# What each program reads and writes

Written by `python deploy/pages.py`, and compared with the code and with real runs by the tests. Examples: `--help`.
Every path may be a local one or a URI (`s3://`, `gs://`), except in the demo.
Exit status: 0 done, 1 finished with a stated shortfall, 2 unusable arguments or input."""
    shapes = "\n\n".join([
        "## Records",
        schema("Segment", records.Segment, records.SEGMENT_SCHEMA),
        schema("Clip record", records.ClipRecord, records.clip_schema(*ExtractionConfig().shape)),
        CLIPS_FOR_OTHERS,
        schema("Result", many.Result, many.RESULT_SCHEMA),
        schema("Rejection", records.Rejection, records.REJECTION_SCHEMA),
        "`reason` is one of " + ", ".join(f"`{reason}`" for reason in records.Reason) + ".",
    ])  # fmt: skip
    return "\n\n".join([head, *map(program, WRITES), shapes]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
