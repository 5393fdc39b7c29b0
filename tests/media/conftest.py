import pytest

from tests.support import processes


@pytest.fixture(autouse=True)
def own_processes() -> None:
    """What an earlier test's library left running is no child of this one."""
    processes.begin()
