"""Objects that live in a Ray actor, or here, and whose functions any task may call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from pipelines.cluster import one_thread


class Caller(Protocol):
    """Calls a function on an object that is elsewhere; it can be sent to tasks."""

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Start `function(the object, *arguments)`, and give its result's future."""


class ActorBody:
    """What an actor runs: it builds an expensive object once, and calls functions on it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        one_thread()
        self.target = make()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on the object."""
        return function(self.target, *arguments)


class ThereCaller:
    """Calls functions on an actor's object."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Start the call."""
        return self.actor.call.remote(function, *arguments).future()


class HereCaller:
    """Calls functions on an object of this process; the futures are finished."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Make the call."""
        future: Future = Future()
        future.set_result(function(self.target, *arguments))
        return future


def without_cuda(_: None) -> str:
    """Return this node's address if torch finds no CUDA on it, else nothing."""
    import ray
    import torch

    return "" if torch.cuda.is_available() else str(ray.util.get_node_ip_address())


def nothing() -> None:
    """Build nothing: for an actor that only looks at where it is."""
