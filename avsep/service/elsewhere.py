"""Work that is done elsewhere: how it is asked for, and how it fails."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

# Pictures `(n, size, size, 3)` and which network is to see what in them (`VideoSeparator.sees`) → future `Seen`.
LabelBy = Callable[[NDArray[np.uint8], str], Future]


class Busy(Exception):
    """There is too much work in progress to take more."""


class WorkerLost(Exception):
    """Whoever did the work died, again and again."""


class OutOfTime(Exception):
    """A job took longer than a service's jobs may."""


class OtherNetwork(Exception):
    """Another picture network is in use where the pictures were sent: a model is being replaced."""
