"""Several workers that share a batch end where one does."""

import io
import json
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from avsep import parallel
from avsep.miml import MIML, activation_statistics
from avsep.synthetic import planted_bases
from avsep.training import Bags, optimiser_for, shuffled_batches, train_epoch
from pipelines import recipes

EPOCHS = 3


def train(recipe: str, n_clips: int, batch_size: int) -> tuple[MIML, list[float]]:
    """Train on planted bases, some of which are padding."""
    p = planted_bases(n_clips)
    energy = (p.W**2).sum(1) * (p.H**2).sum(2)
    energy = energy / energy.sum(1, keepdim=True)
    energy[::3, -1] = 0
    targets = torch.nn.functional.one_hot(p.object_of_basis, p.labels.shape[1] + 1).float().mT
    ids = [f"c{i:03d}" for i in range(n_clips)]
    bags = Bags(ids, p.W.mT.contiguous(), energy > 0, energy, p.labels, activation_statistics(p.H), targets)
    config = recipes.get(recipe)
    torch.manual_seed(0)
    network = MIML(bags.bases.shape[2], p.labels.shape[1], **asdict(config.network) | {"hidden": 32})
    # Batch norm takes these biases out again: their gradients are rounding alone, which Adam makes steps of.
    layers = [m[0] for m in (network.shared, network.shared_log, network.shared_statistics) if m is not None]
    for layer in [*layers, *([network.subconcepts] if config.network.published_head else [])]:
        layer.bias.requires_grad_(False)
    parallel.share_batch_norm(network)
    training = replace(config.training, epochs=EPOCHS)
    optimiser, schedule = optimiser_for(network, training)
    losses = []
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        batches = shuffled_batches(bags, batch_size, epoch)
        losses.append(train_epoch(network, batches, optimiser, training, epoch)["train_loss"])
        schedule.step()
    return network.eval(), losses


CASES = [("default", 50, 16), ("paper", 50, 16), ("default", 6, 2)]  # in the last, two of three workers get one clip


def work(rank: int, n_workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = distributed.FileStore(str(Path(folder, f"store-{n_workers}")), n_workers)
    distributed.init_process_group(
        "gloo", store=meeting, rank=rank, world_size=n_workers, timeout=timedelta(seconds=60)
    )
    results: list[Any] = []
    for case in CASES:
        network, losses = train(*case)
        state = io.BytesIO()
        torch.save(network.state_dict(), state)
        results.append(losses)
        Path(folder, f"{n_workers}-{rank}-{len(results) - 1}.pt").write_bytes(state.getvalue())
    Path(folder, f"{n_workers}-{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def workers(request, tmp_path_factory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("workers")
    multiprocessing.spawn(work, (request.param, str(folder)), request.param)
    return request.param, folder


@pytest.mark.parametrize("number", range(len(CASES)))
def test_several_workers_end_where_one_does(workers, number):
    """Same batches, noise and warp; batch norm over all rows: losses and relation maps agree within rounding."""
    n_workers, folder = workers
    network, losses = train(*CASES[number])
    p = planted_bases(20, seed=9)
    given = p.W.mT.contiguous(), None, activation_statistics(p.H)
    with torch.inference_mode():
        expected = network.relation(*given)
    for rank in range(n_workers):
        curves = json.loads((folder / f"{n_workers}-{rank}.json").read_text())
        assert curves[number] == pytest.approx(losses, rel=1e-5)
        network.load_state_dict(torch.load(folder / f"{n_workers}-{rank}-{number}.pt", weights_only=True))
        with torch.inference_mode():
            found = network.relation(*given)
        assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_the_parts_of_a_batch_are_the_batch(monkeypatch):
    for n_rows in (0, 1, 5, 64):
        for n_workers in (1, 2, 3, 7):
            rows = []
            for rank in range(n_workers):
                monkeypatch.setattr(parallel, "place", lambda rank=rank, n=n_workers: (rank, n))
                rows += range(n_rows)[parallel.own_part(n_rows)]
            assert rows == list(range(n_rows))
