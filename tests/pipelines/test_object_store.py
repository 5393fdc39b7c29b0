"""Every pipeline with all of its paths in an object store that is slow, refuses and cuts off."""

import csv
import io
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from avsep import cli, lock, shards, storage
from pipelines import audit, collect, evaluate, extract, finetune, manifest, train
from tests.support.loopback import Google, Store
from tests.support.uris import everything, upload


def unreliable(share: float = 0.05):
    chance = random.Random(0)
    return lambda method, path: chance.choice(["slow_down", "reset", "cut"]) if chance.random() < share else None


@pytest.mark.slow
def test_the_whole_chain_in_an_unreliable_store(rendered, store: Store, store_folder, tmp_path, capfd):
    """Manifest to fine-tuning: the same shards as locally, no secret anywhere, no temporary file left."""
    here, there = tmp_path / "out", store_folder
    assert manifest.main(["--table", str(rendered / "segments.csv"), "--out", str(here / "manifest")]) == 0
    local = ["--segments", str(here / "manifest"), "--out", str(here / "clips"), "--in-process"]
    assert extract.main(local) == 0
    upload(rendered, f"{there}/data")
    store.fault, store.delay_s = unreliable(), 0.01
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
    video = next(f"{there}/data/clips/{p.name}" for p in sorted((rendered / "clips").glob("*test*")))
    assert cli.main(["separate", video, "--model", model, "--objects", "drum,violin", "--out", f"{there}/apart"]) == 0
    assert cli.main(["inspect", clips]) == cli.main(["inspect", model]) == 0
    faults, unauthorised = store.faults.copy(), store.unauthorised if isinstance(store, Google) else 0
    store.calm()
    assert unauthorised == 0
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
    expected |= {"apart/separation.json", "apart/drum.wav"}
    assert expected | {"run/history.json", "clips/status.json", "results/report.html"} <= files.keys()
    assert not [f for f in files if "tmp" in f or "_in_progress" in f or f.endswith(".lock")]
    said = "".join(capfd.readouterr()).encode()
    for secret in store.secrets:
        assert not [f for f, data in files.items() if secret.encode() in data] and secret.encode() not in said


@pytest.mark.slow
def test_media_in_an_object_store_are_found_and_fetched(rendered, web, store_folder):
    """Files under a video's id are taken as they are; what is missing is downloaded into the store."""
    clip = sorted((rendered / "clips").glob("*train*"))[0]
    media, out, table = f"{store_folder}/media", f"{store_folder}/clips", f"{store_folder}/table.csv"
    storage.write_bytes(f"{media}/mine/dQw4w9WgXcQ.mp4", clip.read_bytes())
    address = f"{web[0]}/{clip.name}"
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["segment_id", "source", "start_s", "end_s", "labels"])
    rows.writerows([["kept", "youtube:dQw4w9WgXcQ", 1, 3, "drum"], ["fetched", address, 0, 2, "drum"]])
    storage.write_text(table, text.getvalue())
    command = ["--segments", table, "--media", media, "--out", out, "--rate", "100000", "--in-process"]
    assert extract.main(command) == 0
    assert shards.read_ids(out) == (["fetched", "kept"], [])
    assert {r.segment_id: r.source for r in shards.read_clips(out)}["fetched"] == address
    assert len([f for f in everything(media) if f.endswith("/fetched.mkv")]) == 1


def test_a_store_that_refuses_stops_in_one_line(rendered, store: Store, store_folder, capfd, monkeypatch, impatient):
    """Without leave to write, or without the store: status 2, the cause, and nothing of the credentials."""
    command = ["--segments", str(rendered / "segments.csv"), "--out", f"{store_folder}/clips", "--in-process"]
    store.fault = lambda method, path: "denied" if method in ("PUT", "POST") else None
    assert extract.main(command) == 2
    denied = capfd.readouterr()
    assert f"{store_folder}/clips" in denied.err and "check the credentials, and what they may do" in denied.err
    store.calm()
    assert everything(store_folder) == {}
    impatient()
    with monkeypatch.context() as elsewhere:
        for name in ("AWS_ENDPOINT_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
            elsewhere.setenv(name, "http://127.0.0.1:9")
        assert extract.main(command) == 2
    gone = capfd.readouterr()
    assert "connect" in gone.err
    for said in (denied, gone):
        assert len(said.err.strip().splitlines()) == 1
        assert not any(secret in said.err + said.out for secret in store.secrets)


@pytest.mark.slow
def test_a_lock_in_an_object_store_keeps_a_second_driver_out(store_folder):
    path = f"{store_folder}/extract.lock"
    with lock.Lock(path, "--out x", beat_s=0.2, stale_s=1.0) as mine:
        program = f"from avsep import lock\nwith lock.Lock({path!r}, '--out x', beat_s=0.2, stale_s=1.0): pass"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "Held: --out x is in use by process" in other.stderr
        mine.check()
    assert not storage.exists(path)
