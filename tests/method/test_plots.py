"""Figures of little or no data are figures still, and warn of nothing."""

import io
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from avsep import plots

ROW = {"epoch": 0, "train_loss": 1.0}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.loss_curves([]),
        lambda: plots.loss_curves([ROW]),
        lambda: plots.loss_curves([ROW | {"pass": 1, "val_map": float("nan")}, ROW | {"pass": 2}]),
        lambda: plots.reliability({}),
        lambda: plots.reliability({"confidence": []}),
        lambda: plots.histograms([("s", [0, 1, None], [0, 0])]),
        lambda: plots.cooccurrence(np.zeros((0, 0)), []),
        lambda: plots.cooccurrence(np.zeros((2, 2)), ["dog", "cat"]),
        lambda: plots.relation_map(np.zeros((2, 3)), ["dog", "cat"], np.zeros(3)),
    ],
)
def test_figures_without_data(draw: Callable[[], bytes]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Image.open(io.BytesIO(draw()))
    assert min(image.size) > 100
