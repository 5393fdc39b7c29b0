"""The errors of work done elsewhere."""

from __future__ import annotations


class Busy(Exception):
    """There is too much work in progress to take more."""


class WorkerLost(Exception):
    """Whoever did the work died, again and again."""
