"""Golden figures: each recipe's training on planted bases ends where it did.

They change on purpose only: `AVSEP_GOLDEN=write pytest tests/method/test_golden.py` writes them anew.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from avsep.learning.bags import Bags, shuffled_batches
from avsep.learning.training import assignment, optimiser_for, train_epoch, validate
from avsep.miml import MIML, activation_statistics
from avsep.synthetic import planted_bases
from pipelines import recipes

FILE = Path(__file__).with_name("golden.json")
EPOCHS = 5


def figures_of(name: str, *, bfloat16: bool = False) -> dict[str, list[float]]:
    recipe = recipes.get(name)
    p = planted_bases(160)
    energy = (p.W**2).sum(1) * (p.H**2).sum(2)
    energy = energy / energy.sum(1, keepdim=True)
    targets = torch.nn.functional.one_hot(p.object_of_basis, p.labels.shape[1] + 1).float().mT
    ids = [f"c{i:03d}" for i in range(160)]
    clips = Bags(ids, p.W.mT.contiguous(), energy > 0, energy, p.labels, activation_statistics(p.H))
    train, val = clips.take(slice(0, 120)), clips.take(slice(120, 160))
    torch.manual_seed(0)
    network = MIML(clips.bases.shape[2], p.labels.shape[1], **asdict(recipe.network) | {"hidden": 64})
    if bfloat16:
        network.relation = torch.autocast("cpu", torch.bfloat16)(network.relation)  # type: ignore[method-assign]
    config = replace(recipe.training, epochs=EPOCHS)
    optimiser, schedule = optimiser_for(network, config)
    rows = []
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        row = train_epoch(network, shuffled_batches(train, 24, epoch), optimiser, config, epoch)
        row |= validate(network, [val], config)
        row["assignment"] = assignment(network, replace(val, targets=targets[120:]))
        schedule.step()
        rows.append(row)
    return {k: [round(r[k], 4) for r in rows] for k in ("train_loss", "val_loss", "val_map", "assignment")}


@pytest.mark.parametrize("name", ["default", "paper"])
def test_training_ends_where_it_did(name: str) -> None:
    found = figures_of(name)
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("AVSEP_GOLDEN") == "write":
        FILE.write_text(json.dumps(golden | {name: found}, indent=1) + "\n")
        return
    for figure, values in golden[name].items():
        assert found[figure] == pytest.approx(values, abs=0.02), figure  # other processors round differently


def test_matrices_in_bfloat16_change_nothing_that_matters() -> None:
    """As a GPU multiplies them."""
    golden = json.loads(FILE.read_text())["default"]
    for figure, values in figures_of("default", bfloat16=True).items():
        assert values == pytest.approx(golden[figure], abs=0.01), figure


def test_the_default_beats_the_paper_at_giving_bases_to_objects() -> None:
    golden = json.loads(FILE.read_text())
    assert golden["default"]["assignment"][-1] > golden["paper"]["assignment"][-1] + 0.1
