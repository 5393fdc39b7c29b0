"""Several workers that share clips and batches end where one does."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from avsep import objects, shards
from avsep.factors import DataConfig, ExtractionConfig
from avsep.learning import parallel, run
from avsep.learning.bags import Bags, TrainingClips, count_clips, load_bags
from avsep.learning.training import optimiser_for, train_epoch
from avsep.miml import MIML, activation_statistics
from avsep.model import LabelConfig, Labelling, Model
from avsep.objects import AUDIOSET_23
from avsep.records import ClipRecord
from avsep.stft import STFT
from avsep.synthetic import planted_bases
from pipelines import extract, recipes, runners
from pipelines import train as training_program
from pipelines.train import main
from tests.support.cluster import ENVIRONMENT
from tests.support.loopback import Google
from tests.support.processes import descendants
from tests.support.uris import everything

STFT_CONFIG = STFT(sample_rate=8000, n_fft=94, hop_length=47)  # F = 48, as the planted bases have
EPOCHS, N_BASES = 3, 6
LABELS = Labelling(LabelConfig(), AUDIOSET_23)


def write_clips(folder: Path, n_clips: int, a_shard: int, objects_a_clip: int = 2) -> list[str]:
    """Write planted bases as an extraction does, some clips with a silent basis."""
    p = planted_bases(n_clips, n_bins=STFT_CONFIG.n_bins, n_bases=N_BASES, objects_a_clip=objects_a_clip)
    config = DataConfig(ExtractionConfig(stft=STFT_CONFIG, n_bases=N_BASES), AUDIOSET_23).as_dict()
    records = []
    for i in range(n_clips):
        energy = (p.W[i] ** 2).sum(0) * (p.H[i] ** 2).sum(1)
        energy[-1] *= i % 3 != 0
        names = tuple(objects.OBJECTS[j].name for j in p.labels[i].nonzero()[:, 0].tolist())
        scale = float(p.H[i].max())
        records.append(
            ClipRecord(
                f"c{i:03d}", "no/such/file.mp4", 0.0, 1.0, "val" if i % 10 == 9 else "train", names, names,
                p.W[i].numpy().astype(np.float16), (p.H[i] / scale).numpy().astype(np.float16), scale,
                (energy / energy.sum()).numpy(), None, 0.1, 1.0, -20.0, "", "given",
            )
        )  # fmt: skip
    for number, first in enumerate(range(0, n_clips, a_shard)):
        some = records[first : first + a_shard]
        shards.write_shard(str(folder), f"{number:05d}", 0, some, [], configuration=config, shape=p.W.shape[1:])
    return shards.clip_files(str(folder))


def teacher(W: Tensor, H: Tensor, energy: Tensor, labels: Tensor) -> Tensor:
    """Share every basis among the shown objects."""
    shares = torch.cat([labels.float(), torch.zeros(1)])
    return (shares / shares.sum())[:, None].expand(-1, W.shape[1]).contiguous()


def mixtures() -> Bags:
    p = planted_bases(21, n_bins=STFT_CONFIG.n_bins, n_bases=N_BASES, seed=5)
    energy = (p.W**2).sum(1) * (p.H**2).sum(2)
    energy[::2, 0] = 0
    n = len(objects.OBJECTS)
    labels = torch.nn.functional.pad(p.labels, (0, n - p.labels.shape[1]))
    targets = torch.nn.functional.one_hot(p.object_of_basis, n + 1).float().mT.contiguous()
    ids = [f"practice-{i}" for i in range(21)]
    bases = p.W.mT.half().contiguous()
    energy = energy / energy.sum(1, keepdim=True)
    return Bags(ids, bases, energy > 0, energy, labels, activation_statistics(p.H), targets)


CASES: list[dict[str, Any]] = [
    {"recipe": "default", "held": True},
    {"recipe": "paper", "held": False},
    {"recipe": "default", "taught": True, "buffer_clips": 12, "held": True},  # several groups
    {"recipe": "default", "taught": True, "buffer_clips": 12, "held": False},
    {"recipe": "default", "taught": True, "held": True, "batch_size": 2},  # often nothing for one of them
    {"recipe": "default", "n_files": 1, "batch_size": 4},  # nothing at all for the others
]


def train(files: list[str], case: dict[str, Any]) -> tuple[MIML, list[float], list[list[str]]]:
    """Train on the files; return the network, its losses, and the first epoch's clips by batch."""
    config = recipes.get(case["recipe"])
    files = files[: case.get("n_files")]
    torch.manual_seed(0)
    network = MIML(STFT_CONFIG.n_bins, len(objects.OBJECTS), **asdict(config.network) | {"hidden": 32})
    # Batch norm takes these biases out again: their gradients are rounding alone, which Adam makes steps of.
    layers = [m[0] for m in (network.shared, network.shared_log, network.shared_statistics) if m is not None]
    for layer in [*layers, *([network.subconcepts] if config.network.published_head else [])]:
        layer.bias.requires_grad_(False)
    parallel.share_batch_norm(network)
    training = replace(config.training, epochs=EPOCHS)
    optimiser, schedule = optimiser_for(network, training)
    counts = [count_clips(f, LABELS)[0]["train"] for f in files]
    more = {"teacher": teacher, "mixtures": mixtures()} if case.get("taught") else {}
    options = {k: case[k] for k in ("held", "buffer_clips") if k in case}
    clips = TrainingClips(files, counts, LABELS, **more, **options)
    losses: list[float] = []
    batches: list[list[str]] = []
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        drawn = list(clips.batches(case.get("batch_size", 16), epoch))
        losses.append(train_epoch(network, drawn, optimiser, training, epoch)["train_loss"])
        schedule.step()
        batches = batches or [sorted(b.segment_ids) for b in drawn]
    return network.eval(), losses, batches


def in_processes(work: Callable[..., None], n_workers: int, folder: Path, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in so many processes that can meet."""
    multiprocessing.spawn(_joined, (work, n_workers, str(folder / f"store-{n_workers}"), arguments), n_workers)


def _joined(rank: int, work: Callable[..., None], n_workers: int, store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = distributed.FileStore(store, n_workers)
    distributed.init_process_group(
        "gloo", store=meeting, rank=rank, world_size=n_workers, timeout=timedelta(seconds=60)
    )
    work(rank, *arguments)
    distributed.destroy_process_group()


def train_each(rank: int, files: list[str], folder: Path) -> None:
    for number, case in enumerate(CASES):
        network, losses, batches = train(files, case)
        torch.save(network.state_dict(), folder / f"{rank}-{number}.pt")
        (folder / f"{rank}-{number}.json").write_text(json.dumps([losses, batches]))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return write_clips(tmp_path_factory.mktemp("clips"), 50, 8)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def workers(request, files, tmp_path_factory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("workers")
    in_processes(train_each, request.param, folder, files, folder)
    return request.param, folder


@pytest.mark.parametrize("number", range(len(CASES)))
def test_several_workers_end_where_one_does(workers, files, number):
    """Same batches, noise and warp; batch norm over all rows: losses and relation maps agree within rounding."""
    n_workers, folder = workers
    network, losses, batches = train(files, CASES[number])
    said = [json.loads((folder / f"{rank}-{number}.json").read_text()) for rank in range(n_workers)]
    assert [sorted(i for part in parts for i in part) for parts in zip(*(b for _, b in said), strict=True)] == batches
    p = planted_bases(20, n_bins=STFT_CONFIG.n_bins, seed=9)
    given = p.W.mT.contiguous(), None, activation_statistics(p.H)
    with torch.inference_mode():
        expected = network.relation(*given)
    for rank, (curve, _) in enumerate(said):
        assert curve == pytest.approx(losses, rel=1e-5)
        network.load_state_dict(torch.load(folder / f"{rank}-{number}.pt", weights_only=True))
        with torch.inference_mode():
            found = network.relation(*given)
        assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_each_worker_reads_its_own_files_once(files, monkeypatch):
    """All files are somebody's, the parts are alike in size, and what is held isn't read again."""
    from avsep.learning import bags

    counts = [count_clips(f, LABELS)[0]["train"] for f in files]
    read: list[str] = []
    kept = bags.bags_from_file
    monkeypatch.setattr(bags, "bags_from_file", lambda path, *rest: read.append(path) or kept(path, *rest))
    facts = {
        i: (b.segment_ids, b.valid.sum(1).tolist()) for i, f in enumerate(files) if (b := kept(f, LABELS, "train"))
    }
    monkeypatch.setattr(parallel, "gather", lambda value: [value, (facts, value[1])])  # what the others would say
    for buffer_clips in (10, 1000):
        parts = []
        for rank in range(2):
            read.clear()
            monkeypatch.setattr(parallel, "place", lambda rank=rank: (rank, 2))
            clips = TrainingClips(files, counts, LABELS, held=True, buffer_clips=buffer_clips)
            for epoch in range(2):
                list(clips.batches(8, epoch))
            assert len(read) == len(set(read))
            parts.append(set(read))
        assert not parts[0] & parts[1] and parts[0] | parts[1] == set(files)
        sizes = [sum(n for f, n in zip(files, counts, strict=True) if f in part) for part in parts]
        assert abs(sizes[0] - sizes[1]) <= max(counts)


def test_shared_batch_norm_gives_back_the_type_that_it_got() -> None:
    """Under autocast what follows would else run in float32."""
    norm = parallel.SharedBatchNorm(3).train()
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    found, plain = norm(rows.bfloat16()), torch.nn.BatchNorm1d(3)(rows)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), plain, atol=0.03)


def fit(rank: int, one: run.TrainingRun) -> None:
    run.fit(one)


@pytest.mark.slow
def test_the_second_pass_of_two_workers_ends_where_that_of_one_does(tmp_path, monkeypatch):
    """Of pipelines.train, on clips of solos: with practice mixtures, and targets from the first pass."""
    write_clips(tmp_path / "clips", 60, 12, objects_a_clip=1)
    recipe = replace(recipes.default(), practice=20)
    monkeypatch.setitem(recipes.RECIPES, "default", lambda: recipe)
    second: list[run.TrainingRun] = []
    kept = training_program.train_pass

    def train_pass(runner, one):
        if one.number == 2:
            shutil.copytree(tmp_path / "one", tmp_path / "two")
            second.append(replace(one, out=str(tmp_path / "two")))
        kept(runner, one)

    monkeypatch.setattr(training_program, "train_pass", train_pass)
    command = ["--clips", str(tmp_path / "clips"), "--out", str(tmp_path / "one"), "--epochs", "10", "--in-process"]
    assert main(command) == 0
    (two,) = second
    in_processes(fit, 2, tmp_path, two)
    rows = [
        [r for r in json.loads((tmp_path / o / "history.json").read_text()) if r["pass"] == 2] for o in ("one", "two")
    ]
    assert len(rows[0]) == len(rows[1]) == 10
    for figure in ("train_loss", "val_loss", "val_assignment"):
        assert [r[figure] for r in rows[1]] == pytest.approx([r[figure] for r in rows[0]], rel=1e-3)
    bags = load_bags(shards.clip_files(str(tmp_path / "clips")), LABELS, "train")
    maps = []
    for out in ("one", "two"):
        saved = torch.load(io.BytesIO((tmp_path / out / "checkpoint-2.pt").read_bytes()), weights_only=True)
        network = two.config.build().eval()
        network.load_state_dict(saved["network"])
        with torch.inference_mode():
            maps.append(network.relation(bags.bases.float(), bags.valid, bags.statistics).softmax(1))
    difference = float((maps[0] - maps[1]).abs().max())
    print("losses", *([r["train_loss"] for r in h] for h in rows), "maps differ by", difference)
    assert difference < 2e-3


@pytest.mark.slow
def test_the_mean_of_both_passes_is_the_model_where_the_recipe_says_so(tmp_path, monkeypatch):
    write_clips(tmp_path / "clips", 60, 12, objects_a_clip=1)
    recipe = replace(recipes.both_passes(), practice=10)
    monkeypatch.setitem(recipes.RECIPES, "both_passes", lambda: recipe)
    command = ["--clips", str(tmp_path / "clips"), "--out", str(tmp_path / "run"), "--recipe", "both_passes"]
    assert main([*command, "--epochs", "8", "--in-process"]) == 0
    model = Model.load(tmp_path / "run" / "model")
    assert model.config.n_networks == 2 and model.context is not None
    for member, name in zip(model.network.members, ("checkpoint.pt", "checkpoint-2.pt"), strict=True):
        best = torch.load(io.BytesIO((tmp_path / "run" / name).read_bytes()), weights_only=True)["best"]
        assert all(torch.equal(v, best[k]) for k, v in member.state_dict().items())


def rows_of(out: Path) -> list[dict[str, Any]]:
    file = out / "history.json"
    return json.loads(file.read_text()) if file.exists() else []


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_training_goes_on_without_a_node_that_is_gone_for_good(tmp_path, monkeypatch):
    """A worker on each of two nodes, then one on the node that is left: each epoch once, the losses of one worker."""
    write_clips(tmp_path / "clips", 60, 12, objects_a_clip=1)
    command = ["--clips", str(tmp_path / "clips"), "--epochs", "12", "--recipe", "audioset"]  # one pass
    assert main([*command, "--out", str(tmp_path / "here"), "--in-process"]) == 0
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    program = [sys.executable, "-m", "pipelines.train", *command, "--out", str(tmp_path / "there")]
    try:
        with subprocess.Popen(program, cwd=Path(__file__).parents[2]) as process:
            while len(rows_of(tmp_path / "there")) < 3:
                assert process.poll() is None
                time.sleep(0.1)
            assert sum("RayTrainWorker" in title for title in descendants(os.getpid()).values()) == 2
            cluster.remove_node(nodes[0], allow_graceful=False)
            assert process.wait(timeout=400) == 0
    finally:
        cluster.shutdown()
    here, there = rows_of(tmp_path / "here"), rows_of(tmp_path / "there")
    assert [r["epoch"] for r in there] == [r["epoch"] for r in here] == list(range(12))
    assert [r["train_loss"] for r in there] == pytest.approx([r["train_loss"] for r in here], rel=1e-3)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_training_goes_on_where_its_only_worker_was_killed(tmp_path):
    """Ray does the task again, from the checkpoint: each epoch of both passes once, the losses of one left alone."""
    write_clips(tmp_path / "clips", 60, 12, objects_a_clip=1)
    command = ["--clips", str(tmp_path / "clips"), "--epochs", "12"]
    assert main([*command, "--out", str(tmp_path / "here"), "--in-process"]) == 0
    program = [sys.executable, "-m", "pipelines.train", *command, "--out", str(tmp_path / "there")]
    environment = os.environ | {"RAY_worker_niceness": "0"}
    with subprocess.Popen(program, cwd=Path(__file__).parents[2], env=environment) as process:
        killed = []
        for epochs in (3, 15):  # one in each pass
            while len(rows_of(tmp_path / "there")) < epochs:
                assert process.poll() is None
                time.sleep(0.05)
            titles = descendants(process.pid)
            assert not any("RayTrainWorker" in title for title in titles.values())
            killed += [pid for pid, title in titles.items() if "train_alone" in title]
            os.kill(killed[-1], signal.SIGKILL)
        assert process.wait(timeout=400) == 0
    assert len(killed) == len(set(killed)) == 2
    here, there = rows_of(tmp_path / "here"), rows_of(tmp_path / "there")
    assert [(r["pass"], r["epoch"]) for r in there] == [(n, e) for n in (1, 2) for e in range(12)]
    assert [r["train_loss"] for r in there] == pytest.approx([r["train_loss"] for r in here], rel=1e-3)


@pytest.mark.slow
def test_training_on_ray_keeps_its_record_in_googles_store(rendered, gs: Google, gs_folder, monkeypatch):
    """Ray Train's two workers write to the store itself, through the file system that they are given."""
    monkeypatch.setattr(runners.OnRay, "n_nodes", 2)
    monkeypatch.setenv("AVSEP_CPUS", "2")
    clips, out = f"{gs_folder}/clips", f"{gs_folder}/run"
    assert extract.main(["--segments", str(rendered / "segments.csv"), "--out", clips, "--in-process"]) == 0
    assert main(["--clips", clips, "--out", out, "--epochs", "1"]) == 0
    kept = everything(out).keys()
    assert {"model/miml.safetensors", "history.json"} <= kept and any(k.startswith("ray/") for k in kept)
    assert gs.unauthorised == 0
