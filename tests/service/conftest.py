"""What several files of these tests share: a service that knows where things are, and a video for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.planted import BOXES, serving_planted, write_painted
from tests.support.serving import Server


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_planted(tmp_path_factory.mktemp("planted")) as running:
        yield running


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_painted(tmp_path_factory.mktemp("painted") / "trio.mp4", BOXES)
