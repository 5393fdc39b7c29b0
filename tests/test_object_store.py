"""Every pipeline with all of its paths in an object store that is slow, refuses and cuts off."""

import csv
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loopback import ACCESS_KEY, S3, SECRET_KEY, SESSION_TOKEN

from avsep import lock, shards, storage
from pipelines import audit, collect, evaluate, extract, finetune, manifest, train


def upload(folder: Path, uri: str) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        storage.write_bytes(storage.join(uri, str(path.relative_to(folder))), path.read_bytes())


def everything(uri: str) -> dict[str, bytes]:
    """What a folder of the store holds, file by file."""
    fs, inner = storage.filesystem(uri)
    infos = fs.get_file_info(storage.pafs.FileSelector(inner, recursive=True, allow_not_found=True))
    files = [f"s3://{i.path}" for i in infos if i.is_file]
    return {f.removeprefix(f"{uri}/"): storage.read_bytes(f) for f in files}


def unreliable(share: float = 0.05):
    chance = random.Random(0)
    return lambda method, path: chance.choice(["slow_down", "reset", "cut"]) if chance.random() < share else None


@pytest.mark.slow
def test_the_whole_chain_in_an_unreliable_store(rendered, s3: S3, s3_folder, tmp_path, capfd):
    """Manifest to fine-tuning: the same shards as locally, no secret anywhere, no temporary file left."""
    here, there = tmp_path / "out", s3_folder
    assert manifest.main(["--table", str(rendered / "segments.csv"), "--out", str(here / "manifest")]) == 0
    local = ["--segments", str(here / "manifest"), "--out", str(here / "clips"), "--in-process"]
    assert extract.main(local) == 0
    upload(rendered, f"{there}/data")
    s3.fault, s3.delay_s = unreliable(), 0.01
    model, clips, segments = f"{there}/run/model", f"{there}/clips", f"{there}/manifest"
    loop = ["--in-process"]
    assert manifest.main(["--table", f"{there}/data/segments.csv", "--out", segments]) == 0
    assert extract.main(["--segments", segments, "--out", clips, *loop]) == 0
    assert extract.main(["--segments", segments, "--out", clips, *loop]) == 0  # nothing is left to do
    assert audit.main(["--clips", clips, "--out", f"{there}/audit"]) == 0
    assert train.main(["--clips", clips, "--out", f"{there}/run", "--epochs", "6", *loop]) == 0
    assert train.main(["--clips", clips, "--out", f"{there}/run", "--epochs", "6", "--resume", *loop]) == 0
    assert collect.main(["--model", model, "--clips", clips, *loop]) in (0, 1)
    assert finetune.main([
        "--segments", segments, "--clips", clips, "--model", model, "--out", f"{there}/labeller", "--epochs", "1", *loop
    ]) in (0, 1)  # fmt: skip
    assert evaluate.main([
        "--model", model, "--segments", segments, "--references", f"{there}/data/references", "--out",
        f"{there}/results", *loop
    ]) == 0  # fmt: skip
    faults = s3.faults.copy()
    s3.calm()
    assert all(faults[f] >= 3 for f in ("slow_down", "reset", "cut")), faults

    assert shards.read_ids(clips) == shards.read_ids(str(here / "clips"))
    mine, theirs = ({r.segment_id: r for r in shards.read_clips(c)} for c in (clips, str(here / "clips")))
    for segment_id, record in mine.items():
        np.testing.assert_allclose(record.bases, theirs[segment_id].bases, atol=2e-3)
        assert record.media_sha256 == theirs[segment_id].media_sha256
        assert record.source.startswith(f"{there}/data/")
    files = everything(there)
    results = json.loads(files["results/results.json"])
    assert results["separators"]["mixture"]["mean"]["sdr"] < results["separators"]["ideal_mask"]["mean"]["sdr"]
    expected = {"manifest/segments.parquet", "run/model/miml.safetensors", "audit/card.md", "run/loss.png"}
    assert expected | {"run/history.json", "clips/status.json", "results/report.html"} <= files.keys()
    assert not [f for f in files if "tmp" in f or "_in_progress" in f or f.endswith(".lock")]
    said = "".join(capfd.readouterr()).encode()
    for secret in (SECRET_KEY, ACCESS_KEY, SESSION_TOKEN):
        assert not [f for f, data in files.items() if secret.encode() in data] and secret.encode() not in said


@pytest.mark.slow
def test_media_in_an_object_store_are_found_and_fetched(rendered, web, s3: S3, s3_folder):
    """Files under a video's id are taken as they are; what is missing is downloaded into the store."""
    clip = sorted((rendered / "clips").glob("*train*"))[0]
    store, out, table = f"{s3_folder}/media", f"{s3_folder}/clips", f"{s3_folder}/table.csv"
    storage.write_bytes(f"{store}/mine/dQw4w9WgXcQ.mp4", clip.read_bytes())
    address = f"{web[0]}/{clip.name}"
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["segment_id", "source", "start_s", "end_s", "labels"])
    rows.writerows([["kept", "youtube:dQw4w9WgXcQ", 1, 3, "drum"], ["fetched", address, 0, 2, "drum"]])
    storage.write_text(table, text.getvalue())
    command = ["--segments", table, "--media", store, "--out", out, "--rate", "100000", "--in-process"]
    assert extract.main(command) == 0
    assert shards.read_ids(out) == (["fetched", "kept"], [])
    assert {r.segment_id: r.source for r in shards.read_clips(out)}["fetched"] == address
    assert len([f for f in everything(store) if f.endswith("/fetched.mkv")]) == 1


def test_a_store_that_refuses_stops_in_one_line(rendered, s3: S3, s3_folder, capfd, monkeypatch):
    """Without leave to write, or without the store: status 2, the cause, and nothing of the credentials."""
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 2)
    storage._s3.cache_clear()
    command = ["--segments", str(rendered / "segments.csv"), "--out", f"{s3_folder}/clips", "--in-process"]
    s3.fault = lambda method, path: "denied" if method == "PUT" else None
    assert extract.main(command) == 2
    denied = capfd.readouterr()
    assert "ACCESS_DENIED" in denied.err and s3_folder.split("/")[2] in denied.err
    s3.calm()
    assert everything(s3_folder) == {}
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert extract.main(command) == 2
    gone = capfd.readouterr()
    assert "connect" in gone.err
    for said in (denied, gone):
        assert len(said.err.strip().splitlines()) == 1
        assert not any(s in said.err + said.out for s in (SECRET_KEY, ACCESS_KEY, SESSION_TOKEN))
    storage._s3.cache_clear()


@pytest.mark.slow
def test_a_lock_in_an_object_store_keeps_a_second_driver_out(s3: S3, s3_folder):
    path = f"{s3_folder}/extract.lock"
    with lock.Lock(path, "--out x", beat_s=0.2, stale_s=1.0) as mine:
        program = f"from avsep import lock\nwith lock.Lock({path!r}, '--out x', beat_s=0.2, stale_s=1.0): pass"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "Held: --out x is in use by process" in other.stderr
        mine.check()
    assert not storage.exists(path)
