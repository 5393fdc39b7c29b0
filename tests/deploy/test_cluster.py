"""From a table to results on a cluster of several nodes, submitted as jobs, with all data in an object store."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avsep import shards, storage
from avsep.model import Model
from pipelines import evaluate, extract, manifest, train
from tests.support import loopback
from tests.support.cluster import Cluster, cluster, free_port
from tests.support.scenes import CONFIG, render, table_of
from tests.support.uris import everything, upload

ROOT = Path(__file__).parents[2]
SUBMIT = [sys.executable, str(ROOT / "deploy" / "submit")]
EPOCHS = 12  # after fewer the network isn't sure of the solos
_LOGS = {".log", ".out", ".err", ".txt", ".json"}  # ours and Ray's


def submit(url: str, log: Path, *arguments: str) -> subprocess.Popen:
    """Start `deploy/submit`, whose output goes to a file."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}  # nothing is sent along
    return subprocess.Popen(
        [*SUBMIT, "--address", url, *arguments], env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen, log: Path, timeout_s: float = 240) -> None:
    try:
        assert process.wait(timeout_s) == 0, log.read_text()[-3000:]
    finally:
        process.kill()


def interrupt(process: subprocess.Popen, log: Path) -> None:
    """Press Ctrl-C once the job is submitted."""
    wait_for(lambda: "submitted avsep-" in log.read_text(), process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def follow_again(url: str, log: Path) -> subprocess.Popen:
    """Do what an interrupted `deploy/submit` says."""
    said = log.read_text()
    (command,) = re.findall(r"goes on. To follow it: deploy/submit --address (.*)", said)
    assert f"ray job stop --address {url} avsep-manifest-" in said
    return submit(*command.split(" ", 1)[:1], log, *command.split()[1:])


def history(run: str) -> list[dict[str, float]]:
    path = storage.join(run, "history.json")
    return json.loads(storage.read_bytes(path)) if storage.exists(path) else []


def wait_for(condition, process: subprocess.Popen, log: Path, timeout_s: float = 180):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert process.poll() is None, f"it ended too early\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"waited for too long\n{log.read_text()[-3000:]}"
        time.sleep(0.2)
    return found


def lose_a_node(nodes: Cluster, out: str, process: subprocess.Popen, log: Path) -> None:
    """Kill a node that extracts a shard, once a shard is committed; give the cluster another."""
    commits = storage.join(out, "commits")

    def at_work():
        busy = [n for n in nodes.nodes[1:] if n.processes("ray::extract_shard")]
        return busy if len(storage.list_files(commits)) >= 1 else None

    wait_for(at_work, process, log)[0].kill()
    nodes.start("--num-cpus", "1")


def lose_a_training_worker(nodes: Cluster, run: str, process: subprocess.Popen, log: Path) -> None:
    """Kill one of two training workers after two epochs."""
    wait_for(lambda: len(history(run)) >= 2, process, log)
    workers = [pid for n in nodes.nodes for pid in n.processes("RayTrainWorker")]
    assert len(workers) >= 2, workers
    os.kill(workers[-1], signal.SIGKILL)
    assert len(history(run)) < EPOCHS


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_cluster_gives_what_one_machine_does(tmp_path, monkeypatch):
    """Through the loss of a node in extraction and of a worker in training: the same shards, the same model.

    In training clips one object plays alone, so that there are practice mixtures and a second pass. Rounding grows
    in that pass, as much in one process whose first weights differ by a ten-millionth.
    """
    alone = replace(CONFIG, n_objects_shares=(1.0, 0.0, 0.0), silent_share=0, offscreen_share=0)
    rendered = render(tmp_path / "rendered", alone)
    with loopback.serve("0.0.0.0") as s3, cluster() as nodes:
        for name, value in s3.environment(nodes.host).items():
            monkeypatch.setenv(name, value)
            nodes.environment[name] = value
        nodes.environment.pop("PYTHONPATH", None)
        for number, cpus in enumerate(("0", "1", "1"), 1):
            nodes.start("--num-cpus", cpus)
            nodes.wait(number)
        there = f"s3://{s3.make_bucket()}/work"
        upload(rendered, f"{there}/data")
        storage.write_text(f"{there}/data/table.csv", table_of(rendered))

        logs = {p: tmp_path / f"{p}.log" for p in ("manifest", "extract", "train", "evaluate")}
        table, segments, clips = f"{there}/data/table.csv", f"{there}/manifest", f"{there}/clips"
        interrupt(
            submit(nodes.url, logs["manifest"], "manifest", "--table", table, "--out", segments), logs["manifest"]
        )
        finish(follow_again(nodes.url, logs["manifest"]), logs["manifest"])
        s3.delay_s = 0.05  # a store takes its time
        job = submit(nodes.url, logs["extract"], "extract", "--segments", segments, "--out", clips)
        lose_a_node(nodes, clips, job, logs["extract"])
        finish(job, logs["extract"])
        s3.delay_s = 0.0
        nodes.wait(3)
        command = ["train", "--clips", clips, "--out", f"{there}/run", "--epochs", str(EPOCHS)]  # a worker on each node
        job = submit(nodes.url, logs["train"], *command)
        lose_a_training_worker(nodes, f"{there}/run", job, logs["train"])
        finish(job, logs["train"], 600)
        finish(
            submit(
                nodes.url, logs["evaluate"], "evaluate", "--model", f"{there}/run/model", "--segments", segments,
                "--references", f"{there}/data/references", "--out", f"{there}/results",
            ), logs["evaluate"],
        )  # fmt: skip
        same_as_here(rendered, there, tmp_path / "here")
        files = everything(there)
        said = b"".join(f.read_bytes() for o in (tmp_path, nodes.folder) for f in o.rglob("*") if f.suffix in _LOGS)
        for secret in (loopback.SECRET_KEY, loopback.SESSION_TOKEN):
            assert not [f for f, data in files.items() if secret.encode() in data] and secret.encode() not in said


def same_as_here(rendered: Path, there: str, here: Path) -> None:
    """Run the same in this process, on local files, and compare."""
    table = here / "data" / "table.csv"
    (here / "data").mkdir(parents=True)
    (here / "data" / "clips").symlink_to(rendered / "clips")
    table.write_text(table_of(rendered))
    assert manifest.main(["--table", str(table), "--out", str(here / "manifest")]) == 0
    assert extract.main(["--segments", str(here / "manifest"), "--out", str(here / "clips"), "--in-process"]) == 0
    run = ["--clips", str(here / "clips"), "--out", str(here / "run"), "--epochs", str(EPOCHS), "--in-process"]
    assert train.main(run) == 0
    arguments = ["--model", str(here / "run" / "model"), "--segments", str(here / "manifest"), "--in-process"]
    arguments += ["--references", str(rendered / "references"), "--out", str(here / "results")]
    assert evaluate.main(arguments) == 0

    assert shards.read_ids(f"{there}/clips") == shards.read_ids(str(here / "clips"))
    mine, theirs = ({r.segment_id: r for r in shards.read_clips(c)} for c in (str(here / "clips"), f"{there}/clips"))
    assert len(mine) == 50
    for segment_id, record in mine.items():
        other = theirs[segment_id]
        np.testing.assert_allclose(record.bases.astype(float), other.bases.astype(float), atol=2e-3)
        assert record.kl_divergence == pytest.approx(other.kl_divergence, rel=1e-4)

    rows, others = history(str(here / "run")), history(f"{there}/run")
    epochs = [[(r["pass"], r["epoch"]) for r in h] for h in (rows, others)]
    assert epochs[0] == epochs[1] and epochs[1][:EPOCHS] == [(1, e) for e in range(EPOCHS)]  # each once
    assert epochs[1][EPOCHS:] == [(2, e) for e in range(EPOCHS)]
    losses = [[r["train_loss"] for r in h] for h in (rows, others)]
    print("losses", *losses)
    factors = [tuple(torch.from_numpy(x) for x in r.factors()) for r in mine.values()]
    maps: list[list[torch.Tensor]] = [[], [], []]  # of the chosen network, and of each pass's last one
    for out in (str(here / "run"), f"{there}/run"):
        model = Model.load(storage.join(out, "model"))
        networks = [model.network]
        for checkpoint in ("checkpoint.pt", "checkpoint-2.pt"):
            saved = torch.load(io.BytesIO(storage.read_bytes(storage.join(out, checkpoint))), weights_only=True)
            networks.append(model.config.build())
            networks[-1].load_state_dict(saved["network"])
        with torch.inference_mode():
            for network, found in zip(networks, maps, strict=True):
                found.append(torch.stack([network.eval().relate(*f) for f in factors]).softmax(1))
    differences = [(x[0] - x[1]).abs() for x in maps]
    print("relation maps differ by", *[(float(d.max()), float(d.mean())) for d in differences])
    results = [json.loads(storage.read_bytes(f"{o}/results/results.json")) for o in (str(here), there)]
    sdr = [{n: e["mean"]["sdr"] for n, e in r["separators"].items()} for r in results]
    print("SDR", sdr)
    assert losses[1][:EPOCHS] == pytest.approx(losses[0][:EPOCHS], rel=1e-4)
    assert losses[1][EPOCHS:] == pytest.approx(losses[0][EPOCHS:], rel=1e-2)
    assert float(differences[1].max()) < 2e-3 and float(differences[2].mean()) < 5e-3
    for name, value in sdr[0].items():  # the default's chosen epochs may be others
        assert sdr[1][name] == pytest.approx(value, abs=3.0 if name == "default" else 0.01), name


def test_submits_mistakes_get_one_line(tmp_path):
    def said(*arguments: str) -> str:
        done = subprocess.run([*SUBMIT, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        lines = done.stderr.strip().splitlines()
        assert lines[-1].startswith("deploy/submit: ") and len(lines) <= 2  # argparse says the usage first
        return lines[-1]

    assert "unknown pipeline 'extrakt'; the pipelines are manifest, extract" in said("extrakt", "--out", "x")
    assert "no pipeline given" in said()
    assert "--nope" in said("--nope", "extract")
    assert "--address head:8265: it is the dashboard's" in said("--address", "head:8265", "extract")
    assert "it holds no pipelines/" in said("--working-dir", str(tmp_path), "extract")
    (tmp_path / "env.yaml").write_text("[]")
    assert "must be a mapping" in said("--runtime-env", str(tmp_path / "env.yaml"), "extract")
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert f"no Ray head answers at {nowhere}" in said("--address", nowhere, "extract")


def test_submit_shows_a_pipelines_own_help():
    done = subprocess.run([*SUBMIT, "collect", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--model" in done.stdout and "pipelines.collect" in done.stdout


def test_submit_can_be_interrupted_before_it_has_submitted():
    """By a head that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"http://127.0.0.1:{head.getsockname()[1]}"
        process = subprocess.Popen([*SUBMIT, "--address", address, "extract"], stderr=subprocess.PIPE, text=True)
        head.settimeout(60)
        connection, _ = head.accept()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1].splitlines()
        connection.close()
    assert process.returncode == 130 and len([line for line in said if line]) == 2
    assert said[-1].startswith(f"deploy/submit --address {address} --follow avsep-extract-")
